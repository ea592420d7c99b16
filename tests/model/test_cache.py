"""The cache: decoding with it is the full forward pass, for ragged right-padded prompts and any later shape."""

from collections.abc import Callable

import pytest
import torch

from sputnik.model.cache import Cache
from sputnik.model.transformer import Transformer

Build = Callable[..., Transformer]

FAMILIES = ("deepseek", "dense")


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(101, (4, 20), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([5, 8, 1, 3])


def after(model: Transformer, ids: torch.Tensor, lengths: torch.Tensor, cache: Cache, steps: int) -> torch.Tensor:
    """Feed `steps` more tokens of each row one by one; logits (B, steps, V)."""
    rows = torch.arange(len(ids))
    return torch.stack([model(ids[rows, lengths + i][:, None], cache)[:, 0] for i in range(steps)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decode_equals_the_full_forward(build: Build, family: str) -> None:
    model = build(family)
    ids, lengths = prompts()
    full, cache = model(ids), Cache.empty(model.config, 4, 16)
    prefill = model(ids[:, :8], cache, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(prefill[row, :length], full[row, :length], atol=1e-5, rtol=0)
    decoded = after(model, ids, lengths, cache, 8)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(decoded[row], full[row, length : length + 8], atol=1e-5, rtol=0)
    assert cache.lengths.tolist() == (lengths + 8).tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_several_ragged_tokens_at_once_equal_the_full_forward(build: Build, family: str) -> None:
    """A second right-padded chunk, and after it a single token over what the padding wrote."""
    model = build(family)
    ids, first = prompts()
    second = torch.tensor([2, 4, 3, 1])
    cache = Cache.empty(model.config, 4, 20)
    model.trunk(ids[:, :8], cache, lengths=first)
    chunk = torch.stack([ids[row, start : start + 4] for row, start in enumerate(first.tolist())])
    got, full = model(chunk, cache, lengths=second), model(ids)
    last = after(model, ids, first + second, cache, 1)
    for row, (start, length) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        torch.testing.assert_close(got[row, :length], full[row, start : start + length], atol=1e-5, rtol=0)
        torch.testing.assert_close(last[row, 0], full[row, start + length], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_influences_nothing(build: Build, family: str) -> None:
    model = build(family)
    ids, lengths = prompts()
    other = ids[:, :8].clone()
    for row, length in enumerate(lengths.tolist()):
        other[row, length:] = 100 - other[row, length:]
    results = []
    for prompt in (ids[:, :8], other):
        cache = Cache.empty(model.config, 4, 12)
        hidden = model.trunk(prompt, cache, lengths=lengths).hidden[torch.arange(4), lengths - 1]
        results.append((hidden, after(model, ids, lengths, cache, 3)))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_selected_rows_go_on_as_if_alone(build: Build, family: str) -> None:
    """Rows dropped, swapped and repeated: what a group of answers to one prompt needs."""
    model = build(family)
    ids, lengths = prompts()
    cache = Cache.empty(model.config, 4, 16)
    model.trunk(ids[:, :8], cache, lengths=lengths)
    rows = torch.tensor([3, 1, 1])
    chosen = cache.select(rows)
    got = after(model, ids[rows], lengths[rows], chosen, 4)
    for at, row in enumerate(rows.tolist()):
        expected = model(ids[row : row + 1])[0, lengths[row] : lengths[row] + 4]
        torch.testing.assert_close(got[at], expected, atol=1e-5, rtol=0)
    assert cache.lengths.tolist() == lengths.tolist(), "the old cache is untouched"


@torch.no_grad()
def test_bf16_rows_stay_near_fp32(build: Build) -> None:
    model = build()
    ids, lengths = prompts()
    exact, rough = (Cache.empty(model.config, 4, 16, dtype) for dtype in (torch.float32, torch.bfloat16))
    for cache in (exact, rough):
        model.trunk(ids[:, :8], cache, lengths=lengths)
    assert rough.bytes_per_token * 2 == exact.bytes_per_token == 3 * (24 + 8) * 4
    expected = after(model, ids, lengths, exact, 4)
    assert (after(model, ids, lengths, rough, 4) - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_full_cache_says_so(build: Build) -> None:
    model = build()
    cache = Cache.empty(model.config, 1, 4)
    with torch.no_grad():
        model.trunk(torch.zeros(1, 4, dtype=torch.long), cache)
        with pytest.raises(ValueError, match="cache of 4 slots is full"):
            model.trunk(torch.zeros(1, 1, dtype=torch.long), cache)
        with pytest.raises(ValueError, match="cache of 4 slots is full"):
            model.trunk(torch.zeros(1, 5, dtype=torch.long), Cache.empty(model.config, 1, 4))
