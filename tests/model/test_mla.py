"""Absorbed attention is expanded attention, and its hand-written gradients are those of the formula."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sputnik.model.attention import Pass
from sputnik.model.cache import Cache
from sputnik.model.mla import MLA
from sputnik.model.rope import rotate_interleaved
from sputnik.model.transformer import Transformer

Build = Callable[..., Transformer]


def attention(model: Transformer) -> MLA:
    module = model.model.layers[0].self_attn
    assert isinstance(module, MLA)
    return module


def now(model: Transformer, tokens: int, cache: Cache | None = None) -> Pass:
    return model._pass(tokens, torch.device("cpu"), cache)


def written_plainly(mla: MLA, x: Tensor, turn: Tensor) -> Tensor:
    """Section 2.1.1 of the report, one head and one query at a time."""
    batch, tokens, _ = x.shape
    q = mla.q_b_proj(mla.q_a_layernorm(mla.q_a_proj(x))) if mla.compressed_queries else mla.q_proj(x)
    q = q.view(batch, tokens, mla.heads, -1)
    latent, shared = mla.kv_a_proj_with_mqa(x).split([mla.latent, mla.rope], dim=-1)
    up = mla.kv_b_proj(mla.kv_a_layernorm(latent)).view(batch, tokens, mla.heads, -1)
    out = x.new_zeros(batch, tokens, mla.heads, mla.value)
    for b in range(batch):
        for h in range(mla.heads):
            for t in range(tokens):
                query_rope = rotate_interleaved(q[b, t, h, mla.nope :], turn[0, t])
                keys_rope = rotate_interleaved(shared[b, : t + 1], turn[0, : t + 1])
                score = up[b, : t + 1, h, : mla.nope] @ q[b, t, h, : mla.nope] + keys_rope @ query_rope
                share = (score * mla.scale).softmax(dim=-1)
                out[b, t, h] = share @ up[b, : t + 1, h, mla.nope :]
    return mla.o_proj(out.flatten(2))


@pytest.mark.parametrize("q_lora_rank", [20, None])
def test_expanded_equals_the_formula_with_gradients(build: Build, q_lora_rank: int | None) -> None:
    model = build(q_lora_rank=q_lora_rank)
    mla, here = attention(model), now(model, 6)
    x = torch.randn(2, 6, 48, requires_grad=True)
    inputs = [x, *mla.parameters()]
    target = torch.randn(2, 6, 48)
    fast, plain = mla(x, here), written_plainly(mla, x, here.turn)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)
    by_fast = torch.autograd.grad((fast * target).sum(), inputs)
    by_plain = torch.autograd.grad((plain * target).sum(), inputs)
    for ours, expected in zip(by_fast, by_plain, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3])
def test_absorbed_equals_expanded(build: Build, tokens: int) -> None:
    model = build()
    mla = attention(model)
    x = torch.randn(3, 9, 48)
    expected = mla(x, now(model, 9))
    cache = Cache.empty(model.config, 3, 9)
    start = 9 - tokens * 2
    got = [mla(x[:, :start], now(model, start, cache))]
    cache.advance(start, None)
    for at in range(start, 9, tokens):
        got.append(mla(x[:, at : at + tokens], now(model, tokens, cache)))
        cache.advance(tokens, None)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_value_padding_changes_nothing(build: Build) -> None:
    """Equal widths of key and value take SDPA's flash path; the sum over padded zeros is the unpadded one."""
    q, k = torch.randn(2, 2, 4, 33, 20)
    v = torch.randn(2, 4, 33, 12)
    padded = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), is_causal=True)[..., :12]
    torch.testing.assert_close(padded, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-6, rtol=0)


@torch.no_grad()
def test_bf16_autocast_stays_near_fp32(build: Build) -> None:
    model = build()
    mla = attention(model)
    x = torch.randn(2, 9, 48)
    exact = mla(x, now(model, 9))
    with torch.autocast("cpu", torch.bfloat16):
        rough = mla(x.bfloat16(), now(model, 9))
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.03 * exact.abs().max()
