"""Every stage of R1 on a task of seconds, through the command line; and the same, killed again and again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.stages import kind_of

HERE = Path(__file__).parent
RECIPE = HERE / "r1_small.toml"
SHIPPED = HERE.parents[1] / "recipes/r1.toml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
COMMAND = [sys.executable, "-m", "sputnik", "run", str(RECIPE)]
MODELS = ("base", "middle", "zero", "dev1", "dev2", "dev3", "helpful", "safe", "r1", "student", "distilled")


def begin(folder: Path) -> Path:
    shutil.copy(HERE / "colours.py", folder)
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    stages = folder / "runs/r1-small"
    return {stage: (stages / stage / "checkpoint/model.safetensors").read_bytes() for stage in MODELS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = begin(tmp_path_factory.mktemp("r1"))
    done = subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_small_recipe_has_every_kind_of_stage_of_the_shipped_one_in_its_order() -> None:
    small, shipped = ([s for s in read_recipe(p, kind_of).stages if s.kind != "eval"] for p in (RECIPE, SHIPPED))
    assert [(s.name, s.kind, s.parent) for s in small] == [
        (s.name, s.kind, s.parent) for s in shipped if s.name != "student-rl"
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_is_made_from_those_it_names(whole: Path) -> None:
    run = whole / "runs/r1-small"
    records = {each["name"]: each for each in json.loads((run / "lineage.json").read_text())["stages"]}
    assert {each["status"] for each in records.values()} == {"done"}
    assert records["r1"]["inputs"] == ["helpful", "safe", "general"] and records["r1"]["parent"] == "dev3"
    kept = [json.loads(line) for line in (run / "cold/data.jsonl").read_text().splitlines()]
    assert kept and all(each["answer"].startswith("The answer is ") for each in kept)
    last = [json.loads(line) for line in (run / "r1/metrics.jsonl").read_text().splitlines()][-1]
    assert {"general_helpful", "general_safe", "language_reward"} <= set(last)
    assert (run / "r1-eval/scaling.json").is_file() and (run / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_anywhere_all_models_come_out_the_same(whole: Path, tmp_path: Path, seed: int) -> None:
    rng, folder = random.Random(seed), begin(tmp_path)
    for _ in range(8):
        process = subprocess.Popen(
            COMMAND, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        time.sleep(rng.uniform(4, 16))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    assert weights(folder) == weights(whole)
