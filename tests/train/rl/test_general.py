"""RL for all scenarios: open prompts judged by reward models, late, resumed exactly; and policies of other kinds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sputnik.errors import ConfigError, DataError, TaskError
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.tasks.base import Judgement, Verdict
from sputnik.tasks.verify import VerifierPool
from sputnik.text.chat import render_example
from sputnik.train.reinforcement import Reinforcement
from sputnik.train.reward_model import RewardModel
from sputnik.train.rl import RLConfig, train_rl
from sputnik.train.state import read_jsonl

SETTINGS: dict[str, Any] = {
    "task_options": {"terms": [2, 3], "largest": 5, "non_negative": True}, "steps": 6, "prompts_per_step": 4,
    "samples_per_prompt": 4, "optimizer_steps": 2, "max_tokens": 40, "lr": 2e-3, "eval_every": 6, "eval_questions": 4,
    "eval_samples": 1, "on_collapse": "off", "precision": "fp32", "save_seconds": 0.0,
    "rewards": {"language": 1.0, "general_from": 4, "general_share": 0.5},
}  # fmt: skip
TIMED = ("seconds", "usd", "generate_s", "verify_s", "train_s", "tokens_per_s", "flops_per_s", "peak_share")


@pytest.fixture(scope="module")
def judged(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two reward models with opinions of their own, and prompts for them."""
    folder = tmp_path_factory.mktemp("judged")
    for seed, kind in enumerate(("pairwise", "pointwise")):
        model = RewardModel.of(policy.checkpoint, kind, precision="fp32")  # type: ignore[arg-type]
        with torch.no_grad():
            model.head.weight.normal_(generator=torch.Generator().manual_seed(seed))
        model.save(folder / kind, model.card)
    lines = [{"prompt": f"Tell me of {number}."} for number in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [folder / "pairwise", folder / "pointwise", folder / "prompts.jsonl"]


def run(policy: Any, judged: list[Path], out: Path) -> None:
    helpful, safe, prompts = judged
    train_rl(RLConfig(**SETTINGS), policy.checkpoint, out, policy.meter(), judges=[helpful, safe], prompts=[prompts])


def test_open_prompts_come_late_and_a_broken_run_goes_on_exactly(
    policy: Any, judged: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(policy, judged, tmp_path / "unbroken")
    learn = Reinforcement._learn

    def dying(self: Reinforcement, groups: Any, step: int, data_step: int) -> dict[str, Any]:
        if step == 5:  # between two steps with open prompts
            raise RuntimeError("killed")
        return learn(self, groups, step, data_step)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Reinforcement, "_learn", dying)
        run(policy, judged, tmp_path / "broken")
    run(policy, judged, tmp_path / "broken")
    curves = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("unbroken", "broken")]
    first, second = ([{k: v for k, v in line.items() if k not in TIMED} for line in lines] for lines in curves)
    assert first == second
    assert read_jsonl(tmp_path / "unbroken/rollouts.jsonl") == read_jsonl(tmp_path / "broken/rollouts.jsonl")
    weights = [load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("unbroken", "broken")]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())

    assert [line.get("general_answers") for line in first[1:]] == [None] * 3 + [8] * 3
    assert [sum(line["verdicts"].values()) for line in first[1:]] == [16] * 3 + [8] * 3
    assert all(0 <= line["language_reward"] <= 1 for line in first[1:])
    rollouts = read_jsonl(tmp_path / "unbroken/rollouts.jsonl")
    opened = [line for line in rollouts if line["verdict"] == "open"]
    assert {line["step"] for line in opened} == {4, 5, 6}
    assert all(set(line["rewards"]) == {"format", "language", "helpful", "safe"} for line in opened)
    closed = [line for line in rollouts if line["verdict"] != "open"]
    assert {line["step"] for line in closed} == set(range(1, 7))


@pytest.mark.parametrize(
    ("judges", "prompts", "general_from", "message"),
    [
        (0, 1, 4, "give a reward model: it is what judges open prompts"),
        (1, 0, 4, "give a file of open prompts"),
        (1, 1, 0, "set rewards.general_from to the first step with open prompts"),
        (1, 1, 7, "general_from = 7 lies behind the last step"),
        (0, 0, 4, "give a reward model"),
    ],
)
def test_preference_rewards_want_all_their_parts(
    policy: Any, judged: list[Path], tmp_path: Path, judges: int, prompts: int, general_from: int, message: str
) -> None:
    config = RLConfig(**{**SETTINGS, "rewards": {"general_from": general_from}})
    given = {"judges": judged[:judges], "prompts": judged[2:][:prompts]}
    with pytest.raises(ConfigError, match=message):
        train_rl(config, policy.checkpoint, tmp_path / "rl", policy.meter(), **given)
    assert not (tmp_path / "rl").exists()


