"""Stages that read several others, make models of their own shape, and tasks described once for all of them."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sputnik.errors import ConfigError
from sputnik.recipe.recipe import Kind, read_recipe
from sputnik.recipe.runner import StageContext, run_recipe
from sputnik.recipe.stages import kind_of
from tests.recipe.test_runner import KINDS, RECIPE, OnceConfig, StepsConfig, once, read, records, steps

BRANCHES = (
    RECIPE
    + """
[[stage]]
name = "apart"
kind = "alone"
[[stage]]
name = "student"
kind = "steps"
parent = "data"
inputs = ["after", "apart"]
model = { preset = "tiny", hidden_size = 96 }
"""
)


def test_a_stage_reads_its_inputs_and_follows_its_own_model(tmp_path: Path) -> None:
    seen = dict[str, Any]()

    def look(config: StepsConfig, context: StageContext) -> dict[str, Any]:
        seen[context.directory.name] = context
        return steps(config, context)

    kinds = KINDS | {"steps": Kind(StepsConfig, look, True, True), "alone": Kind(OnceConfig, once, stands_alone=True)}
    path = tmp_path / "recipe.toml"
    path.write_text(BRANCHES)
    recipe = read_recipe(path, kinds.__getitem__)
    run_recipe(recipe, tmp_path / "runs", kinds.__getitem__, Console(file=io.StringIO()))
    student = seen["student"]
    assert student.inputs == {"after": student.run / "after", "apart": student.run / "apart"}
    assert student.parent == student.run / "data" and student.model == {"preset": "tiny", "hidden_size": 96}
    assert seen["base"].model == {"preset": "tiny", "hidden_size": 64} and seen["base"].inputs == {}
    assert recipe.stage("apart").parent is None
    assert [stage.name for stage in recipe.below("student")] == ["data", "base", "after", "apart"]
    path.write_text(recipe.to_toml())
    assert [stage.hash for stage in read_recipe(path, kinds.__getitem__).stages] == [s.hash for s in recipe.stages]


NAMED = """
[tasks.easy]
task = "sums"
[[stage]]
name = "data"
kind = "once"
task = "easy"
[[stage]]
name = "plain"
kind = "once"
parent = ""
task = "sums"
"""


def test_a_task_described_once_is_known_by_its_name(tmp_path: Path) -> None:
    recipe = read(tmp_path, NAMED)
    assert recipe.stage("data").config.task == "sums" and recipe.stage("data").hash == recipe.stage("plain").hash
    changed = read(tmp_path, NAMED, "tasks.easy.task=none", "plain.size=2")
    assert changed.stage("data").config.task == "none" and changed.stage("plain").config.task == "sums"
    for mistake, message in (
        (NAMED.replace('task = "sums"\n[[stage]]', 'tsak = "sums"\n[[stage]]', 1), "did you mean 'task'?"),
        (NAMED.replace('task = "sums"\n[[stage]]', "[[stage]]", 1), "tasks.easy has no task"),
        (NAMED.replace("[tasks.easy]", "[tasks]"), "tasks a table of tables"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            read(tmp_path, mistake)


def test_a_stage_can_change_one_option_of_a_task_described_once() -> None:
    path = Path(__file__).parents[2] / "recipes/r1.toml"
    recipe = read_recipe(path, kind_of, ["dev1-eval.task_options.reworded=0.4"])
    changed, plain = (recipe.stage(name).config.task_options for name in ("dev1-eval", "zero-eval"))
    assert changed == {**plain, "reworded": 0.4} and "reworded" not in plain and len(plain["families"]) > 5


def test_what_a_stage_reads_is_part_of_its_lineage(tmp_path: Path) -> None:
    kinds = KINDS | {"alone": Kind(OnceConfig, once, stands_alone=True)}
    path = tmp_path / "recipe.toml"
    path.write_text(BRANCHES)

    def go(*overrides: str, **options: Any) -> None:
        recipe = read_recipe(path, kinds.__getitem__, overrides)
        run_recipe(recipe, tmp_path / "runs", kinds.__getitem__, Console(file=io.StringIO()), **options)

    with pytest.raises(ConfigError, match="it needs 'data', which is not finished"):
        go(only="student")
    go()
    before = records(tmp_path)
    with pytest.raises(ConfigError, match=r"--fresh apart \(discards apart, student\)"):
        go("apart.size=2")
    go("apart.size=2", fresh="apart")
    after = records(tmp_path)
    changed = {name for name in after if after[name]["hash"] != before[name]["hash"]}
    assert changed == {"apart", "student"}
