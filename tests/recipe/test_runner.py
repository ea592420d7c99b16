"""Stages in order, each once: skip, continue, refuse, nothing half-written. The stages here write two small files."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import sputnik
from sputnik.errors import ConfigError, DataError
from sputnik.recipe.lineage import Spent, changed_keys, sources
from sputnik.recipe.recipe import Kind, Recipe, read_recipe
from sputnik.recipe.runner import StageContext, run_recipe

RECIPE = """
name = "two"
seed = 3
[model]
preset = "tiny"
hidden_size = 64
[[stage]]
name = "data"
kind = "once"
size = 4
[[stage]]
name = "base"
kind = "steps"
steps = 5
[[stage]]
name = "after"
kind = "steps"
steps = 2
"""


@dataclass(frozen=True)
class OnceConfig:
    size: int = 1
    seed: int = 0
    task: str = "none"
    fail: bool = False
    texts: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class StepsConfig:
    steps: int = 3
    stop_at: int = -1


def once(config: OnceConfig, context: StageContext) -> dict[str, Any]:
    (context.directory / "data.txt").write_text("x" * config.size)
    if config.fail:
        raise DataError("the text is not UTF-8: convert it")
    return {"size": config.size}


def steps(config: StepsConfig, context: StageContext) -> dict[str, Any]:
    """Counts to `steps`, one line per step, from wherever the last attempt stopped."""
    assert context.parent is not None and context.parent.is_dir()
    log = context.directory / "log.txt"
    done = len(log.read_text().splitlines()) if log.exists() else 0
    for step in range(done, config.steps):
        if step == config.stop_at and not (context.run / "go").exists():
            raise KeyboardInterrupt
        with log.open("a") as file:
            file.write(f"{step}\n")
    return {"steps": config.steps}


KINDS = {"once": Kind(OnceConfig, once), "steps": Kind(StepsConfig, steps, resumable=True, needs_model=True)}


def read(folder: Path, text: str = RECIPE, *overrides: str, name: str | None = None) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text)
    return read_recipe(path, KINDS.__getitem__, overrides, name)


def run(folder: Path, recipe: Recipe, **options: Any) -> str:
    """Run it and return what the user saw."""
    seen = io.StringIO()
    run_recipe(recipe, folder / "runs", KINDS.__getitem__, Console(file=seen, width=200), **options)
    return seen.getvalue()


def records(folder: Path, name: str = "two") -> dict[str, Any]:
    stages = json.loads((folder / "runs" / name / "lineage.json").read_text())["stages"]
    return {record["name"]: record for record in stages}


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/two/ledger.jsonl").read_text().splitlines()]


def test_all_stages_run_in_order_and_leave_their_lineage(tmp_path: Path) -> None:
    run(tmp_path, read(tmp_path))
    found = records(tmp_path)
    assert list(found) == ["data", "base", "after"]
    assert {record["status"] for record in found.values()} == {"done"}
    assert [record["parent"] for record in found.values()] == [None, "data", "base"]
    assert found["data"]["settings"] == {"size": 4, "seed": 3, "task": "none", "fail": False, "texts": ["a"]}
    assert found["base"]["settings"]["model.hidden_size"] == 64
    assert found["base"]["result"] == {"steps": 5}
    assert found["base"]["seconds"] >= 0 and found["base"]["usd"] >= 0 and found["base"]["code"]


def test_finished_stages_are_skipped(tmp_path: Path) -> None:
    run(tmp_path, read(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.txt")}
    assert run(tmp_path, read(tmp_path)).count("finished before, unchanged") == 3
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.txt")}


def test_the_written_recipe_runs_to_the_same_hashes(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    run(tmp_path, recipe)
    again = read_recipe(tmp_path / "runs/two/recipe.toml", KINDS.__getitem__)
    assert [stage.hash for stage in again.stages] == [stage.hash for stage in recipe.stages]


def test_a_stopped_stage_continues_and_its_time_adds_up(tmp_path: Path) -> None:
    recipe = read(tmp_path, RECIPE, "base.stop_at=3")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, recipe)
    assert records(tmp_path)["base"]["status"] == "stopped"
    assert "after" not in records(tmp_path)
    (tmp_path / "runs/two/go").touch()
    assert "base (steps): continuing" in run(tmp_path, recipe)
    assert (tmp_path / "runs/two/base/log.txt").read_text().split() == ["0", "1", "2", "3", "4"]
    base = [line for line in ledger(tmp_path) if line["stage"] == "base"]
    assert [line["outcome"] for line in base] == ["stopped", "done"]
    assert records(tmp_path)["base"]["seconds"] == sum(line["seconds"] for line in base) > 0


def test_changed_settings_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, read(tmp_path))
    with pytest.raises(
        ConfigError, match=r"stage 'base' .*steps 5 -> 6.*--fresh base \(discards base, after\).*--name"
    ):
        run(tmp_path, read(tmp_path, RECIPE, "base.steps=6"))
    with pytest.raises(ConfigError, match="stage 'data' was made with other settings: size 4 -> 5. Make"):
        run(tmp_path, read(tmp_path, RECIPE, "data.size=5"))
    with pytest.raises(ConfigError, match="model.hidden_size 64 -> 96"):
        run(tmp_path, read(tmp_path, RECIPE, "model.hidden_size=96"))
    with pytest.raises(ConfigError, match="seed 3 -> 4"):
        run(tmp_path, read(tmp_path, RECIPE, "seed=4"))
    assert (tmp_path / "runs/two/base/log.txt").read_text().split() == ["0", "1", "2", "3", "4"]


def test_runs_of_an_earlier_version_go_on(tmp_path: Path) -> None:
    """Since they were made, `near` went from a kind of stage and `words` came."""
    before = {"once": Kind(make_dataclass("Before", [("size", int, 1), ("near", float, 0.9)]), once)}
    now = Kind(
        make_dataclass("Now", [("size", int, 1), ("words", int, 0)]), once, added={"words": 0}, gone={"near": 0.9}
    )
    path = tmp_path / "recipe.toml"
    path.write_text('name = "two"\n[[stage]]\nname = "data"\nkind = "once"\nsize = 4\n')

    def hash_of(kinds: dict[str, Kind], *overrides: str) -> str:
        return read_recipe(path, kinds.__getitem__, overrides).stage("data").hash

    assert hash_of(before) == hash_of({"once": now}) != hash_of({"once": now}, "data.words=1")
    assert hash_of(before, "data.near=0.5") != hash_of({"once": now})


def test_of_a_nested_setting_only_what_changed_is_told() -> None:
    before = {"seed": 0, "task_options": {"families": [{"task": "a", "weight": 1}, {"task": "b"}]}}
    after = {"seed": 0, "task_options": {"families": [{"task": "a", "weight": 2}], "reworded": 0.4}}
    assert changed_keys(before, after) == [
        "task_options.families[0].weight 1 -> 2",
        "task_options.families[1] {'task': 'b'} -> absent",
        "task_options.reworded absent -> 0.4",
    ]


def test_another_name_keeps_both(tmp_path: Path) -> None:
    run(tmp_path, read(tmp_path))
    run(tmp_path, read(tmp_path, RECIPE, "base.steps=6", name="other"))
    assert records(tmp_path)["base"]["result"] == {"steps": 5}
    assert records(tmp_path, "other")["base"]["result"] == {"steps": 6}


def test_fresh_discards_the_stage_and_what_stands_on_it(tmp_path: Path) -> None:
    run(tmp_path, read(tmp_path))
    changed = read(tmp_path, RECIPE, "base.steps=6")
    assert run(tmp_path, changed, fresh="base").count("finished before") == 1
    assert records(tmp_path)["base"]["result"] == {"steps": 6}
    assert (tmp_path / "runs/two/after/log.txt").exists()
    with pytest.raises(ConfigError, match="no such stage; it holds data, base, after"):
        run(tmp_path, changed, fresh="bsae")


def test_the_ledger_adds_up_with_what_was_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sputnik.recipe.runner._price", lambda seconds, recipe: Spent(100.0, 0.25))
    assert "thrown away" not in run(tmp_path, read(tmp_path))
    table = run(tmp_path, read(tmp_path, RECIPE, "base.steps=6"), fresh="base")
    figures = re.findall(r"│ (thrown away|total) .*? ([0-9.]+) │\n", table.partition("ledger of")[2])
    assert figures == [("thrown away", "0.5000"), ("total", "1.2500")]
    assert math.fsum(line["usd"] for line in ledger(tmp_path)) == 1.25


def test_fresh_deletes_nothing_if_the_run_is_refused_anyway(tmp_path: Path) -> None:
    run(tmp_path, read(tmp_path))
    with pytest.raises(ConfigError, match="stage 'data' .*size 4 -> 5"):
        run(tmp_path, read(tmp_path, RECIPE, "data.size=5"), fresh="base")
    assert list(records(tmp_path)) == ["data", "base", "after"]
    assert (tmp_path / "runs/two/base/log.txt").exists()


def test_a_changed_task_file_is_another_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_task.py").write_text("first")
    run(tmp_path, read(tmp_path, RECIPE, "data.task=my_task.py:Mine"))
    Path("my_task.py").write_text("second")
    with pytest.raises(ConfigError, match="file my_task.py"):
        run(tmp_path, read(tmp_path, RECIPE, "data.task=my_task.py:Mine"))


@pytest.mark.parametrize("texts", ["notes", "notes/*.md"])
def test_a_changed_text_is_another_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    Path("notes/a.md").write_text("first")
    before = read(tmp_path, RECIPE, f'data.texts=["{texts}", "wiki-en"]').stage("data")
    assert [key for key in before.settings if key.startswith("file ")] == [f"file {texts}"]
    Path("notes/b.md").write_text("second")
    after = read(tmp_path, RECIPE, f'data.texts=["{texts}", "wiki-en"]').stage("data")
    assert after.hash != before.hash and after.settings[f"file {texts}"] != before.settings[f"file {texts}"]


def test_the_version_of_the_code_is_that_of_kernels_and_wordings_too() -> None:
    names = {path.name for path in sources(Path(sputnik.__file__).parent)}
    assert names >= {"runner.py", "train.cpp", "general_en.toml", "chat.jinja"} and "model.safetensors" not in names


def test_a_setting_may_be_longer_than_the_name_of_a_file(tmp_path: Path) -> None:
    assert read(tmp_path, RECIPE, f'data.task="{"Think first. Then answer. " * 15}"').stage("data").settings["task"]


def test_a_stage_the_recipe_no_longer_has_is_refused(tmp_path: Path) -> None:
    run(tmp_path, read(tmp_path))
    with pytest.raises(ConfigError, match="holds stage 'after', which this recipe does not have"):
        run(tmp_path, read(tmp_path, RECIPE[: RECIPE.rindex("[[stage]]")]))


def test_only_runs_one_stage_and_needs_its_parents(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it needs 'data', which is not finished"):
        run(tmp_path, read(tmp_path), only="base")
    assert not (tmp_path / "runs/two").exists()
    run(tmp_path, read(tmp_path), only="data")
    run(tmp_path, read(tmp_path), only="base")
    assert list(records(tmp_path)) == ["data", "base"]
    with pytest.raises(ConfigError, match="no stage 'bass'; it has data, base, after"):
        run(tmp_path, read(tmp_path), only="bass")


def test_unknown_hardware_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no hardware 'H8000'; choose one of cpu, H800"):
        run(tmp_path, read(tmp_path, RECIPE, "hardware=H8000"))
    assert not (tmp_path / "runs").exists()


def test_a_failing_first_stage_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not UTF-8"):
        run(tmp_path, read(tmp_path, RECIPE, "data.fail=true"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_failing_later_stage_leaves_the_earlier_ones(tmp_path: Path) -> None:
    text = RECIPE.replace('name = "after"\nkind = "steps"\nsteps = 2', 'name = "after"\nkind = "once"\nfail = true')
    with pytest.raises(DataError, match="not UTF-8"):
        run(tmp_path, read(tmp_path, text))
    assert list(records(tmp_path)) == ["data", "base"]
    assert not (tmp_path / "runs/two/after").exists()
    assert [line["outcome"] for line in ledger(tmp_path)] == ["done", "done", "failed"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["base.stpes=3"], "stage 'base': unknown key 'stpes'; did you mean 'steps'?"),
        (["bose.steps=3"], "unknown key 'bose'; did you mean 'base'?"),
        (["base.steps=many"], "stage 'base': steps = 'many'"),
        (["base.parent=after"], "stage 'base': 'after' does not stand above it"),
        (['base.inputs=["after"]'], "stage 'base': 'after' does not stand above it"),
        (["base.inputs=[['data']]"], "stage 'base': ['data'] does not stand above it"),
        (["base.inputs=data"], "inputs must be a list of stage names"),
        (["base.inputs=['data', 'data']"], "inputs must be a list of stage names, each of them once"),
        (["data.model={preset = 'tiny'}"], "a stage of kind once makes no model of its own"),
        (["base.model={preset = 'tiny', hiden_size = 96}"], "stage 'base': model: unknown key 'hiden_size'"),
        (["base.steps"], "write table.key=value"),
        (["model.hiden_size=96"], "[model]: unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        (["model.hidden_size=wide"], "[model]: hidden_size = 'wide'"),
        (["model.preset=tiniest"], "unknown model preset 'tiniest'"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, RECIPE, *overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"', "no stages"),
        ('nmae = "x"\n' + RECIPE.split("\n", 2)[2], "did you mean 'name'?"),
        ('[[stage]]\nname = "x"\n', "stage 1 has no kind"),
        (RECIPE.replace('"after"', '"base"'), "must differ"),
        ("[[stage", "not valid TOML"),
        (RECIPE.replace('"two"', '"../two"'), "plain folder name"),
        *(
            (RECIPE.replace('"after"', f'"{name}"'), "letters, digits")
            for name in ("", ".", "..", "/tmp", "a/b", "a.json")
        ),
    ],
)
def test_broken_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        read(tmp_path, text)


def test_broken_lineage_is_one_line(tmp_path: Path) -> None:
    run(tmp_path, read(tmp_path))
    (tmp_path / "runs/two/lineage.json").write_text('{"stages": [{"name": 1}]}')
    with pytest.raises(DataError, match="lineage.json cannot be read"):
        run(tmp_path, read(tmp_path))


KILLED = """
import sys, time
from pathlib import Path
from rich.console import Console
sys.path.insert(0, sys.argv[1])
import test_runner as t
def slow(config, context):
    if not (context.directory / "begun").exists():
        (context.directory / "begun").touch()
        print("working", flush=True)
        time.sleep(60)
    return {}
t.KINDS["steps"] = t.Kind(t.StepsConfig, slow, resumable=True, needs_model=True)
t.run(Path(sys.argv[2]), t.read(Path(sys.argv[2])))
"""


def start_slow_run(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    return process


def test_one_process_per_run_and_kill_9_frees_it(tmp_path: Path) -> None:
    process = start_slow_run(tmp_path)
    with pytest.raises(DataError, match=rf"in use by process {process.pid}"):
        run(tmp_path, read(tmp_path, RECIPE))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert records(tmp_path)["base"]["status"] == "running"
    run(tmp_path, read(tmp_path), only="data")  # the lock died with its owner


def test_a_killed_attempt_is_booked(tmp_path: Path) -> None:
    process = start_slow_run(tmp_path)
    time.sleep(0.3)
    (tmp_path / "runs/two/base/log.txt").write_text("0\n")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    run(tmp_path, read(tmp_path))
    base = [line for line in ledger(tmp_path) if line["stage"] == "base"]
    assert [line["outcome"] for line in base] == ["killed", "done"]
    assert base[0]["seconds"] >= 0.25
