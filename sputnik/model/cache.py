"""The contiguous cache of a batch: one row of slots per sequence, each row with its own length.

A token costs `config.cache_width` values per layer: latent + shared RoPE key for MLA (512 + 64 in V3: 70,272 bytes over
61 layers in bf16), all key and value heads for GQA. Prompts are right-padded; new tokens of row b go to slots
lengths[b].. so a slot's index is its position, and what padding wrote is overwritten before anything may look at it.
B batch, S slots, T new tokens, W cached width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sputnik.model.config import ModelConfig


@dataclass(frozen=True)
class Append:
    """Where one forward pass writes and what it may see; made once per pass and shared by all layers."""

    positions: Tensor  # (B, T)
    slots: Tensor  # (B*T,) row-major index into (B*S)
    visible: int  # slots any query can see: the layers read rows[:, :visible]
    bias: Tensor  # (B, T, visible) added to scores: 0 where slot <= position, else -inf


class Cache:
    def __init__(self, rows: list[Tensor], lengths: Tensor, used: int) -> None:
        self.rows = rows  # per layer (B, S, W)
        self.lengths = lengths  # (B,) int64: tokens held per row
        self.used = used  # host-side upper bound of lengths, so that no step waits for the device

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Cache":  # fmt: skip
        shape = (batch, capacity, config.cache_width)
        rows = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        return cls(rows, torch.zeros(batch, dtype=torch.int64, device=device), used=0)

    @property
    def capacity(self) -> int:
        return self.rows[0].shape[1]

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.shape[2] * layer.element_size() for layer in self.rows)

    def select(self, rows: Tensor) -> "Cache":
        """A new cache of the given rows, in that order: drops finished sequences, or repeats a prompt for its group."""
        lengths = self.lengths[rows]
        used = int(lengths.max()) if len(rows) else 0
        return Cache([layer.index_select(0, rows) for layer in self.rows], lengths, used)

    def plan(self, tokens: int) -> Append | None:
        """Slots and mask for `tokens` more tokens per row; None when the cache is empty and `fill` will do."""
        if self.used + tokens > self.capacity:
            raise ValueError(f"cache of {self.capacity} slots is full: {self.used} used, {tokens} more asked")
        if self.used == 0:
            return None
        device = self.lengths.device
        positions = self.lengths[:, None] + torch.arange(tokens, device=device)
        starts = torch.arange(len(self.lengths), device=device) * self.capacity
        visible = self.used + tokens
        hidden = torch.arange(visible, device=device) > positions[:, :, None]
        bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
        return Append(positions, (starts[:, None] + positions).flatten(), visible, bias)

    def fill(self, layer: int, values: Tensor) -> None:
        """Write a whole prompt (B, T, W) into an empty cache."""
        self.rows[layer][:, : values.shape[1]] = values

    def append(self, layer: int, values: Tensor, plan: Append) -> Tensor:
        """Write new tokens (B, T, W) and return everything visible, (B, visible, W)."""
        rows = self.rows[layer]
        rows.view(-1, rows.shape[2]).index_copy_(0, plan.slots, values.flatten(0, 1).to(rows.dtype))
        return rows[:, : plan.visible]

    def advance(self, tokens: int, lengths: Tensor | None) -> None:
        """Count the new tokens: `lengths` (B,) valid ones per row, or all of them."""
        self.lengths = self.lengths + (tokens if lengths is None else lengths)
        self.used += tokens
