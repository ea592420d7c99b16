"""docs/evaluation.md says what the code does: its suites, its tables, its examples."""

import re
from pathlib import Path

import pytest

from sputnik.eval import models
from sputnik.eval.published import tables
from sputnik.eval.suites import SUITES, find_suite
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.stages import kind_of
from sputnik.tasks.base import load_task

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_suites_of_the_page_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \|", PAGE, re.MULTILINE)
    assert {name: (int(n), int(k)) for name, n, k in rows} == {
        name: (suite.questions, suite.samples) for name, suite in SUITES.items()
    }
    for name, whole in re.findall(r"`([\w-]+)` \| \d+ \| \d+ \| \d+ of the (\d+) problems", PAGE):
        assert SUITES[name].whole == int(whole)


def test_every_published_table_is_named() -> None:
    assert f"# {', '.join(each.name for each in tables())}, all\n" in PAGE


def test_the_questions_of_the_page_are_a_suite(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(blocks("json")[0])
    suite = find_suite(str(tmp_path / "mine.jsonl"))
    problems = load_task(suite.task, suite.options).problems("test", suite.questions)
    golds = {problem.prompt.split("\n\n")[1]: problem for problem in problems}
    assert f"{golds['Which planet is the largest?'].gold}) Jupiter" in golds["Which planet is the largest?"].prompt
    assert f"{golds['Which is a prime?'].gold}) 23" in golds["Which is a prime?"].prompt


def test_the_stage_of_the_page_is_one(tmp_path: Path) -> None:
    head = (
        '[model]\npreset = "tiny"\n[[stage]]\nname = "c"\nkind = "corpus"\n[[stage]]\nname = "r1"\nkind = "pretrain"\n'
    )
    (tmp_path / "mine.toml").write_text(head + blocks("toml")[0])
    stage = read_recipe(tmp_path / "mine.toml", kind_of).stages[-1]
    assert (stage.kind, stage.config.suite, stage.config.scaling) == ("eval", "ladder", True)


def test_the_example_in_python_runs(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("python")[0].replace('"runs/quickstart/zero/checkpoint"', repr(str(checkpoint)))
    assert str(checkpoint) in code and models.Local.__name__ in code
    exec(code.replace('"test", 20', '"test", 3'), {})
    assert "(n=3, k=4)" in capsys.readouterr().out
