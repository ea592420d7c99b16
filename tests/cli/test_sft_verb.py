"""`sputnik sft`, the stage `sft` and the page about them: what they promise, done on a tiny model."""

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sputnik.__main__ import main
from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.errors import ConfigError, DataError
from sputnik.model.checkpoint import load_model
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.runner import StageContext
from sputnik.recipe.stages import kind_of
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.examples import preview, read_examples
from sputnik.train.sft import SFTConfig
from sputnik.train.state import read_jsonl

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "sft.md").read_text(encoding="utf-8")
DIALOGUES = ROOT / "examples" / "dialogues.jsonl"
QUESTION = [{"role": "user", "content": "Is it?"}]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One thought and one answer to whatever is asked."""
    file = tmp_path_factory.mktemp("data") / "yes.jsonl"
    asked = ["Is it?", "Are you?", "Will she?", "Was he?", "Can I?", "Do they?", "Is it so?", "Must I?"]
    file.write_text("".join(json.dumps({"prompt": each, "thinking": "So.", "answer": "Yes."}) + "\n" for each in asked))
    return file


@pytest.fixture(scope="module")
def tuned(checkpoint: Path, answers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "tuned"
    flags = ["--epochs", "20", "--batch", "4", "--lr", "3e-3", "--precision", "fp32", "--held-out", "0.1"]
    assert main(["sft", str(checkpoint), "--data", str(answers), "--out", str(out), *flags]) == 0
    return out


def test_the_model_says_what_it_was_taught_to_a_question_it_was_not(tuned: Path) -> None:
    first, *_, last = read_jsonl(tuned / "metrics.jsonl")
    assert last["val_loss"] < 0.1 < 5 < first["val_loss"]
    answer = LLM(tuned / "checkpoint", precision="fp32").chat(QUESTION, SamplingParams(temperature=0, max_tokens=20))
    assert (answer.thinking, answer.text, answer.finish) == ("So.", "Yes.", "stop")


def test_the_same_command_again_does_nothing(checkpoint: Path, answers: Path, tuned: Path, capsys: Any) -> None:
    before = (tuned / "metrics.jsonl").read_bytes()
    flags = ["--epochs", "20", "--batch", "4", "--lr", "3e-3", "--precision", "fp32", "--held-out", "0.1"]
    assert main(["sft", str(checkpoint), "--data", str(answers), "--out", str(tuned), *flags]) == 0
    assert (tuned / "metrics.jsonl").read_bytes() == before
    told = " ".join(capsys.readouterr().out.split())
    assert "7 examples in" in told and "val_loss" in told and f"sputnik chat {tuned}" in told


def test_what_it_cannot_do_is_one_line(checkpoint: Path, answers: Path, tmp_path: Path, capsys: Any) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(answers.read_text() + '{"prompt": "a"}\n')
    for arguments, message in (
        ([str(bad)], f"error: {bad}:9: prompt, answer and thinking must be texts. Mend them, or leave them out"),
        ([str(answers), "--epochs", "0"], "epochs = 0: set it above 0"),
        ([str(tmp_path / "none.jsonl")], "none.jsonl: no such file of examples"),
        ([str(answers), "--template", "own", "--length", "9999"], "length = 9999 is over the model's context"),
    ):
        assert main(["sft", str(checkpoint), "--data", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_the_stage_reads_the_stages_named_in_its_inputs(checkpoint: Path, answers: Path, tmp_path: Path) -> None:
    for name in ("traces", "general"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text(answers.read_text())
    recipe = read_recipe(ROOT / "recipes" / "sft.toml", kind_of)
    context = StageContext(
        tmp_path / "tuned", checkpoint.parent, {}, tmp_path, recipe, Console(file=io.StringIO()),
        {name: tmp_path / name for name in ("traces", "general")},
    )  # fmt: skip
    config = SFTConfig(data=(str(answers),), epochs=1, batch=32, precision="fp32", held_out=0.2)
    figures = kind_of("sft").run(config, context)
    assert json.loads((tmp_path / "tuned/data.json").read_text())["lines"] == 24 and figures["examples"] == 18
    trained, base = load_model(tmp_path / "tuned/checkpoint"), load_model(checkpoint)
    assert not torch.equal(trained.lm_head.weight, base.lm_head.weight)
    with pytest.raises(ConfigError, match="an sft stage needs a parent"):
        kind_of("sft").run(config, dataclasses.replace(context, parent=None))
    (tmp_path / "traces/data.jsonl").unlink()
    with pytest.raises(DataError, match=r"traces/data.jsonl: no such file"):
        kind_of("sft").run(config, context)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_model_of_other_makers_learns_in_its_own_template(tmp_path: Path) -> None:
    lines = [{"prompt": f"What is {n} and {n}?", "answer": "Sputnik says hello."} for n in range(9)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--data", str(tmp_path / "plain.jsonl"), "--out", str(tmp_path / "out"), "--lr", "1e-4", "--batch", "4"]
    assert main(["sft", "smollm2", *flags, "--epochs", "2"]) == 0
    first, *_, last = read_jsonl(tmp_path / "out/metrics.jsonl")
    assert last["val_loss"] < first["val_loss"] - 1
    model = LLM(tmp_path / "out/checkpoint")
    assert model.template == "own" and "<|im_end|>" in (tmp_path / "out/samples.md").read_text()
    assert model.chat(QUESTION, SamplingParams(temperature=0, max_tokens=12)).text


# --- the page and the example ---


def test_the_lines_of_the_page_are_examples_and_its_preview_is_ours(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "page.jsonl").write_text(blocks("json")[0])
    tok = Tokenizer.load(checkpoint)
    found = read_examples([tmp_path / "page.jsonl"], tok, longest=1000)
    assert (found.lines, len(found.examples)) == (3, 4)
    assert blocks("diff")[0].strip() in preview(found.examples, tok)


def test_the_recipe_of_the_page_and_the_one_beside_it_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(blocks("toml")[0])
    for path in (tmp_path / "mine.toml", ROOT / "recipes" / "sft.toml"):
        stages = read_recipe(path, kind_of).stages
        assert [(stage.kind, stage.parent) for stage in stages] == [
            ("corpus", None), ("pretrain", "corpus"), ("sft", "base"),
        ]  # fmt: skip
        assert stages[-1].config.data == ("examples/dialogues.jsonl",)


def test_the_dialogues_beside_the_page_show_every_form(checkpoint: Path) -> None:
    tok = Tokenizer.load(checkpoint)
    found = read_examples([DIALOGUES], tok, longest=1024)
    assert found.lines == 28 and len(found.examples) == 29 and not found.bad
    assert all(example.mask[-1] and example.ids[-1] == tok.eos_id for example in found.examples)
    records = [json.loads(line) for line in DIALOGUES.read_text(encoding="utf-8").splitlines()]
    keys = {key for record in records for key in (*record, *(k for m in record.get("messages", ()) for k in m))}
    assert {"prompt", "answer", "thinking", "messages", "tools", "tool_calls", "reasoning_content", "weight"} <= keys