def test_a_step_that_nobody_could_judge_stops_the_run(
    policy: Any, pool: VerifierPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Reinforcement(RLConfig(**ALONE), policy.model(), policy.tok, policy.task, pool)
    collect = stage.worker.collect
    fault = Judgement(Verdict.ERROR, "the worker died")
    monkeypatch.setattr(
        stage.worker, "collect", lambda *a: [[dataclasses.replace(s, judgement=fault) for s in g] for g in collect(*a)]
    )
    with pytest.raises(TaskError, match=r"step 2: no answer could be judged \(the worker died\); mend the verifier"):
        stage._gather(2, 2)


def test_too_few_prompts_for_a_step_are_refused(policy: Any, judged: list[Path], tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "Only this."}\n')
    with pytest.raises(DataError, match="1 open prompts, and a step asks 2; add some"):
        train_rl(
            RLConfig(**SETTINGS), policy.checkpoint, tmp_path / "rl", policy.meter(), judges=judged[:2], prompts=[few]
        )


ALONE: dict[str, Any] = {**SETTINGS, "rewards": {}, "steps": 3, "eval_every": 3}


def test_a_wide_clip_is_a_switch(policy: Any, tmp_path: Path) -> None:
    """R1's second RL stage clips at 10 (supplement B.4): with rates that move the ratio nothing is cut off."""
    shares = {}
    for eps in (0.0, 10.0):
        switches = {"clip_low": eps, "clip_high": eps}
        config = RLConfig(**{**ALONE, "switches": switches, "optimizer_steps": 4})
        train_rl(config, policy.checkpoint, tmp_path / f"clip-{eps}", policy.meter())
        shares[eps] = [line["clip_share"] for line in read_jsonl(tmp_path / f"clip-{eps}/metrics.jsonl")[1:]]
    assert min(shares[0.0]) > 0.1 and max(shares[10.0]) == 0


def test_replayed_routes_are_the_samplers_in_a_whole_run(policy: Any, tmp_path: Path) -> None:
    """Where the gates see a near tie otherwise than the sampler did, only replay keeps the two sides one policy."""
    config = RLConfig(**{**ALONE, "switches": {"replay_routes": True}, "precision": "bf16"})
    train_rl(config, policy.checkpoint, tmp_path / "replay", policy.meter())
    train_rl(dataclasses.replace(config, switches={}), policy.checkpoint, tmp_path / "free", policy.meter())
    replayed, free = (read_jsonl(tmp_path / name / "metrics.jsonl")[1:] for name in ("replay", "free"))
    assert replayed[0]["ratio_first"] == free[0]["ratio_first"] == 0.0
    assert replayed[0]["reward"] == free[0]["reward"], "the sampler is the same"
    assert replayed[0]["mismatch_mean"] <= free[0]["mismatch_mean"]
    assert all(line["mismatch_p99"] < 0.2 for line in replayed)


def test_a_dense_student_is_trained_by_the_same_stage(policy: Any, tmp_path: Path) -> None:
    """The control of the distillation experiment: a Llama block with a tied head instead of V3's."""
    tok = policy.tok
    shape = ModelConfig(
        model_type="llama", vocab_size=tok.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=64, max_position_embeddings=128, initializer_range=0.05,
        tie_word_embeddings=True, bos_token_id=tok.bos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id,
    )  # fmt: skip
    model = Transformer(shape).init_weights(torch.Generator().manual_seed(0)).train()
    demonstrations = policy.task.demonstrations(640, 0)
    policy.fit(model, [render_example(tok, d.prompt, d.thinking, d.answer) for d in demonstrations], 60)
    save_model(model, tmp_path / "dense", tokenizer=tok)
    figures = train_rl(RLConfig(**ALONE), tmp_path / "dense", tmp_path / "rl", policy.meter())
    assert figures["step"] == 3 and figures["format_reward"] > 0 and "mtp_loss" not in figures
    assert "acceptance" not in figures["validation"]
    trained = load_model(tmp_path / "rl/checkpoint")
    assert trained.config.model_type == "llama"
    assert not torch.equal(trained.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert trained.lm_head.weight is trained.model.embed_tokens.weight
