"""The tables and examples of docs/ are what the code does: a number or name in prose that drifts fails here."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from sputnik.__main__ import VERBS
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.stages import KINDS, kind_of
from sputnik.tasks.base import Problem, Task, Verdict, attacks, best_constant, judge, load_task
from sputnik.tasks.gym import REFUSED
from sputnik.text.sources import SOURCES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TASKS, RECIPES, TEXT, CHECKPOINTS = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("tasks", "recipes", "text", "checkpoints")
)
CHEAP = ("arithmetic", "ladder", "my_task", "gcd", "basic_arithmetic", "leg_counting", "letter_counting")


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    part = page.split(f"\n## {heading}\n", 1)[1]
    rows = re.search(r"\|[-|]+\|\n((?:\|.*\n)+)", part)
    assert rows is not None, heading
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows[1].splitlines()]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_flags_in_the_docs_exist() -> None:
    commands = [
        command for page in PAGES for command in re.findall(r"sputnik ([a-z-]+ [^`\n]*--[^`\n]*)", page.read_text())
    ]
    assert len(commands) >= 5
    for command in commands:
        verb = command.split()[0]
        module, _, config = VERBS[verb][0].partition(":")
        found = getattr(importlib.import_module(module), config)  # of a verb of several: all of theirs
        known = {field.name for kind in get_args(found) or (found,) for field in dataclasses.fields(kind)}
        assert {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", command)} <= known, command


# --- recipes.md ---


def test_the_recipe_of_the_docs_can_be_run_and_its_kinds_are_all_there_are(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(blocks(RECIPES, "toml")[0])
    recipe = read_recipe(tmp_path / "mine.toml", kind_of, ["base.lr=1e-3", "model.hidden_size=192"])
    assert (recipe.name, [(stage.name, stage.parent) for stage in recipe.stages]) == (
        "mine", [("corpus", None), ("base", "corpus")],
    )  # fmt: skip
    rows = re.findall(r"^\| `([\w-]+)` \| .*\| `(\w+)` in `([\w/.]+)` \|$", RECIPES, re.MULTILINE)
    documented = {kind: (config, file) for kind, config, file in rows}
    assert documented == {
        name: (kind.config.__name__, str(Path(inspect.getfile(kind.config)).relative_to(ROOT)))
        for name, kind in KINDS.items()
    }


def test_settings_that_change_no_result_are_not_in_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text((ROOT / "recipes" / "quickstart.toml").read_text())

    def hashes(*changes: str) -> list[str]:
        return [stage.hash for stage in read_recipe(path, kind_of, changes).stages]

    assert hashes("base.save_seconds=7", "zero.save_seconds=7") == hashes()
    assert hashes("zero.lr=7") != hashes()


# --- tasks.md ---


def test_verdicts_and_attacks_of_the_docs_are_those_of_the_code() -> None:
    assert [row[0].strip("`") for row in table(TASKS, "Verdicts")] == list(Verdict.__members__)
    paid = [row[2].split()[0] for row in table(TASKS, "Verdicts")]
    assert paid == ["1", "0", "0", "0", "0", "leaves", "leaves"]
    named = {name for row in table(TASKS, "Self-check") for name in quoted(row[0])}
    assert named == {name for name, _ in attacks(Problem(prompt="?", gold="5"), "6", ["5", "6"])}


def test_what_the_docs_say_one_may_override_exists() -> None:
    rows = table(TASKS, "Your own task in one file")
    for name in (quoted(row[0])[0] for row in rows):
        method = re.match(r"(\w+)\((.*)\)", name)
        if method is None:
            assert name in vars(Task), name
        else:
            signature = inspect.signature(getattr(Task, method[1]))
            assert [p for p in signature.parameters if p != "self"] == method[2].split(", "), name


def test_refused_families_are_listed() -> None:
    assert {name for row in table(TASKS, "reasoning-gym") for name in quoted(row[0])} == {name for name, _ in REFUSED}


@pytest.mark.parametrize(
    "row", [row for row in table(TASKS, "Shipped tasks") if any(n in row[0] for n in CHEAP)], ids=lambda row: row[0]
)
def test_best_constants_are_those_of_the_table(row: list[str]) -> None:
    spec, *rest = quoted(row[0])
    gym = spec.startswith("gym")
    if gym:
        pytest.importorskip("reasoning_gym")
    options = {"operators": "+-*"} if rest else {}
    task = load_task(str(ROOT / spec) if spec.endswith(".py") else spec, options)
    problems = task.problems("test", 200 if gym else 500)
    found = best_constant(problems, lambda items: [judge(task, problem, answer) for problem, answer in items])
    assert found.accuracy == pytest.approx(float(row[2]), abs=5e-4)
    assert row[1] in ("none", f"`{found.answer}`")


def test_demonstrations_have_the_quality_of_the_table() -> None:
    examples = load_task("arithmetic").demonstrations(20_000, 0)
    rows = table(TASKS, "Demonstrations of arithmetic")
    for style, share, right in rows:
        mine = [example for example in examples if example.style == style or style == "all together"]
        assert round(100 * len(mine) / len(examples)) == int(share.split()[0]), style
        assert round(100 * sum(example.correct for example in mine) / len(mine)) == int(right.split()[0]), style
    assert {row[0] for row in rows} == {example.style for example in examples} | {"all together"}


def test_the_pool_example_of_the_docs_runs() -> None:
    (code,) = [block for block in blocks(TASKS, "python") if "VerifierPool" in block]
    names: dict[str, object] = {}
    exec(code, names)
    assert len(names["judgements"]) == 100  # type: ignore[arg-type]


# --- text.md, checkpoints.md ---


def test_sources_of_the_docs_are_those_of_the_code_with_their_licences() -> None:
    listed = {name: row[2] for row in table(TEXT, "Sources") for name in quoted(row[0])}
    assert listed.keys() == {source.name for source in SOURCES}
    for source in SOURCES:
        stem = listed[source.name].split(",")[0]
        assert stem.casefold() in source.licence.casefold(), (source.name, source.licence)


def test_the_checkpoint_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    save_model(Transformer(ModelConfig.preset("tiny")).init_weights(generator), tmp_path / "checkpoints/r1-distill")

    class Words:
        def save(self, directory: Path) -> None:
            (directory / "tokenizer.json").write_text("{}")

    exec(blocks(CHECKPOINTS, "python")[0], {"tokenizer": Words()})
    assert load_model("checkpoints/mine-bf16").config == load_model("checkpoints/mine").config
    assert (tmp_path / "checkpoints/mine-bf16/tokenizer.json").exists()
