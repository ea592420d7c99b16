"""`sputnik distill`: a dense student learns what a V3-shaped teacher wrote, and its page is what the code does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sputnik.__main__ import main
from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.stages import kind_of
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.state import read_jsonl

pytestmark = pytest.mark.timeout(600)
PAGE = (Path(__file__).parent.parent.parent / "docs" / "distill.md").read_text(encoding="utf-8")
TASK = """
import random
from sputnik.tasks.base import Problem, Task, Verdict

class Number(Task):
    name = "number"

    def generate(self, rng: random.Random) -> Problem:
        return Problem(prompt=f"Is {rng.randint(10, 99)} a number?", gold="yes")

    def verify(self, problem: Problem, answer: str) -> Verdict:
        return Verdict.CORRECT if answer.strip() == "yes" else Verdict.WRONG
"""
FAST = ["--precision", "fp32", "--lr", "1e-2", "--batch", "4"]


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, an untrained dense student, and a teacher who knows the answer."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "number.py").write_text(TASK)
    lines = [{"prompt": f"Is {n} a number?", "thinking": f"I read {n}.", "answer": "yes"} for n in range(10, 99, 4)]
    (folder / "known.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tok = Tokenizer.load(checkpoint)
    same = {"vocab_size": tok.vocab_size, "eos_token_id": tok.eos_id, "bos_token_id": tok.bos_id, "hidden_size": 64}
    for name, preset in (("base", "tiny"), ("untaught", "dense")):
        shape = ModelConfig.preset(preset, **same, num_hidden_layers=2, intermediate_size=128)
        save_model(Transformer(shape).init_weights(torch.Generator().manual_seed(1)), folder / name, tokenizer=tok)
    taught = ["--data", str(folder / "known.jsonl"), "--out", str(folder / "teacher"), "--epochs", "20", *FAST]
    assert main(["sft", str(folder / "base"), *taught]) == 0
    return folder


def arguments(folder: Path, out: str) -> list[str]:
    asked = ["--task", str(folder / "number.py"), "--questions", "24", "--samples", "2", "--max-tokens", "24"]
    teacher = ["--teacher", str(folder / "teacher"), "--traces", "template=chat", "--traces", "temperature=0.3"]
    return ["distill", str(folder / "untaught"), *teacher, *asked, "--out", str(folder / out), "--epochs", "12", *FAST]


def test_the_student_learns_the_answers_of_its_teacher(folder: Path, capsys: Any) -> None:
    assert main(arguments(folder, "student")) == 0
    kept = read_jsonl(folder / "student/traces/data.jsonl")
    assert 12 <= len(kept) <= 24 and all("yes" in line["answer"] for line in kept)
    told = json.loads((folder / "student/data.json").read_text())
    assert told["lines"] == len(kept) and load_model(folder / "student/checkpoint").config.model_type == "llama"
    model = LLM(folder / "student/checkpoint", precision="fp32")
    asked = [{"role": "user", "content": "Is 11 a number?"}]
    answer = model.chat(asked, SamplingParams(temperature=0, max_tokens=40))
    assert answer.text == kept[0]["answer"] and answer.thinking.startswith("I read") and answer.finish == "stop"
    before = {path: path.read_bytes() for path in (folder / "student").rglob("*.jsonl")}
    assert main(arguments(folder, "student")) == 0
    assert {path: path.read_bytes() for path in (folder / "student").rglob("*.jsonl")} == before
    assert f"{len(kept)} of 48 answers kept" in capsys.readouterr().out


def test_traces_made_before_need_no_teacher(folder: Path) -> None:
    out = folder / "given"
    given = ["--data", str(folder / "known.jsonl"), "--out", str(out), "--epochs", "1", *FAST]
    assert main(["distill", str(folder / "untaught"), *given]) == 0
    assert json.loads((out / "data.json").read_text())["lines"] == 23 and not (out / "traces").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --teacher MODEL and --task TASK, or traces made before: --data FILE"),
        (["--teacher", "TEACHER"], "give --teacher MODEL and --task TASK"),
        (["--task", "arithmetic"], "give --teacher MODEL and --task TASK"),
        (["--data", "known.jsonl", "--samples", "4"], "--samples is for asking a teacher: name one with --teacher"),
        (["--teacher", "TEACHER", "--task", "arithmetic", "--traces", "keeps=4"], "unknown key 'keeps'; did you mean"),
        (["--teacher", "TEACHER", "--task", "arithmetic", "--questions", "0"], "questions = 0: set it to 1 or more"),
    ],
)
def test_what_it_cannot_do_is_one_line(folder: Path, capsys: Any, flags: list[str], message: str) -> None:
    told = [str(folder / "teacher") if flag == "TEACHER" else flag for flag in flags]
    assert main(["distill", str(folder / "untaught"), *told, "--out", str(folder / "none")]) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not (folder / "none").exists()


def test_the_recipe_of_the_page_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0])
    stages = read_recipe(tmp_path / "mine.toml", kind_of).stages
    assert [(stage.name, stage.parent, stage.inputs) for stage in stages] == [
        ("corpus", None, ()), ("teacher", "corpus", ()), ("traces", "teacher", ()), ("untaught", "corpus", ()),
        ("student", "untaught", ("traces",)),
    ]  # fmt: skip
