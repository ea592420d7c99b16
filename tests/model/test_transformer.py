"""The whole model: causality, reproducible weights, names, autocast and its lowered copy."""

import time
from collections.abc import Callable

import pytest
import torch

from sputnik.model.cache import Cache
from sputnik.model.config import ModelConfig
from sputnik.model.moe import MoE
from sputnik.model.transformer import Transformer

Build = Callable[..., Transformer]


@torch.no_grad()
@pytest.mark.parametrize("family", ["deepseek", "dense"])
def test_a_token_changes_nothing_before_it(build: Build, family: str) -> None:
    model = build(family)
    ids = torch.randint(101, (1, 10))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 101
    moved = (model(ids) - model(changed)).abs().amax(dim=-1)[0] > 1e-6
    assert moved.tolist() == [False] * 6 + [True] * 4


def test_weights_depend_on_the_generator_alone() -> None:
    config = ModelConfig.preset("tiny", num_hidden_layers=2)
    torch.manual_seed(1)
    one = Transformer(config).init_weights(torch.Generator().manual_seed(5)).state_dict()
    torch.manual_seed(2)
    two = Transformer(config).init_weights(torch.Generator().manual_seed(5)).state_dict()
    other = Transformer(config).init_weights(torch.Generator().manual_seed(6)).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_initial_spread_is_the_configured_one() -> None:
    model = Transformer(ModelConfig.preset("tiny", initializer_range=0.006)).init_weights(torch.Generator())
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.001, name


def test_a_fresh_model_knows_nothing() -> None:
    """Its loss is ln(vocabulary), on both presets that we train."""
    for name in ("tiny", "mini"):
        config = ModelConfig.preset(name, num_hidden_layers=2)
        model = Transformer(config).init_weights(torch.Generator().manual_seed(0)).eval()
        ids = torch.randint(config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(torch.tensor(float(config.vocab_size)).log().item(), abs=0.15)


def test_tied_head_is_one_parameter(build: Build) -> None:
    model = build("dense", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(list(model.parameters())) == len(list(build("dense").parameters())) - 1


@pytest.mark.parametrize("family", ["deepseek", "dense"])
def test_lowered_copy_computes_what_autocast_computes(build: Build, family: str) -> None:
    model = build(family)
    low = model.lowered(torch.bfloat16)
    ids = torch.randint(101, (2, 12))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(ids)
        assert torch.equal(low(ids), expected)
    assert low.lm_head.weight is model.lm_head.weight and not low.training
    assert torch.equal(model(ids), build(family)(ids)), "the model itself is untouched"


@torch.no_grad()
def test_lowered_decode_stays_near_its_prefill(build: Build) -> None:
    """With the prefill's experts: rounding may choose others, whose outputs are not near at all."""
    low = build().lowered(torch.bfloat16)
    ids = torch.randint(101, (2, 12))
    whole, cache = low.trunk(ids), Cache.empty(low.config, 2, 12, torch.bfloat16)
    routes, full = torch.stack([route.chosen.view(2, 12, -1) for route in whole.routes]), low.head(whole.hidden)
    low.trunk(ids[:, :8], cache, routes=routes[:, :, :8])
    steps = [low.trunk(ids[:, i : i + 1], cache, routes=routes[:, :, i : i + 1]) for i in range(8, 12)]
    decoded = torch.cat([low.head(step.hidden) for step in steps], dim=1)
    assert (decoded - full[:, 8:]).abs().mean() < 0.02 * full.abs().mean()


def test_autocast_training_keeps_gradients_near_fp32(build: Build) -> None:
    """bf16 products under autocast: every gradient keeps its direction."""
    model = build(num_experts_per_tok=4, topk_group=2).train()
    ids = torch.randint(101, (4, 16))

    def gradient() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        model.trunk(ids).hidden.square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and n != "lm_head.weight"}

    exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradient()
    assert exact.keys() == rough.keys()
    for name, grad in exact.items():
        assert rough[name].dtype == torch.float32
        assert torch.cosine_similarity(grad.flatten(), rough[name].flatten(), dim=0) > 0.97, name


def test_gates_are_found_under_the_layer_of_their_route(build: Build) -> None:
    model = build(num_nextn_predict_layers=1)
    ids = torch.randint(101, (2, 8))
    trunk = model.trunk(ids)
    layers = [r.layer for r in (*trunk.routes, *model.mtp_hidden(trunk.residual, ids).routes)]
    assert layers == sorted(model.gates()) == [1, 2, 3]
    last = model.model.layers[2].mlp
    assert isinstance(last, MoE) and model.gates()[2] is last.gate


def test_token_mask_reaches_the_loads(build: Build) -> None:
    model = build()
    ids, lengths = torch.randint(101, (2, 8)), torch.tensor([3, 5])
    mask = torch.arange(8) < lengths[:, None]
    for route in (*model.trunk(ids, token_mask=mask).routes, *model.trunk(ids, lengths=lengths).routes):
        assert route.load.sum() == 8 * model.config.num_experts_per_tok and route.chosen.shape == (16, 2)


def test_v3_is_built_without_memory_in_seconds() -> None:
    start = time.process_time()
    with torch.device("meta"):
        Transformer(ModelConfig.preset("v3-671b"))
    assert time.process_time() - start < 20
