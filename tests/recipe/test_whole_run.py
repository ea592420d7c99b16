"""A whole run through the command line: corpus, base model, scores, R1-Zero, scores, report; and the same, killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).parent / "small.toml"
pytestmark = pytest.mark.timeout(900)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def sputnik(folder: Path, *args: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sputnik", *args]
    return subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)


def weights(folder: Path, stage: str) -> bytes:
    return (folder / "runs/small" / stage / "checkpoint/model.safetensors").read_bytes()


def losses(folder: Path, stage: str) -> list[Any]:
    lines = (folder / "runs/small" / stage / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record.get("loss")) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = sputnik(folder, "run", str(RECIPE))
    assert done.returncode == 0, done.stderr
    assert "ledger of runs/small" in done.stdout
    return folder


def test_the_report_has_its_headline(whole: Path) -> None:
    report = json.loads((whole / "runs/small/report.json").read_text())
    headline = report["headline"]
    for key in ("base_pass_at_1", "zero_pass_at_1"):
        assert set(headline[key]) >= {"mean", "low", "high", "n", "k"}
        assert (headline[key]["n"], headline[key]["k"]) == (8, 2)
    stages = json.loads((whole / "runs/small/lineage.json").read_text())["stages"]
    assert headline["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages))
    assert headline["price_usd"] == pytest.approx(sum(stage["usd"] for stage in stages))
    assert report["status"] == "complete", report["missing"]


CARD = 'title = "Small"\nsummary = "A model of sums."\ncannot = ["It does no more than sums."]\n'


def test_a_released_model_has_the_scores_that_stand_on_its_card(whole: Path) -> None:
    (whole / "card.toml").write_text(CARD)
    command = ["release", "runs/small", "out", "--words", "card.toml"]
    too_large = sputnik(whole, *command, "--most-mb", "0.1")
    assert too_large.returncode == 2 and "MB of weights, and 0.1 MB are allowed" in too_large.stderr
    assert not (whole / "out").exists()
    done = sputnik(whole, *command)
    assert done.returncode == 0, done.stderr
    card = json.loads((whole / "out/card.json").read_text())
    settings = ["--questions", "8", "--samples", "2", "--max-tokens", "32"]
    again = sputnik(
        whole, "eval", "out", "--task", "arithmetic", "--option", "terms=[2,3]", *settings, "--out", "score.json"
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((whole / "score.json").read_text())["pass_at_1"] == card["score"]["pass_at_1"]
    assert [stage["name"] for stage in card["stages"]] == ["corpus", "base", "base-eval", "zero", "zero-eval"]
    text = (whole / "out/README.md").read_text()
    assert "- It does no more than sums." in text and "Python Software Foundation" in text
    foreign = sputnik(whole, "release", "runs/small", "runs", "--words", "card.toml")
    assert foreign.returncode == 2 and "is there and no released model" in foreign.stderr


def test_running_again_changes_nothing(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "runs/small").glob("*/**/*") if path.is_file()}
    done = sputnik(whole, "run", str(RECIPE))
    assert done.stdout.count("finished before, unchanged") == 5
    assert before == {path: path.stat().st_mtime_ns for path in (whole / "runs/small").glob("*/**/*") if path.is_file()}


def test_one_can_talk_to_the_run_and_score_it(whole: Path) -> None:
    chat = sputnik(whole, "chat", "small", "--max-tokens", "40", text="What is 1 + 2?\n")
    assert chat.returncode == 0 and len(chat.stdout.splitlines()) == 1 and "tokens/s" in chat.stderr
    score = sputnik(
        whole, "eval", "runs/small", "--task", "arithmetic", "--questions", "4", "--samples", "1", "--max-tokens", "16"
    )
    assert score.returncode == 0 and "best constant answer" in score.stdout, score.stderr


def test_a_reader_who_goes_away_ends_chat_scores_and_report_quietly(whole: Path) -> None:
    scores = ("eval", "small", "--task", "arithmetic", "--questions", "1", "--samples", "1", "--max-tokens", "4")
    for args in (("chat", "small", "--max-tokens", "4"), scores, ("report", "runs/small")):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "sputnik", *args]
        done = subprocess.run(
            command, cwd=whole, input="1+2?\n", stdout=writer, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        os.close(writer)
        assert done.returncode == 141 and "Error" not in done.stderr, (args, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_anywhere_it_ends_with_the_same_weights(whole: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    command = [sys.executable, "-m", "sputnik", "run", str(RECIPE)]
    for _ in range(6):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        time.sleep(rng.uniform(3, 15))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = sputnik(tmp_path, "run", str(RECIPE))
    assert done.returncode == 0, done.stderr
    for stage in ("base", "zero"):
        assert losses(tmp_path, stage) == losses(whole, stage)
        assert weights(tmp_path, stage) == weights(whole, stage)
