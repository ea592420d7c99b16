"""A policy that half knows short sums: a V3-shaped model of 60k weights, fitted to demonstrations in a few seconds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sputnik.cost import Meter
from sputnik.hardware import Hardware
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.head import head_loss
from sputnik.model.transformer import Transformer
from sputnik.tasks.base import Task, load_task
from sputnik.tasks.verify import VerifierPool
from sputnik.text.chat import render_example
from sputnik.text.tokenizer import Tokenizer

TASK = "arithmetic"
OPTIONS: dict[str, Any] = {
    "terms": [2, 3],
    "largest": 5,
    "non_negative": True,
    "style_weights": {"guess": 0.5, "steps": 0.5},
}
"""Half of what the policy has read are guesses: preferring the other half is what there is to learn."""


@dataclass(frozen=True)
class Policy:
    """A checkpoint with tokenizer, and the task it half knows."""

    checkpoint: Path
    tok: Tokenizer
    task: Task

    def model(self) -> Transformer:
        return load_model(self.checkpoint)

    def meter(self) -> Meter:
        return Meter(Hardware("test", 1e11, None, 1e10, 1e10, 0.1, "test"))

    def fit(self, model: Transformer, examples: list[tuple[list[int], list[bool]]], steps: int) -> None:
        fit(model, examples, steps)


def fit(model: Transformer, examples: list[tuple[list[int], list[bool]]], steps: int) -> None:
    """Plain supervised steps on a fixed batch order, right-padded."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in examples])
    targets = ids.clone()
    for place, (row, _) in enumerate(examples):
        targets[place, len(row) :] = -100
    for step in range(steps):
        rows = torch.arange(step * 64, step * 64 + 64) % len(examples)
        hidden = model.trunk(ids[rows, :-1]).hidden.flatten(0, 1)
        (head_loss(hidden, model.lm_head.weight, targets[rows, 1:].flatten()) / (64 * width)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    torch.set_num_threads(1)
    task = load_task(TASK, OPTIONS)
    demonstrations = task.demonstrations(640, 0)
    tok = Tokenizer.train((f"{d.prompt}\n{d.thinking}\n{d.answer}" for d in demonstrations), 300)
    config = ModelConfig.preset(
        "tiny", vocab_size=tok.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=64, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=32,
        max_position_embeddings=128, num_nextn_predict_layers=0, initializer_range=0.05,
        bos_token_id=tok.bos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id,
    )  # fmt: skip
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0)).train()
    fit(model, [render_example(tok, d.prompt, d.thinking, d.answer) for d in demonstrations], 250)
    checkpoint = tmp_path_factory.mktemp("policy") / "checkpoint"
    save_model(model, checkpoint, tokenizer=tok)
    return Policy(checkpoint, tok, task)


@pytest.fixture(scope="session")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(TASK, OPTIONS) as workers:
        yield workers
