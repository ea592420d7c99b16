"""What a killed, copied or damaged run directory costs: never a second bill, never a finished stage."""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sputnik.errors import DataError
from sputnik.recipe.recipe import Kind, read_recipe
from sputnik.recipe.runner import StageContext, run_recipe

RECIPE = """
name = "two"
[[stage]]
name = "data"
kind = "write"
[[stage]]
name = "base"
kind = "write"
"""


@dataclass(frozen=True)
class WriteConfig:
    size: int = 1


def write(config: WriteConfig, context: StageContext) -> dict[str, Any]:
    (context.directory / "log.txt").write_text("x" * config.size)
    return {}


def run(folder: Path, *overrides: str, **options: Any) -> None:
    kinds = {"write": Kind(WriteConfig, write, resumable=True, makes=("log.txt",))}
    path = folder / "recipe.toml"
    path.write_text(RECIPE)
    recipe = read_recipe(path, kinds.__getitem__, overrides)
    run_recipe(recipe, folder / "runs", kinds.__getitem__, Console(quiet=True), **options)


def records(folder: Path) -> dict[str, Any]:
    stages = json.loads((folder / "runs/two/lineage.json").read_text())["stages"]
    return {record["name"]: record for record in stages}


def attempts(folder: Path, stage: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "runs/two/ledger.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == stage]


def mark_running(folder: Path, stage: str, **changes: Any) -> None:
    """As if its process had been killed before the lineage said how the stage ended."""
    path = folder / "runs/two/lineage.json"
    lineage = json.loads(path.read_text())
    for record in lineage["stages"]:
        if record["name"] == stage:
            record |= {"status": "running", "seconds": 0.0, **changes}
    path.write_text(json.dumps(lineage))


def test_an_attempt_killed_after_it_was_booked_is_booked_once(tmp_path: Path) -> None:
    run(tmp_path)
    mark_running(tmp_path, "base")
    run(tmp_path)
    lines = attempts(tmp_path, "base")
    assert [line["outcome"] for line in lines] == ["done", "done"]
    assert records(tmp_path)["base"]["seconds"] == sum(line["seconds"] for line in lines)


def test_a_copy_of_a_killed_run_is_not_billed_for_the_days_between(tmp_path: Path) -> None:
    run(tmp_path)
    mark_running(tmp_path, "base", began=time.time() - 86_400)  # all files are as young as a copy
    run(tmp_path, only="data")
    assert [line["outcome"] for line in attempts(tmp_path, "base")] == ["done", "killed"]
    assert attempts(tmp_path, "base")[-1]["seconds"] < 60
    assert records(tmp_path)["base"]["status"] == "stopped"


def test_a_killed_attempt_that_is_thrown_away_is_booked_before(tmp_path: Path) -> None:
    run(tmp_path)
    mark_running(tmp_path, "base", began=time.time() - 10)
    run(tmp_path, "base.size=2", fresh="base")
    assert [line["outcome"] for line in attempts(tmp_path, "base")] == ["done", "killed", "done"]


def test_stages_without_their_lineage_are_left_alone(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "runs/two/lineage.json").unlink()
    with pytest.raises(DataError, match="holds stage 'data', but no lineage.json to know it by: put that back"):
        run(tmp_path)
    assert (tmp_path / "runs/two/base/log.txt").exists()


def test_drafts_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    run(tmp_path)
    mark_running(tmp_path, "base")
    dead = subprocess.Popen(["true"])
    dead.wait()
    folder = tmp_path / "runs/two"
    drafts = [folder / f".lineage.json.{dead.pid}", folder / f"base/.eval.json.{dead.pid}"]
    others = [folder / f".report.html.{os.getpid()}", folder / f".notes.old.{dead.pid}"]
    for path in (*drafts, *others):
        path.touch()
    run(tmp_path)
    assert not any(path.exists() for path in drafts) and all(path.exists() for path in others)


def test_a_finished_stage_that_has_lost_what_others_read_is_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "runs/two/data/log.txt").unlink()
    run(tmp_path)
    assert (tmp_path / "runs/two/data/log.txt").exists()
    assert (len(attempts(tmp_path, "data")), len(attempts(tmp_path, "base"))) == (2, 1)


def test_a_damaged_ledger_is_told_before_anything_runs(tmp_path: Path) -> None:
    run(tmp_path, only="data")
    path = tmp_path / "runs/two/ledger.jsonl"
    path.write_bytes(b"\0\0\0\n" + path.read_bytes())
    with pytest.raises(DataError, match="ledger.jsonl:1: not valid JSON"):
        run(tmp_path)
    assert list(records(tmp_path)) == ["data"]
