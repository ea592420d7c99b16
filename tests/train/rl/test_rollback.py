"""A policy that breaks in the middle of reinforcement learning: the real model returns to its save and goes on."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sputnik.tasks.verify import VerifierPool
from sputnik.train.guards import Guard
from sputnik.train.loop import Loop, Read
from sputnik.train.reinforcement import Reinforcement, RLConfig
from sputnik.train.rollout import Group
from sputnik.train.state import read_jsonl

CONFIG = RLConfig(
    steps=10, prompts_per_step=4, samples_per_prompt=4, optimizer_steps=2, max_tokens=40, lr=2e-4,
    switches={"reference_refresh": 2}, eval_every=5, eval_questions=4, eval_samples=1, precision="fp32",
    on_collapse={"action": "rollback", "window": 5, "constant_reward": "off", "length": "off"},
)  # fmt: skip
BROKEN = 6


class Breaking(Reinforcement):
    """Its head is multiplied just before the rollout of data step `BROKEN`; what `load` leaves behind is remembered."""

    factor = 1.0

    def _gather(self, step: int, data_step: int) -> tuple[list[Group], dict[str, float]]:
        if data_step == BROKEN:
            with torch.no_grad():
                self.model.lm_head.weight.mul_(self.factor)
        return super()._gather(step, data_step)

    def load(self, read: Read, plain: Mapping[str, Any]) -> None:
        super().load(read, plain)
        self.loaded = {name: clone(tensors) for name, tensors in self.state()[0].items()}


def clone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("factor", "rule"), [(1e38, "non_finite"), (200.0, "entropy_collapse")], ids=["infinite logits", "no doubt left"]
)
def test_a_broken_policy_is_rolled_back_and_training_goes_on_with_other_data(
    policy: Any, pool: VerifierPool, tmp_path: Path, factor: float, rule: str
) -> None:
    stage = Breaking(CONFIG, policy.model(), policy.tok, policy.task, pool)
    stage.factor = factor
    guards = CONFIG.guard_config()
    loop = Loop(
        tmp_path, steps=10, identity={}, meter=policy.meter(), guard=lambda: Guard(guards), logs=("rollouts",),
        save_seconds=math.inf, save_steps=2,
    )  # fmt: skip
    loop.run(stage)

    (rollback,) = read_jsonl(tmp_path / "alarms/rollbacks.jsonl")
    at, shift = rollback["at"], rollback["shift"]
    assert BROKEN <= at < 10 and rollback["to"] == 4 and shift == at - 4, "the saves of steps 6 and 8 are broken too"
    alarm = json.loads((tmp_path / f"alarms/step-{at}.json").read_text())
    assert (alarm["rule"], alarm["action"]) == (rule, "rollback")
    batch = load_file(tmp_path / f"alarms/step-{at}.safetensors")
    assert batch["0.mask"].sum() > 0 and batch["0.ids"].shape[0] == batch["0.advantages"].shape[0]

    for name, tensors in stage.loaded.items():  # model, optimiser and reference, bit for bit
        saved = load_file(tmp_path / f"resume/step-00000004/{name}.safetensors")
        assert tensors.keys() == saved.keys() and all(torch.equal(tensors[key], saved[key]) for key in saved)
    assert set(stage.loaded) == {"model", "optimizer", "reference"}

    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(11))
    assert all(math.isfinite(line[key]) for line in lines[1:] for key in ("loss", "entropy", "grad_norm"))
    assert min(line["entropy"] for line in lines[5:]) > 0.1 * max(line["entropy"] for line in lines[1:5])
    rollouts = read_jsonl(tmp_path / "rollouts.jsonl")
    for step in (4, 5, 10):
        asked = {problem.id for problem in stage._questions(step, step + (shift if step > 4 else 0), 0)}
        assert {line["problem_id"] for line in rollouts if line["step"] == step} == asked
