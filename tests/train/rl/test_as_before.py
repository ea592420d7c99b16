"""R1-Zero with its defaults is what it was before rewards had parts: recorded losses and weights, bit for bit."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from sputnik.train.rl import RLConfig, train_rl
from sputnik.train.state import read_jsonl

OPTIONS = {"terms": [2, 3], "largest": 5, "non_negative": True, "style_weights": {"guess": 0.5, "steps": 0.5}}
SETTINGS: dict[str, Any] = {
    "task_options": OPTIONS, "steps": 6, "prompts_per_step": 4, "samples_per_prompt": 4, "optimizer_steps": 2,
    "max_tokens": 40, "lr": 2e-3, "switches": {"reference_refresh": 2}, "eval_every": 3, "eval_questions": 8,
    "eval_samples": 2, "on_collapse": "off", "precision": "fp32",
}  # fmt: skip
PARENT = "936272bd611279994a65812a844e01ac1db7839a7f928fffe836d2d95584c724"
"""Of the policy's weights where this was recorded: torch 2.13, AVX-512, one thread."""
RECORDED: dict[str, tuple[str, list[float], list[float]]] = {
    "grpo": (
        "09046ba751934a53",
        [-1.250067725777626e-05, -0.0034568151459097862, -0.005968637065961957, 0.0005841655074618757,
         0.011822029948234558, -0.006264980183914304],
        [1.1875, 1.1875, 1.0, 1.125, 1.1875, 0.375],
    ),
    "dapo": (
        "8ba66f5f874f9ab2",
        [-0.05385303124785423, 0.017140071839094162, 0.21701626479625702, -0.13713807985186577,
         0.12345953285694122, 0.23335543274879456],
        [1.3125, 1.1875, 1.125, 1.21875, 1.0625, 0.84375],
    ),
}  # fmt: skip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("objective", RECORDED)
def test_losses_rewards_and_weights_are_those_on_record(policy: Any, tmp_path: Path, objective: str) -> None:
    if sha256(policy.checkpoint / "model.safetensors") != PARENT:
        pytest.skip("arithmetic here differs from where the losses were recorded in the last bits")
    weights, losses, rewards = RECORDED[objective]
    train_rl(RLConfig(**SETTINGS, objective=objective), policy.checkpoint, tmp_path, policy.meter())
    lines = read_jsonl(tmp_path / "metrics.jsonl")[1:]
    assert [line["loss"] for line in lines] == losses
    assert [line["reward"] for line in lines] == rewards
    assert sha256(tmp_path / "checkpoint" / "model.safetensors").startswith(weights)
