"""Measuring stages: guesses change speed and no text; what nobody can read is counted by its reason."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sputnik.errors import ConfigError
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.runner import run_recipe
from sputnik.recipe.stages import kind_of

RECIPE = """
[model]
preset = "tiny"
hidden_size = 64
num_hidden_layers = 2
max_position_embeddings = 128
[[stage]]
name = "corpus"
kind = "corpus"
texts = ["python-topics"]
tokens = 60_000
vocab_size = 500
task = "arithmetic"
task_options = { terms = [2, 3] }
examples = 300
example_share = 0.9
[[stage]]
name = "base"
kind = "pretrain"
tokens = 30_000
length = 64
batch = 16
lr = 5e-3
held_out_rows = 4
[[stage]]
name = "base-speed"
kind = "speed"
task_options = { terms = [2, 3] }
questions = 4
rounds = 2
max_tokens = 24
"""


def run(folder: Path, text: str, *overrides: str) -> Path:
    (folder / "small.toml").write_text(text)
    recipe = read_recipe(folder / "small.toml", kind_of, overrides)
    return run_recipe(recipe, folder / "runs", kind_of, Console(file=io.StringIO()))


def result(run: Path, stage: str) -> dict[str, Any]:
    records = json.loads((run / "lineage.json").read_text())["stages"]
    return next(record["result"] for record in records if record["name"] == stage)


def test_guesses_are_accepted_and_change_no_text(tmp_path: Path) -> None:
    found = result(run(tmp_path, RECIPE), "base-speed")
    assert 0.1 < found["acceptance"] < 1 and found["equal_answers"] == 1
    assert found["speed_up"] == pytest.approx(found["tokens_per_s"] / found["plain_tokens_per_s"])
    assert len(json.loads((tmp_path / "runs/small/base-speed/speed.json").read_text())["rounds"]["plain"]) == 2


def test_a_model_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no MTP modules to guess with"):
        run(tmp_path, RECIPE, "model.num_nextn_predict_layers=0", "base.tokens=2000")


THOUGHTS = ["First, 7+5=12.", "先 7+5=12, 再加 3", "Wait, no, it is 12. " * 40, "7+5=12", "First 7 加 5"]


def test_readable_thoughts_and_their_language_are_counted(tmp_path: Path) -> None:
    class Context:
        parent, directory = tmp_path / "eval", tmp_path / "out"

    Context.parent.mkdir()
    Context.directory.mkdir()
    lines = [{"thinking": text, "finish": "stop"} for text in THOUGHTS] + [{"thinking": "x", "finish": "length"}]
    (Context.parent / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kind = kind_of("readability")
    found = kind.run(kind.config(), Context())
    assert found["thoughts"] == 5 and found["readable"] == pytest.approx(2 / 5)
    assert found["language"] == pytest.approx((1 + 0 + 1 + 1 + 0.5) / 5)
    reasons = json.loads((tmp_path / "out/readability.json").read_text())["reasons"]
    assert reasons == {"language": 2, "repetition": 1}
    loose = kind.run(kind.config(language="zh", readable={"language_share": 0.0, "repeats": 1.0}), Context())
    assert loose["readable"] == 1


def test_there_must_be_answers_to_read(tmp_path: Path) -> None:
    text = RECIPE.replace('kind = "speed"', 'kind = "readability"').split(
        "task_options = { terms = [2, 3] }\nquestions"
    )[0]
    with pytest.raises(ConfigError, match="needs an eval stage as its parent"):
        run(tmp_path, text, "base.tokens=2000")
