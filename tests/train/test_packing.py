"""Packed sequences without padding and with shared prompts give the hidden states and gradients of padded ones."""

import pytest
import torch
from torch import Tensor

from sputnik.model.config import ModelConfig
from sputnik.model.kernels import load
from sputnik.model.transformer import Transformer
from sputnik.train.packing import Layout, packed, padded

pytestmark = pytest.mark.skipif(not load(), reason="the kernels are not built on this machine")

SHAPES = {
    "latent and experts": {
        "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    },
    "grouped queries": {"model_type": "qwen2", "num_key_value_heads": 2},
}  # fmt: skip


def model(name: str) -> Transformer:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.2}
    generator = torch.Generator().manual_seed(0)
    return Transformer(ModelConfig(**{**sizes, **heads, **SHAPES[name]})).init_weights(generator).eval()


def sequences() -> tuple[Tensor, Tensor, Tensor]:
    """ids, lengths, prompts: two questions, one of them twice, answers of 1 to 40 tokens."""
    torch.manual_seed(0)
    lengths, prompts = torch.tensor([45, 6, 25, 30]), torch.tensor([5, 5, 7, 5])
    ids = torch.randint(61, (4, 45))
    ids[1, :5] = ids[3, :5] = ids[0, :5]
    return ids, lengths, prompts


def states_and_gradients(net: Transformer, layout: Layout, used: Tensor) -> tuple[Tensor, list[Tensor]]:
    trunk = net.trunk(layout.ids, segments=layout.segments)
    hidden = trunk.hidden.flatten(0, 1)[layout.place][used]
    loss = (hidden * torch.linspace(-1, 1, hidden.numel()).sin().view_as(hidden)).sum()
    weights = [p for p in net.parameters() if p is not net.lm_head.weight]
    return hidden, [g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]


@pytest.mark.parametrize("name", list(SHAPES))
def test_packed_equals_padded(name: str) -> None:
    net, (ids, lengths, prompts) = model(name), sequences()
    used = torch.arange(45) < lengths[:, None] - 1
    dense = packed(ids, lengths, prompts)
    ours, found = states_and_gradients(net, dense, used)
    plain, expected = states_and_gradients(net, padded(ids), used)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    assert len(found) == len(expected) > 10
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-3 * float(want.abs().max()), rtol=1e-3)


def test_a_prompt_stands_once_and_the_last_token_not_at_all() -> None:
    ids, lengths, prompts = sequences()
    layout = packed(ids, lengths, prompts)
    assert layout.segments is not None and layout.ids.shape == (1, 5 + 39 + 0 + 7 + 17 + 24 + 4)
    segments = [[0, 5, 0, 0], [5, 39, 0, 5], [44, 7, 0, 0], [51, 17, 44, 7], [68, 24, 0, 5], [92, 4, 0, 0]]
    assert layout.segments.tolist() == segments
    used = torch.arange(45) < lengths[:, None] - 1
    assert torch.equal(layout.ids[0][layout.place][used], ids[used])
