"""`sputnik rl`, the stages `rl` and `pretrained`, and the page about them: what they promise, done on a tiny model."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sputnik.__main__ import main
from sputnik.errors import ConfigError
from sputnik.model.checkpoint import load_model, save_model
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.runner import StageContext
from sputnik.recipe.stages import kind_of
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.guards import GuardConfig
from sputnik.train.health import rollout_metrics
from sputnik.train.losses import Objective
from sputnik.train.reinforcement import RLConfig
from sputnik.train.reward_model import RewardModel
from sputnik.train.rewards import RewardConfig
from sputnik.train.state import read_jsonl

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "rl.md").read_text(encoding="utf-8")
TASK = ROOT / "examples" / "my_task.py"
SMALL = ["--set", "prompts_per_step=2", "--set", "samples_per_prompt=2", "--set", "optimizer_steps=1"]
SMALL += ["--set", "eval_questions=2", "--set", "eval_samples=1", "--set", "precision=fp32", "--max-tokens", "16"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def talker(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ends its answers: all that a run asks of it."""
    folder = tmp_path_factory.mktemp("talker")
    asked = [f"Write {number} as a Roman numeral." for number in (3, 17, 28, 285, 40, 1, 2746, 309)]
    lines = [json.dumps({"prompt": each, "thinking": "So.", "answer": "I"}) for each in (*asked, "Greet me.", "Go.")]
    (folder / "yes.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--epochs", "15", "--batch", "5", "--lr", "3e-3", "--precision", "fp32", "--held-out", "0"]
    assert main(["sft", str(checkpoint), "--data", str(folder / "yes.jsonl"), "--out", str(folder), *flags]) == 0
    return folder / "checkpoint"


