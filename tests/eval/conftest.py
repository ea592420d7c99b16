"""A small tokenizer, and a task whose verifier can go wrong in every way."""

from collections.abc import Iterator
from pathlib import Path

import pytest

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
