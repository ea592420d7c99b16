"""Experts: grouped = loop, routing = the published code, the bias balances, the balance loss is the formula."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sputnik.model.config import ModelConfig
from sputnik.model.moe import Experts, Gate, MoE, loop_experts, update_bias

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
}


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.preset("tiny", **(SIZES | changes))


def random_gate(c: ModelConfig, bias: float = 0.3) -> Gate:
    gate = Gate(c)
    torch.nn.init.normal_(gate.weight, std=0.5)
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias.normal_(std=bias)
    return gate


def random_experts(c: ModelConfig) -> Experts:
    assert c.n_routed_experts is not None
    experts = Experts(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    return torch.autograd.grad((out.float() * weight).sum(), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [8, 3], ids=["all experts", "five experts empty"])
@pytest.mark.parametrize(("tokens", "by_kernels"), [(40, True), (40, False), (300, False)], ids=str)
def test_grouped_experts_equal_the_loop_with_gradients(
    dtype: torch.dtype, used: int, tokens: int, by_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens one after another, many in blocks; or by the kernels, where they take this type."""
    if not by_kernels:
        monkeypatch.setattr("sputnik.model.moe.fused.usable", lambda x: False)
    experts = random_experts(config())
    x = torch.randn(tokens, 24).to(dtype).requires_grad_()
    weights = torch.rand(tokens, 3).requires_grad_()
    chosen = torch.stack([torch.randperm(used)[:3] for _ in range(tokens)])
    inputs = [x, weights, *experts.parameters()]
    grouped, loop = experts(x, weights, chosen), loop_experts(experts, x, weights, chosen)
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.03}
    torch.testing.assert_close(grouped, loop, **tolerance)
    for ours, expected in zip(gradients(grouped, inputs), gradients(loop, inputs), strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, **tolerance)
        assert (ours.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


@pytest.mark.parametrize("tokens", [0, 1])
def test_grouped_experts_take_one_token_or_none(tokens: int) -> None:
    experts = random_experts(config())
    x, weights, chosen = torch.randn(tokens, 24), torch.rand(tokens, 3), torch.zeros(tokens, 3, dtype=torch.long)
    torch.testing.assert_close(experts(x, weights, chosen), loop_experts(experts, x, weights, chosen))


def test_a_constant_gradient_is_taken() -> None:
    """`out.sum().backward()` sends a gradient without strides of its own, which grouped products refuse."""
    c = config()
    moe = MoE(c, 0).train()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    moe(torch.randn(2, 5, 24), None)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())


def published(gate: Gate, x: Tensor) -> list[dict[int, float]]:
    """DeepSeek's routing, one token at a time: expert -> weight."""
    c, rows = gate.config, []
    assert c.n_routed_experts is not None
    for token in x:
        logits = gate.weight @ token
        score = (logits.sigmoid() if c.scoring_func == "sigmoid" else logits.softmax(dim=-1)).tolist()
        bias = gate.e_score_correction_bias
        selecting = score if bias is None else [s + b for s, b in zip(score, bias.tolist(), strict=True)]
        size = c.n_routed_experts // c.n_group
        groups = [selecting[g * size : (g + 1) * size] for g in range(c.n_group)]
        rank = [max(group) if bias is None else sum(sorted(group)[-2:]) for group in groups]
        open_groups = sorted(range(c.n_group), key=lambda g: -rank[g])[: c.topk_group]
        if c.topk_method == "greedy":
            open_groups = list(range(c.n_group))
        candidates = [e for e in range(c.n_routed_experts) if e // size in open_groups]
        chosen = sorted(candidates, key=lambda e: -selecting[e])[: c.num_experts_per_tok]
        total = sum(score[e] for e in chosen) if c.norm_topk_prob else 1.0
        rows.append({e: score[e] / total * c.routed_scaling_factor for e in chosen})
    return rows


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 2, "topk_group": 1},
        {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
        {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "group_limited_greedy"},
    ],
)
@torch.no_grad()
def test_routing_equals_the_published_code(changes: dict[str, Any]) -> None:
    gate = random_gate(config(**changes))
    x = torch.randn(64, 24)
    _, weights, chosen = gate(x)
    for w, e, expected in zip(weights.tolist(), chosen.tolist(), published(gate, x), strict=True):
        assert dict(zip(e, w, strict=True)) == pytest.approx(expected, abs=1e-5)