def test_the_command_of_the_page_trains_and_does_nothing_the_second_time(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text('{"prompt": "Write 4 as a Roman numeral.", "gold": "IV", "answer": "IV", "correct": true}\n')
    command = ["rl", str(talker), "--task", str(TASK), "--option", "largest=50", "--out", str(tmp_path / "roman")]
    command += ["--steps", "2", *SMALL, "--set", "switches.kl_beta=0", "--audit", str(labelled)]
    assert main(command) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "right answers not paid" in told and re.search("validation [0-9.]+% -> [0-9.]+% in", told)
    assert f"sputnik chat {tmp_path / 'roman'}" in told
    lines = read_jsonl(tmp_path / "roman/metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[1]["kl"] == 0
    before = (tmp_path / "roman/metrics.jsonl").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "roman/metrics.jsonl").read_bytes() == before
    assert load_model(tmp_path / "roman/checkpoint").config == load_model(talker).config


def test_the_audit_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.jsonl").write_text(blocks("json")[0])
    assert main(["rl", "--task", "arithmetic", "--audit", str(tmp_path / "page.jsonl")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"wrong answers paid │ 0.0 % \[.*right answers not paid │ 0.0 % \[", told)
    assert "correct 1, unparseable 1" in told


def test_what_it_cannot_do_is_one_line(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        ([], "name a model to train, or a labelled set to --audit the verifier with"),
        (["--audit", "page.jsonl", "--steps", "3"], "--steps is for training: name a model, or leave it out"),
        ([str(talker)], "say with --out DIR where the trained model is to go"),
        ([str(talker), *out, "--set", "steps=3"], "--set steps=...: steps has a flag of its own"),
        ([str(talker), *out, "--set", "lrr=3"], "--set: unknown key 'lrr'; did you mean 'lr'?"),
        ([str(talker), *out, "--steps", "0"], "steps = 0: set it above 0"),
        ([str(talker), *out, "--judge", str(tmp_path)], "preference rewards: give a file of open prompts"),
        ([str(tmp_path / "none"), *out], "neither a checkpoint directory nor a run"),
    ):
        assert main(["rl", *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


# --- stages ---


def context_of(folder: Path, parent: Path | None, inputs: dict[str, Path]) -> StageContext:
    recipe = read_recipe(ROOT / "recipes" / "smollm2-gym.toml", kind_of)
    return StageContext(folder, parent, {}, folder.parent, recipe, Console(file=io.StringIO()), inputs)


def test_the_stage_takes_reward_models_and_prompts_from_its_inputs(talker: Path, tmp_path: Path) -> None:
    model = RewardModel.of(talker, "pairwise", precision="fp32")
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    model.save(tmp_path / "helpful/checkpoint", model.card)
    (tmp_path / "general").mkdir()
    (tmp_path / "general/prompts.jsonl").write_text('{"prompt": "Greet me."}\n{"prompt": "Part."}\n')
    inputs = {name: tmp_path / name for name in ("helpful", "general")}
    context = context_of(tmp_path / "r1", talker.parent, inputs)
    config = RLConfig(
        task=str(TASK), steps=2, prompts_per_step=2, samples_per_prompt=2, optimizer_steps=1, max_tokens=16,
        eval_questions=2, eval_samples=1, precision="fp32", rewards={"general_from": 2, "general_share": 0.5},
    )  # fmt: skip
    figures = kind_of("rl").run(config, context)
    assert figures["general_answers"] == 2 and "general_helpful" in figures
    with pytest.raises(ConfigError, match="an rl stage needs a parent"):
        kind_of("rl").run(config, dataclasses.replace(context, parent=None))
    (tmp_path / "other").mkdir()
    odd = dataclasses.replace(context, inputs={**inputs, "other": tmp_path / "other"})
    with pytest.raises(ConfigError, match="are reward models, or have open prompts"):
        kind_of("rl").run(config, odd)


def test_the_pretrained_stage_takes_over_a_model(talker: Path, tmp_path: Path) -> None:
    kind = kind_of("pretrained")
    figures = kind.run(kind.config(source=str(talker)), context_of(tmp_path / "mine", None, {}))
    model, same = load_model(talker), load_model(tmp_path / "mine/checkpoint")
    assert figures["rows"] == model.config.vocab_size and "loss" not in figures
    assert all(torch.equal(same.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_smollm2_gets_tokens_that_it_can_use(tmp_path: Path) -> None:
    """The model of the recipe, a few steps of its lessons: they are learned, and it still knows what it knew."""
    kind = kind_of("pretrained")
    figures = kind.run(kind.config(steps=6), context_of(tmp_path / "smollm2", None, {}))
    assert figures["rows"] == 49216 and figures["loss"] < figures["loss_before"] - 0.5
    model, tok = load_model("smollm2"), Tokenizer.load(tmp_path / "smollm2/checkpoint")
    adopted = load_model(tmp_path / "smollm2/checkpoint")
    ids = torch.tensor([tok.encode("The capital of France is")])
    assert torch.equal(adopted(ids)[..., :49152], model(ids))
    save_model(adopted, tmp_path / "again", tokenizer=tok)


# --- the page ---


def test_the_stage_of_the_page_can_be_read(tmp_path: Path) -> None:
    above = '[[stage]]\nname = "{}"\nkind = "pretrained"\n'
    text = "\n".join(above.format(name) for name in ("dev3", "helpful", "safe", "general"))
    (tmp_path / "page.toml").write_text(f"{text}\n{blocks('toml')[0]}")
    stage = read_recipe(tmp_path / "page.toml", kind_of).stages[-1]
    assert stage.config.reward_config() == RewardConfig(language=1.0, general_from=61, general_share=0.25)
    assert stage.config.guard_config().window == 10 and stage.config.guard_config().rolls_back


def test_weights_switches_and_metrics_of_the_page_exist() -> None:
    weights = dict(re.findall(r"^\| `(\w+)` \| (\d) \| ", PAGE, re.MULTILINE))
    assert {name: str(round(getattr(RewardConfig(), name))) for name in weights} == weights and len(weights) == 5
    switches = re.search(r"changes single settings of it.*?\n\n", PAGE, re.DOTALL)
    assert switches is not None
    named = set(re.findall(r"`(\w+)`", switches[0]))
    assert named <= {field.name for field in dataclasses.fields(Objective)}
    actions = set(re.findall(r"`(off|warn|pause|rollback)`", PAGE))
    assert actions == {"off", "warn", "pause", "rollback"} and GuardConfig().window == 20
    assert rollout_metrics([], None, None) == {"verdicts": {}, "useful_groups": 0.0}  # type: ignore[arg-type]
