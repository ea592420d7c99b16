"""Grouped-query attention against its formula; equality with transformers is in test_parity.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from sputnik.model.gqa import GQA
from sputnik.model.rope import rotate_halves
from sputnik.model.transformer import Transformer

Build = Callable[..., Transformer]


def written_plainly(gqa: GQA, x: Tensor, turn: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    q = rotate_halves(gqa.q_proj(x).view(batch, tokens, gqa.heads, -1), turn[:, :, None])
    k = rotate_halves(gqa.k_proj(x).view(batch, tokens, gqa.key_heads, -1), turn[:, :, None])
    v = gqa.v_proj(x).view(batch, tokens, gqa.key_heads, -1)
    out = torch.zeros_like(q)
    for h in range(gqa.heads):
        g = h * gqa.key_heads // gqa.heads
        score = torch.einsum("btd,bsd->bts", q[:, :, h], k[:, :, g]) * q.shape[-1] ** -0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        out[:, :, h] = score.masked_fill(future, float("-inf")).softmax(dim=-1) @ v[:, :, g]
    return gqa.o_proj(out.flatten(2))


def attention(model: Transformer) -> GQA:
    module = model.model.layers[0].self_attn
    assert isinstance(module, GQA)
    return module


def test_grouped_queries_equal_the_formula_with_gradients(build: Build) -> None:
    model = build("dense")
    gqa, here = attention(model), model._pass(7, torch.device("cpu"), None)
    x = torch.randn(2, 7, 48, requires_grad=True)
    inputs, target = [x, *gqa.parameters()], torch.randn(2, 7, 48)
    fast, plain = gqa(x, here), written_plainly(gqa, x, here.turn)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)
    by_fast = torch.autograd.grad((fast * target).sum(), inputs)
    for ours, expected in zip(by_fast, torch.autograd.grad((plain * target).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_biases_are_where_the_family_has_them(build: Build) -> None:
    def biased(model: Transformer) -> set[str]:
        return {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("bias")}

    assert biased(build("dense")) == {"q_proj", "k_proj", "v_proj"}
    assert biased(build("dense", model_type="llama", attention_bias=True)) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert biased(build("dense", model_type="llama")) == set()
