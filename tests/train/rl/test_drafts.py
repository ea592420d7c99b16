"""The prediction modules follow a policy that is trained, and the policy does not notice."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sputnik.engine.params import SamplingParams
from sputnik.engine.sampler import Sampler
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.transformer import Transformer
from sputnik.tasks.verify import VerifierPool
from sputnik.train.drafts import acceptance
from sputnik.train.learner import Learner, MicroBatch, UpdateStats, pack
from sputnik.train.losses import Objective
from sputnik.train.optim import adamw
from sputnik.train.reinforcement import Reinforcement
from sputnik.train.rl import RLConfig, train_rl
from sputnik.train.rollout import RolloutWorker, Sample
from sputnik.train.state import read_jsonl

MTP = "mtp."


def with_modules(policy: Any, depths: int) -> Transformer:
    """The policy with new prediction modules on top, as if it had been trained with them and moved away since."""
    trained = policy.model()
    model = Transformer(dataclasses.replace(trained.config, num_nextn_predict_layers=depths))
    model.init_weights(torch.Generator().manual_seed(1))
    missing, odd = model.load_state_dict(trained.state_dict(), strict=False)
    assert not odd and all(name.startswith(MTP) for name in missing)
    return model.eval()


@pytest.fixture(scope="module")
def samples(policy: Any, pool: VerifierPool) -> list[Sample]:
    sampler = Sampler(policy.model(), policy.tok.eos_id, "fp32")
    worker = RolloutWorker(sampler, policy.tok, policy.task, pool, "chat", Objective())
    groups = worker.collect(policy.task.problems("train", 6), 8, SamplingParams(max_tokens=40, seed=7))
    return [sample for group in groups for sample in group]


def batches(samples: list[Sample], budget: int = 10**6, **switches: float) -> list[MicroBatch]:
    return pack(samples, Objective(kl_beta=0.0, **switches), 40, budget)  # type: ignore[arg-type]


def learner_of(model: Transformer, train_mtp: bool, max_grad_norm: float = 1.0, precision: str = "fp32") -> Learner:
    objective = Objective(kl_beta=0.0)
    optimizer = adamw(model, 3e-3, weight_decay=0.0)
    return Learner(model, optimizer, objective, 1.0, precision, max_grad_norm, train_mtp)


def tensors(model: Transformer, modules: bool) -> dict[str, torch.Tensor]:
    """Weights, gradients and nothing else; of the modules or of all the rest."""
    found = {name: weight for name, weight in model.named_parameters() if name.startswith(MTP) == modules}
    gradients = {f"{name} gradient": weight.grad for name, weight in found.items() if weight.grad is not None}
    return {name: value.detach().clone() for name, value in {**found, **gradients}.items()}


def train(model: Transformer, samples: list[Sample], updates: int, **more: Any) -> list[UpdateStats]:
    learner = learner_of(model, **more)
    return [learner.update(batches(samples, 900)) for _ in range(updates)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_policy_is_the_same_bit_for_bit_with_and_without(
    policy: Any, samples: list[Sample], precision: str
) -> None:
    alone, followed = with_modules(policy, 2), with_modules(policy, 2)
    modules = tensors(alone, True)
    limits = {"max_grad_norm": 0.01, "precision": precision}  # clipped, so that a norm over all would show
    plain = train(alone, samples, 3, train_mtp=False, **limits)
    both = train(followed, samples, 3, train_mtp=True, **limits)
    expected, found = tensors(alone, False), tensors(followed, False)
    assert expected.keys() == found.keys() and any("gradient" in name for name in found)
    assert all(torch.equal(expected[name], found[name]) for name in found)
    assert [dataclasses.replace(stats, mtp_loss=None) for stats in both] == plain
    assert all(torch.equal(modules[name], value) for name, value in tensors(alone, True).items()), "left as they were"
    assert not any(
        torch.equal(modules[name], value) for name, value in tensors(followed, True).items() if name in modules
    )


@pytest.mark.parametrize("depths", [1, 2])
def test_loss_and_gradient_are_those_of_one_answer_at_a_time(policy: Any, samples: list[Sample], depths: int) -> None:
    """Against the plain cross-entropy of every answer token, unpadded, from all logits."""
    fast, slow = with_modules(policy, depths), with_modules(policy, depths)
    useful = [sample for sample in samples if sample.advantage]
    (stats,) = train(fast, useful, 1, train_mtp=True, max_grad_norm=1e9)
    total, count = torch.zeros(()), 0
    for sample in useful:
        prompt, answer = list(sample.generation.prompt), list(sample.generation.ids)
        ids = torch.tensor([prompt + answer])
        for depth, hidden in enumerate(slow.mtp_hidden(slow.trunk(ids).residual.detach(), ids).hidden, start=1):
            for place in range(len(prompt), ids.shape[1]):
                logits = slow.head(hidden[0, place - depth - 1])
                total, count = total + F.cross_entropy(logits, ids[0, place]), count + 1
    (total / count).backward()
    assert stats.mtp_loss == pytest.approx(float(total.detach()) / count, rel=1e-5)
    for name, weight in slow.mtp.named_parameters():
        torch.testing.assert_close(fast.mtp.get_parameter(name).grad, weight.grad, atol=1e-5, rtol=1e-3)


def test_drafts_get_better_on_what_the_policy_says(policy: Any, samples: list[Sample]) -> None:
    losses = [stats.mtp_loss for stats in train(with_modules(policy, 1), samples, 25, train_mtp=True)]
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("depths", [1, 2])
def test_acceptance_is_the_share_of_tokens_guessed_one_by_one(policy: Any, samples: list[Sample], depths: int) -> None:
    model = with_modules(policy, depths)
    train(model, samples, 10, train_mtp=True)
    hits, seen = [0] * depths, [0] * depths
    with torch.no_grad():
        for sample in samples:
            ids = torch.tensor([[*sample.generation.prompt, *sample.generation.ids]])
            for depth, hidden in enumerate(model.mtp_hidden(model.trunk(ids).residual, ids).hidden, start=1):
                for place in range(len(sample.generation.prompt), ids.shape[1]):
                    guess = int(model.head(hidden[0, place - depth - 1]).argmax())
                    hits[depth - 1] += guess == int(ids[0, place])
                    seen[depth - 1] += 1
    found = acceptance(model, [sample.generation for sample in samples], "fp32")
    assert found == pytest.approx([hit / tokens for hit, tokens in zip(hits, seen, strict=True)])
    assert 0.2 < found[0] < 1, "ten updates teach something"


def test_a_whole_stage_trains_them_resumes_exactly_and_leaves_the_policy_alone(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / "parent"
    save_model(with_modules(policy, 1), parent, tokenizer=policy.tok)
    settings: dict[str, Any] = {
        "task_options": {"terms": [2, 3], "largest": 5, "non_negative": True}, "steps": 6, "prompts_per_step": 4,
        "samples_per_prompt": 4, "optimizer_steps": 2, "max_tokens": 40, "lr": 2e-3, "eval_every": 6,
        "eval_questions": 4, "eval_samples": 1, "on_collapse": "off", "precision": "fp32", "save_seconds": 0.0,
    }  # fmt: skip

    def run(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        train_rl(RLConfig(**{**settings, **changes}), parent, tmp_path / name, policy.meter())
        return load_model(tmp_path / name / "checkpoint").state_dict()

    straight, kept = run("straight"), run("kept", switches={"train_mtp": False})
    for name, value in load_model(parent).state_dict().items():
        if name.startswith(MTP):
            assert torch.equal(kept[name], value)
            assert name.endswith("bias") or not torch.equal(straight[name], value)
        else:
            assert torch.equal(kept[name], straight[name])
    lines = read_jsonl(tmp_path / "straight/metrics.jsonl")
    before, after = (line["validation"]["acceptance"] for line in (lines[0], lines[-1]))
    assert len(before) == len(after) == 1 and after[0] > before[0] + 0.1
    losses = [line["mtp_loss"] for line in lines[1:]]
    assert losses[-1] < losses[0] - 0.2
    assert not any("mtp_loss" in line for line in read_jsonl(tmp_path / "kept/metrics.jsonl"))

    learn = Reinforcement._learn

    def dying(self: Reinforcement, groups: Any, step: int, data_step: int) -> dict[str, Any]:
        if step == 4:
            raise RuntimeError("killed")
        return learn(self, groups, step, data_step)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Reinforcement, "_learn", dying)
        run("broken")
    broken = run("broken")
    assert all(torch.equal(broken[name], value) for name, value in straight.items())


def test_they_are_trained_in_the_first_part_that_teaches_anything(policy: Any, pool: VerifierPool) -> None:
    config = RLConfig(
        task_options={"terms": [2, 3], "largest": 5, "non_negative": True}, prompts_per_step=2, optimizer_steps=2,
        objective="dr_grpo", eval_questions=1, precision="fp32", max_tokens=40,
    )  # fmt: skip
    stage = Reinforcement(config, with_modules(policy, 1), policy.tok, policy.task, pool)
    params = SamplingParams(max_tokens=40, seed=7)
    group = stage.worker.collect(policy.task.problems("train", 1), 4, params)[0]
    useful = [dataclasses.replace(sample, advantage=1.0 - 2.0 * (place % 2)) for place, sample in enumerate(group)]
    flat = [dataclasses.replace(sample, advantage=0.0) for sample in group]
    for groups in ([useful, flat], [flat, useful]):  # one of them has the flat group in its first part
        assert stage._learn(groups, 2, 2)["mtp_loss"] > 1.0
    assert "mtp_loss" not in stage._learn([flat, flat], 2, 2)
