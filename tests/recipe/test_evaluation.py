"""An evaluation tries its task before it loads or scores anything; as a stage it leaves scores, answers and curves."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sputnik.__main__ import main
from sputnik.errors import ConfigError, TaskError
from sputnik.eval.models import Local
from sputnik.eval.results import load_result
from sputnik.recipe.evaluation import EvalConfig, evaluate_checkpoint
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.runner import run_recipe
from sputnik.recipe.stages import kind_of

PAYS = """
from sputnik.tasks.base import Problem, Task

class Lenient(Task):
    name = "lenient"

    def generate(self, rng):
        number = rng.randint(0, 10**6)
        return Problem(prompt=f"Say {number}.", gold=str(number))

    def verify(self, problem, answer):
        return CONDITION
"""


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("problem.gold in answer", "verify gives CORRECT to attack"),
        ("answer == problem.gold + '.'", "verify gives WRONG to the gold answer"),
    ],
)
def test_a_task_that_pays_the_wrong_thing_is_not_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], condition: str, words: str
) -> None:
    task, model, out = tmp_path / "lenient.py", tmp_path / "model", tmp_path / "scores.json"
    task.write_text(PAYS.replace("CONDITION", condition))
    with pytest.raises(TaskError, match=words):  # there is no model: the task is tried first
        evaluate_checkpoint(model, EvalConfig(str(task), questions=4, samples=1))
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert main(["eval", str(model), "--task", str(task), "--out", str(out)]) == 2
    assert words in capsys.readouterr().err and not out.exists()


RECIPE = """
[model]
preset = "tiny"
[[stage]]
name = "corpus"
kind = "corpus"
texts = ["python-topics"]
tokens = 60_000
vocab_size = 600
task = "arithmetic"
examples = 300
[[stage]]
name = "base"
kind = "pretrain"
tokens = 4_096
length = 64
batch = 4
[[stage]]
name = "scores"
kind = "eval"
suite = "arithmetic"
questions = 3
samples = 2
max_tokens = 24
scaling = true
budgets = [2, 6]
"""


def test_an_eval_stage_scores_a_suite_and_its_scaling(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    run = run_recipe(read_recipe(path, kind_of), tmp_path / "runs", kind_of, Console(file=io.StringIO()))
    out = run / "scores"
    result, scaling = (json.loads((out / name).read_text()) for name in ("eval.json", "scaling.json"))
    assert (result["n"], result["k"], result["suite"], result["model"]) == (3, 2, "arithmetic", "base")
    assert [sample["sample"] for sample in result["samples"]] == [0, 0, 0]
    assert len((out / "samples.jsonl").read_text().splitlines()) == 6
    assert [point["budget"] for point in scaling["points"]] == [2, 6, None, None, None, None]
    assert scaling["points"][2]["pass_at_1"] == result["pass_at_1"]
    assert (out / "samples.md").read_text().count("## ") == 3
    assert load_result(out / "eval.json").suite == "arithmetic"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "a task or a suite, and not both"),
        ({"task": "arithmetic", "suite": "arithmetic"}, "a task or a suite, and not both"),
        ({"task": "arithmetic", "budgets": (1,)}, "write scaling = true"),
        ({"task": "arithmetic", "scaling": True, "thinking_budget": 3}, "leave out thinking_budget"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EvalConfig(**settings)


def test_a_stage_that_was_stopped_goes_on_with_the_answers_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE.replace("scaling = true\nbudgets = [2, 6]\n", ""))
    whole = run_recipe(read_recipe(path, kind_of), tmp_path / "runs", kind_of, Console(file=io.StringIO()))
    wanted = (whole / "scores/samples.jsonl").read_bytes()
    kept = b"".join(wanted.splitlines(keepends=True)[:4]) + b'{"torn'
    lineage = json.loads((whole / "lineage.json").read_text())
    lineage["stages"][-1]["status"] = "stopped"
    (whole / "lineage.json").write_text(json.dumps(lineage))
    (whole / "scores/eval.json").unlink()
    (whole / "scores/samples.jsonl").write_bytes(kept)
    asked: list[int] = []
    ask = Local.ask
    monkeypatch.setattr(
        Local, "ask", lambda self, questions, k: asked.append(len(questions)) or ask(self, questions, k)
    )
    run_recipe(read_recipe(path, kind_of), tmp_path / "runs", kind_of, Console(file=io.StringIO()))
    assert asked == [1]
    assert (whole / "scores/samples.jsonl").read_bytes() == wanted and (whole / "scores/eval.json").exists()
