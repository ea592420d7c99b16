"""The plan of the published run gives its published time and money; presets, checkpoints, bad input are told apart."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sputnik.__main__ import main as sputnik
from sputnik.cli.plan import PlanConfig, parse_count, plan_model, plan_recipe, read_shape, stage_work
from sputnik.cost import parameters
from sputnik.errors import CheckpointError, ConfigError
from sputnik.model.config import ModelConfig
from sputnik.recipe.evaluation import EvalConfig
from sputnik.train.pretrain import PretrainConfig
from sputnik.train.rl import RLConfig

RECIPE = """
name = "small"
hardware = "H100"
[model]
preset = "tiny"
[[stage]]
name = "corpus"
kind = "corpus"
vocab_size = 1024
[[stage]]
name = "base"
kind = "pretrain"
tokens = 1_000_000
[[stage]]
name = "scores"
kind = "eval"
task = "arithmetic"
"""


def test_published_run_takes_its_published_time_and_money() -> None:
    training = plan_model(PlanConfig("v3-671b", hardware="2048xH800", tokens="14.8T", mfu=0.3894))["training"]
    assert training["device_hours"] == pytest.approx(2664e3, rel=0.005)
    assert training["usd"] == pytest.approx(5.328e6, rel=0.005)
    assert training["seconds"] / 86400 == pytest.approx(54.2, rel=0.005)


def test_v3_does_not_fit_one_node_and_fits_the_cluster() -> None:
    node = plan_model(PlanConfig("v3-671b", hardware="8xH800", recompute=True))
    cluster = plan_model(PlanConfig("v3-671b", hardware="2048xH800", recompute=True))
    assert not node["training_memory"]["fits"]
    assert cluster["training_memory"]["fits"]
    assert "training" not in node


def test_table_shows_the_headline_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert sputnik(["plan", "v3-671b", "--hardware", "8xH800", "--tokens", "1B"]) == 0
    shown = capsys.readouterr().out
    for figure in ("671", "37.6", "70,272 bytes", "does not fit", "--recompute", "250.5 G", "published"):
        assert figure in shown


def test_json_holds_the_same_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert sputnik(["plan", "tiny", "--hardware", "A100", "--tokens", "3M", "--usd-per-hour", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == plan_model(PlanConfig("tiny", hardware="A100", tokens="3M", usd_per_hour=1.0))
    assert plan["training"]["usd"] == plan["training"]["device_hours"]
    assert plan["training_memory"]["precision"] == "bf16"


def test_shape_is_read_from_preset_directory_and_file(checkpoint: Path) -> None:
    assert read_shape("tiny") == ModelConfig.preset("tiny")
    assert read_shape(str(checkpoint)) == read_shape(str(checkpoint / "config.json"))
    assert read_shape(str(checkpoint)).hidden_size == ModelConfig.preset("tiny").hidden_size


def test_a_gguf_file_is_planned_by_its_header(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert sputnik(["convert", str(checkpoint), str(file)]) == 0
    saved = replace(read_shape(str(checkpoint)), num_nextn_predict_layers=0)  # such a file has no prediction modules
    assert parameters(read_shape(str(file))) == parameters(saved)
    assert sputnik(["plan", str(file)]) == 0


def test_what_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="neither a preset"):
        read_shape("tinny")
    broken = tmp_path / "config.json"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_shape(str(broken))
    assert sputnik(["plan", "tiny", "--hardware", "8xH9000"]) == 2
    assert capsys.readouterr().err.startswith("error: no hardware 'H9000'")
    assert sputnik(["plan", "tiny", "--usd-per-hour", "nan"]) == 2
    assert "--usd-per-hour nan: a price in dollars" in capsys.readouterr().err


def test_counts_are_read_with_their_unit() -> None:
    assert [parse_count(text) for text in ("14.8T", "300m", "2e9", " 5K ", "17")] == [14.8e12, 3e8, 2e9, 5e3, 17]
    for wrong in ("", "T", "-3M", "0", "1.2.3B", "3 million", "1e400"):
        with pytest.raises(ConfigError, match="14.8T"):
            parse_count(wrong)


def test_recipe_is_planned_stage_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE, encoding="utf-8")
    plan = plan_recipe(PlanConfig(str(path)))
    assert [stage["stage"] for stage in plan["stages"]] == ["corpus", "base", "scores"]
    assert [stage["tokens"] for stage in plan["stages"]] == [0, 1_000_000, 200 * 8 * 256]
    assert plan["hardware"]["name"] == "H100"
    assert plan["total"]["usd"] == pytest.approx(sum(stage["usd"] for stage in plan["stages"]))
    twice = plan_recipe(PlanConfig(str(path), hardware="2xH100"))
    assert twice["total"]["seconds"] == pytest.approx(plan["total"]["seconds"] / 2)
    assert twice["total"]["usd"] == pytest.approx(plan["total"]["usd"])
    assert sputnik(["plan", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "at most" in shown and "scores" in shown
    capsys.readouterr()
    assert sputnik(["plan", str(path), "--tokens", "3M"]) == 2
    assert "--tokens is for a model; a recipe says its own" in capsys.readouterr().err
    (tmp_path / "card.toml").write_text('recipes = ["small.toml"]')
    assert sputnik(["plan", str(tmp_path / "card.toml")]) == 2
    assert "a card with a list of recipes; plan one of those" in capsys.readouterr().err


def test_a_recipe_on_a_model_of_other_makers_is_planned_at_its_size() -> None:
    plan = plan_recipe(PlanConfig("recipes/smollm2-gym.toml"))
    flops = {stage["stage"]: stage["flops"] / (stage["tokens"] or 1) for stage in plan["stages"]}
    assert 2 * 134e6 < flops["before"] < 2.2 * 134e6 < flops["zero"]


def test_work_grows_with_each_dial_of_a_stage() -> None:
    model = ModelConfig.preset("tiny")
    base = PretrainConfig()
    assert stage_work(replace(base, tokens=2 * base.tokens), model).training == 2 * stage_work(base, model).training
    rl = RLConfig()
    for change in ({"steps": 200}, {"samples_per_prompt": 32}, {"max_tokens": 256}, {"eval_every": 10}):
        assert stage_work(replace(rl, **change), model).drawing > stage_work(rl, model).drawing
    exam = EvalConfig("arithmetic")
    assert stage_work(replace(exam, samples=16), model).drawing == 2 * stage_work(exam, model).drawing
