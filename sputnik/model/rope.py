"""Rotary positions: frequency tables (plain, linear, YaRN, Llama 3) and the two ways of pairing dimensions.

DeepSeek rotates interleaved pairs (2i, 2i+1); Llama and Qwen rotate (i, i + d/2). Both are one complex product in fp32
here. Tables are made on first use and grow by doubling, so building a 163,840-position model on the meta device costs
nothing. B batch, T tokens, R rotated width.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sputnik.model.config import ModelConfig


def inverse_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None) -> tuple[Tensor, float]:
    """(R/2,) angles per position, and the factor on cos and sin (1 except for some YaRN settings).

    Rounded as transformers rounds: far out, the last bit of an angle shows in the logits."""
    wave = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    plain = 1.0 / wave
    if scaling is None:
        return plain, 1.0
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(plain, scaling), 1.0
    low, high = yarn_range(dim, theta, scaling)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (scaling["factor"] * wave) * (1 - keep) + plain * keep, _yarn_magnitude(scaling)


def yarn_range(dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[float, float]:
    """Pairs below `low` keep their frequency, pairs above `high` are interpolated (report section 4.3)."""

    def pair_turning(times: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(scaling.get("beta_fast") or 32), pair_turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(qk width); under YaRN MLA multiplies it by m^2, m = 0.1 mscale_all_dim ln(factor) + 1."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if config.is_mla and scaling is not None and scaling.get("mscale_all_dim"):
        scale *= _mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return scale


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_magnitude(scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, mscale, all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    return _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor)


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long waves divided by `factor`, short ones kept, a linear blend between."""
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((length / (2 * math.pi / plain) - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * plain / factor + keep * plain


class Rope:
    """Table of unit rotations e^(i position angle) for one model. Not a module: nothing to save, nothing to cast."""

    def __init__(self, config: ModelConfig) -> None:
        self.frequencies, self.magnitude = inverse_frequencies(config.rope_dim, config.rope_theta, config.rope_scaling)
        self._table: Tensor | None = None

    def table(self, length: int, device: torch.device) -> Tensor:
        """(length, R/2) complex64."""
        table = self._table
        if table is None or table.shape[0] < length or table.device != device:
            rows = max(256, 1 << (length - 1).bit_length())
            angles = torch.arange(rows, dtype=torch.float32, device=device)[:, None] * self.frequencies.to(device)
            table = self._table = torch.complex(angles.cos() * self.magnitude, angles.sin() * self.magnitude)
        return table[:length]


def rotate_interleaved(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i+1) of x (..., R) by `turn` (broadcastable to (..., R/2), complex) -> fp32."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


def rotate_tail_(x: Tensor, turn: Tensor) -> Tensor:
    """`rotate_interleaved` in place on the last R of the last dimension; R follows from `turn`, x is fp32."""
    tail = x[..., -2 * turn.shape[-1] :]
    torch.view_as_complex(tail.view(*tail.shape[:-1], -1, 2)).mul_(turn)
    return x


def rotate_halves(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate pairs (i, i + R/2) of x (..., R) by `turn` (broadcastable to (..., R/2), complex) -> fp32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.complex(first.contiguous(), second.contiguous()) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)