def test_a_closed_group_stays_closed_when_open_scores_are_negative() -> None:
    """Masking with 0 instead of -inf would let it in."""
    gate = random_gate(config())
    assert gate.e_score_correction_bias is not None
    gate.e_score_correction_bias.fill_(-5.0)
    chosen = gate(torch.randn(200, 24))[2]
    assert all(len({e // 2 for e in row}) <= gate.config.topk_group for row in chosen.tolist())


def test_the_bias_selects_and_never_weighs() -> None:
    gate = random_gate(config(n_group=1, topk_group=1), bias=0.0)
    x = torch.randn(50, 24)
    assert gate.e_score_correction_bias is not None
    gate.e_score_correction_bias[5] = 9.0
    scores, weights, chosen = gate(x)
    assert (chosen == 5).any(dim=1).all()
    torch.testing.assert_close(weights, 2.5 * scores.gather(1, chosen) / scores.gather(1, chosen).sum(1, keepdim=True))


def test_router_is_fp32_under_autocast() -> None:
    gate = random_gate(config())
    x = torch.randn(50, 24)
    exact = gate(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x)[0], exact)


def test_bias_steps_shrink_the_spread_of_loads() -> None:
    torch.manual_seed(0)
    c = config()
    moe = MoE(c, 0).train()
    moe.gate = random_gate(c, bias=0.0)
    moe.experts = random_experts(c)
    x = torch.randn(4, 128, 24) + 0.8

    def spread() -> float:
        load = moe(x, None)[1].load
        return float(load.max() / load.mean())

    before = spread()
    for _ in range(200):
        update_bias(moe.gate, moe(x, None)[1].load, 0.005)
    assert before > 1.5 and spread() < 1 + (before - 1) / 3


def test_bias_moves_against_the_load_by_the_given_speed() -> None:
    gate = random_gate(config(), bias=0.0)
    update_bias(gate, torch.tensor([0, 1, 2, 3, 4, 5, 6, 11]), 0.25)  # mean 4
    assert gate.e_score_correction_bias is not None
    assert gate.e_score_correction_bias.tolist() == [0.25, 0.25, 0.25, 0.25, 0.0, -0.25, -0.25, -0.25]


def test_balance_loss_and_load_equal_the_formula() -> None:
    c = config()
    moe = MoE(c, 0).train()
    moe.gate = random_gate(c)
    moe.experts = random_experts(c)
    x = torch.randn(3, 10, 24)
    valid = torch.arange(10) < torch.tensor([10, 4, 7])[:, None]
    route = moe(x, valid)[1]
    scores, _, chosen = moe.gate(x.flatten(0, 1))
    scores, chosen = scores.view(3, 10, 8), chosen.view(3, 10, 3)
    losses, load = [], [0] * 8
    for b, length in enumerate((10, 4, 7)):
        total = torch.tensor(0.0)
        for e in range(8):
            hits = int((chosen[b, :length] == e).sum())
            load[e] += hits
            p = (scores[b, :length, e] / scores[b, :length].sum(dim=-1)).mean()
            total = total + 8 / (3 * length) * hits * p
        losses.append(total)
    assert route.load.tolist() == load and route.balance_loss is not None
    torch.testing.assert_close(route.balance_loss, torch.stack(losses).mean())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(moe(x, valid)[1].balance_loss, route.balance_loss)
    assert moe.eval()(x, valid)[1].balance_loss is None


def test_balanced_routing_has_balance_loss_one() -> None:
    """sum_i f_i P_i is 1 when every expert gets its share, which makes alpha comparable between sizes."""
    c = config(n_group=1, topk_group=1, num_experts_per_tok=8)
    moe = MoE(c, 0).train()
    moe.gate = random_gate(c)
    moe.experts = random_experts(c)
    loss = moe(torch.randn(2, 10, 24), None)[1].balance_loss
    assert loss is not None and loss.item() == pytest.approx(1.0)


def test_masked_tokens_change_no_output() -> None:
    c = config()
    moe = MoE(c, 0)
    moe.gate, moe.experts = random_gate(c), random_experts(c)
    x = torch.randn(2, 6, 24)
    mask = torch.rand(2, 6) < 0.5
    assert torch.equal(moe(x, mask)[0], moe(x, None)[0])


@torch.no_grad()
def test_replayed_routes_are_taken_and_weighed_by_the_gate_itself(build: Any) -> None:
    model = build(num_hidden_layers=4)
    ids = torch.randint(0, 101, (2, 9))
    plain = model.trunk(ids)
    routes = torch.stack([route.chosen.view(2, 9, -1) for route in plain.routes])
    assert torch.equal(model.trunk(ids, routes=routes).hidden, plain.hidden)
    assert torch.equal(model.trunk(ids, routes=torch.full_like(routes, -1)).hidden, plain.hidden)
    other = (routes + 1) % 8
    replayed = model.trunk(ids, routes=other)
    assert all(torch.equal(route.chosen.view(2, 9, -1), own) for route, own in zip(replayed.routes, other, strict=True))
    assert not torch.allclose(replayed.hidden, plain.hidden)
