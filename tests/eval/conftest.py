"""A small tokenizer, an untrained model, and a task whose verifier can go wrong in every way."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sputnik.engine.llm import LLM
from sputnik.model.checkpoint import save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.tasks.base import Task, load_task
from sputnik.tasks.verify import VerifierPool
from sputnik.text.tokenizer import Tokenizer

TASK = '''
import random, time
from sputnik.tasks.base import Problem, Task, Verdict

class Trouble(Task):
    """Doubling; the answer decides how the verifier fails."""
    name = "trouble"
    version = "7"

    def generate(self, rng: random.Random) -> Problem:
        number = rng.randint(0, 9999)
        return Problem(prompt=f"Twice {number}?", gold=str(2 * number))

    def verify(self, problem: Problem, answer: str) -> Verdict:
        if problem.gold == "bad":
            return Verdict.BAD_GOLD
        if answer == "boom":
            raise RuntimeError("verifier broke")
        if answer == "hang":
            time.sleep(60)
        if not answer.isdigit():
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if answer == problem.gold else Verdict.WRONG
'''


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return Tokenizer.train(["What is 1 + 2 - 3? Check: wait, 4. Twice 17? User: Assistant: answer"] * 4, 320, digits=1)


@pytest.fixture(scope="session")
def trouble_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("task") / "trouble.py"
    path.write_text(TASK, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def trouble(trouble_file: str) -> Task:
    return load_task(trouble_file)


@pytest.fixture(scope="session")
def pool(trouble_file: str) -> Iterator[VerifierPool]:
    with VerifierPool(trouble_file, deadline_s=0.5) as pool:
        yield pool


@pytest.fixture(scope="session")
def checkpoint(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model: what it says is noise, and always the same noise."""
    folder: Path = tmp_path_factory.mktemp("model") / "checkpoint"
    shape = {"vocab_size": tok.vocab_size, "eos_token_id": tok.eos_id, "initializer_range": 0.15}
    model = Transformer(ModelConfig.preset("tiny", **shape))
    save_model(model.init_weights(torch.Generator().manual_seed(0)), folder, tokenizer=tok)
    return folder


@pytest.fixture(scope="session")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, precision="fp32", exact=True, cache_tokens=4096, max_running=16)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("arithmetic")


@pytest.fixture(scope="module")
def judges() -> Iterator[VerifierPool]:
    with VerifierPool("arithmetic") as pool:
        yield pool
