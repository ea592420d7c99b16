"""Prediction modules: lengths, causality, sharing; equality with transformers' module is in test_parity.py."""

from collections.abc import Callable

import torch

from sputnik.model.head import head_loss
from sputnik.model.transformer import Transformer

Build = Callable[..., Transformer]


def test_depth_k_has_k_positions_less(build: Build) -> None:
    model = build(num_nextn_predict_layers=2)
    ids = torch.randint(101, (3, 10))
    trunk = model.trunk(ids)
    ahead = model.mtp_hidden(trunk.residual, ids)
    assert [tuple(hidden.shape) for hidden in ahead.hidden] == [(3, 9, 48), (3, 8, 48)]
    assert [route.layer for route in ahead.routes] == [3, 4]
    assert [route.layer for route in trunk.routes] == [1, 2]


@torch.no_grad()
def test_position_sees_the_tokens_it_may_and_no_later_one(build: Build) -> None:
    """Position i of depth k reads tokens 0..i+k and predicts i+k+1."""
    model = build(num_nextn_predict_layers=2)
    ids = torch.randint(101, (1, 12))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 101
    before, after = (model.mtp_hidden(model.trunk(i).residual, i).hidden for i in (ids, changed))
    for k, (b, a) in enumerate(zip(before, after, strict=True), start=1):
        moved = ((b - a).abs().amax(dim=-1)[0] > 1e-4).tolist()
        assert moved == [i + k >= 7 for i in range(12 - k)]


def test_embedding_and_head_are_shared_and_learn_from_it(build: Build) -> None:
    model = build(num_nextn_predict_layers=1).train()
    assert not any("embed" in name or "head" in name for name, _ in model.mtp.named_parameters())
    ids = torch.randint(101, (2, 10))
    (hidden,) = model.mtp_hidden(model.trunk(ids).residual, ids).hidden
    head_loss(hidden[:, :-1].flatten(0, 1), model.lm_head.weight, ids[:, 2:].flatten()).backward()
    assert model.model.embed_tokens.weight.grad is not None and model.lm_head.weight.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.mtp.parameters())
