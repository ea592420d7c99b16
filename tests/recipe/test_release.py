"""What a release reads of a run; a whole one is in test_whole_run.py."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from sputnik.config import to_dict
from sputnik.recipe.evaluation import EvalConfig
from sputnik.recipe.evidence import Stage
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.release import Words, data_read, release, render_card, settings_of, stands_on_others
from sputnik.recipe.runner import run_recipe
from sputnik.recipe.stages import kind_of
from sputnik.train.adopt import PretrainedConfig
from sputnik.train.sft import SFTConfig
from sputnik.train.traces import TracesConfig


def stage(kind: str, config: Any) -> Stage:
    return Stage(f"the-{kind}", kind, Path("runs/none"), {"settings": to_dict(config)})


def test_a_model_scored_on_a_task_of_ones_own_can_be_released() -> None:
    config = EvalConfig(task="mine.py", task_options={"largest": 9}, samples=4, scaling=True, budgets=(8, 16))
    settings = {**to_dict(config), "file mine.py": "0123456789abcdef"}
    found = settings_of(Stage("zero-eval", "eval", Path("runs/x/zero-eval"), {"settings": settings}))
    assert asdict(found) == asdict(config) | {"scaling": False, "budgets": ()}


def test_the_card_names_models_of_others_that_it_stands_on_and_files_of_ones_own() -> None:
    teacher = TracesConfig(url="https://api.example.com", endpoint={"model": "a-large-one"})
    made_of = [
        stage("pretrained", PretrainedConfig(source="smollm2", examples="form.jsonl")),
        stage("pretrained", PretrainedConfig(source="mine.gguf")),
        stage("traces", teacher),
        stage("sft", SFTConfig(data=("dialogues.jsonl",))),
    ]
    told = {each["source"]: each["licence"] for each in data_read(made_of)}
    assert told == {
        "the model smollm2": "Apache-2.0",
        "form.jsonl": "as its owner says",
        "the model mine.gguf": "as its owner says",
        "answers of a-large-one behind https://api.example.com": "as its provider says",
        "dialogues.jsonl": "as its owner says",
    }
    ours, own_traces = stage("pretrained", PretrainedConfig(source="r1-mini")), stage("traces", TracesConfig())
    assert [stands_on_others(each) for each in ([*made_of[:2]], [made_of[2]], [made_of[3], ours, own_traces])] == [
        True, True, False,
    ]  # fmt: skip


RECIPE = """
name = "mine"
[[stage]]
name = "begun"
kind = "pretrained"
source = "r1-mini"
[[stage]]
name = "scored"
kind = "eval"
task = "arithmetic"
questions = 4
samples = 2
max_tokens = 64
[[stage]]
name = "longer"
kind = "eval"
parent = "begun"
task = "arithmetic"
task_options = { terms = [5, 6] }
questions = 4
samples = 2
max_tokens = 64
"""


def test_a_model_that_began_as_a_pretrained_one_can_be_released(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(RECIPE)
    run_recipe(read_recipe(tmp_path / "mine.toml", kind_of), tmp_path / "runs", kind_of, Console(quiet=True))
    words = Words(title="Mine", summary="Sums.", cannot=("It does no more than sums.",))
    facts = release(tmp_path / "runs/mine", tmp_path / "out", words)
    assert facts["data"][0]["source"] == "the model r1-mini" and not facts["foreign"]
    assert "no output of other models" in (tmp_path / "out/README.md").read_text()
    assert [(each["name"], each["changed"]) for each in facts["others"]] == [("longer", {"terms": [5, 6]})]
    assert "\nWith terms = [5, 6]: " in (tmp_path / "out/README.md").read_text()
    assert "deepseek_v3: 8 layers, hidden 192, 8 routed experts" in render_card(facts)
    dense = facts | {"shape": facts["shape"] | {"model_type": "llama", "n_routed_experts": None}, "foreign": True}
    text = render_card(dense)
    assert "llama: 8 layers, hidden 192 |" in text and "tags: [llama, reasoning]" in text
    assert "no output of other models" not in text
