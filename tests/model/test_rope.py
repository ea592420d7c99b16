"""Rotations against their formulas, and YaRN against the constants of the report."""

import math

import pytest
import torch

from sputnik.model.config import ModelConfig
from sputnik.model.rope import (
    Rope,
    inverse_frequencies,
    rotate_halves,
    rotate_interleaved,
    rotate_tail_,
    softmax_scale,
    yarn_range,
)

V3 = ModelConfig.preset("v3-671b")


def test_yarn_constants_are_the_published_ones() -> None:
    assert V3.rope_scaling is not None
    assert yarn_range(64, 10000.0, V3.rope_scaling) == (10, 23)
    assert softmax_scale(V3) == pytest.approx(0.1352338, abs=1e-7)
    plain = ModelConfig.preset("v3-671b", rope_scaling=None)
    assert softmax_scale(plain) == pytest.approx(192**-0.5) == pytest.approx(0.0721688, abs=1e-7)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    plain, _ = inverse_frequencies(64, 10000.0, None)
    yarn, magnitude = inverse_frequencies(64, 10000.0, V3.rope_scaling)
    assert magnitude == 1.0
    torch.testing.assert_close(yarn[:11], plain[:11])
    torch.testing.assert_close(yarn[23:], plain[23:] / 40)
    share = (16 - 10) / (23 - 10)
    assert yarn[16].item() == pytest.approx(plain[16].item() * (share / 40 + 1 - share))


def turn(config: ModelConfig, tokens: int) -> torch.Tensor:
    return Rope(config).table(tokens, torch.device("cpu"))


def test_interleaved_pairs_turn_by_position_times_frequency() -> None:
    config = ModelConfig.preset("tiny")
    x = torch.randn(7, config.rope_dim)
    out = rotate_interleaved(x, turn(config, 7))
    for position in (0, 1, 6):
        for pair in range(config.rope_dim // 2):
            angle = position * 10000.0 ** (-2 * pair / config.rope_dim)
            a, b = x[position, 2 * pair].item(), x[position, 2 * pair + 1].item()
            expected = (a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle))
            assert out[position, 2 * pair : 2 * pair + 2].tolist() == pytest.approx(expected, abs=1e-5)


def test_halves_are_the_interleaved_rotation_of_reordered_dimensions() -> None:
    config = ModelConfig.preset("tiny")
    x = torch.randn(5, config.rope_dim)
    paired = torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)
    turned = rotate_interleaved(paired, turn(config, 5)).unflatten(-1, (-1, 2))
    torch.testing.assert_close(rotate_halves(x, turn(config, 5)), torch.cat([turned[..., 0], turned[..., 1]], dim=-1))


def test_tail_rotation_equals_the_one_out_of_place() -> None:
    config = ModelConfig.preset("tiny")
    x = torch.randn(2, 5, 3, 10 + config.rope_dim)
    now = turn(config, 5)[:, None]
    expected = torch.cat([x[..., :10], rotate_interleaved(x[..., 10:], now)], dim=-1)
    torch.testing.assert_close(rotate_tail_(x.clone(), now), expected)


def test_scores_depend_on_distance_only() -> None:
    config = ModelConfig.preset("tiny")
    q, k = torch.randn(2, config.rope_dim)
    table = turn(config, 300)

    def score(i: int, j: int) -> float:
        return float(rotate_interleaved(q, table[i]) @ rotate_interleaved(k, table[j]))

    assert score(5, 3) == pytest.approx(score(292, 290), abs=1e-4)


def test_a_grown_table_keeps_its_rows() -> None:
    rope = Rope(ModelConfig.preset("tiny"))
    short = rope.table(10, torch.device("cpu")).clone()
    assert torch.equal(rope.table(1000, torch.device("cpu"))[:10], short)
