"""Each training kernel equals its slow twin, in values and gradients."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sputnik.hardware import multiplies_bf16
from sputnik.model.head import IGNORE, head_loss, loss_error_
from sputnik.model.kernels import fused, load
from sputnik.model.moe import Experts, loop_experts
from sputnik.model.rope import rotate_halves, rotate_interleaved
from sputnik.model.transformer import Transformer
from tests.model.conftest import Build

pytestmark = pytest.mark.skipif(not load(), reason="the kernels are not built on this machine")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def turns(positions: int, half: int) -> Tensor:
    angles = torch.arange(positions)[:, None] * torch.rand(half)
    return torch.polar(torch.full_like(angles, 1.1), angles)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Sequence[int]], scale: float) -> Tensor:
    """Row by row of a mask over all N rows: (N, H, Q), (N, H, Q), (N, H, V), all rotated."""
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for start, count, prefix, length in segments:
        for row in range(count):
            seen[start + row, start : start + row + 1] = True
            seen[start + row, prefix : prefix + length] = True
    scores = torch.einsum("nhq,mhq->hnm", q, k) * scale
    return torch.einsum("hnm,mhv->nhv", scores.masked_fill(~seen, float("-inf")).softmax(dim=-1), v)


def positions(segments: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([torch.arange(length, length + count) for _, count, _, length in segments])


SEGMENTS = {
    "one": [[0, 3, 0, 0]],
    "long": [[0, 130, 0, 0]],
    "batch": [[0, 70, 0, 0], [70, 70, 0, 0]],
    "prompts": [[0, 5, 0, 0], [5, 70, 0, 5], [75, 1, 0, 5], [76, 20, 0, 0], [96, 9, 76, 20], [105, 30, 76, 20]],
}


def gradients(out: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel()).sin().view_as(out)
    return torch.autograd.grad((out.float() * weights).sum(), inputs)


def require_equal(ours: Tensor, twin: Tensor, inputs: Sequence[Tensor], atol: float = 2e-5) -> None:
    assert ours.dtype == twin.dtype
    torch.testing.assert_close(ours, twin, atol=atol, rtol=1e-4)
    for got, expected in zip(gradients(ours, inputs), gradients(twin, inputs), strict=True):
        torch.testing.assert_close(got, expected, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("name", list(SEGMENTS))
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 16), (3, 1, 10), (2, 2, 70)])
def test_causal_attention_with_rotations_inside(name: str, heads: int, groups: int, width: int) -> None:
    segments = SEGMENTS[name]
    rows = sum(count for _, count, _, _ in segments)
    q, k, v = random(rows, heads, width), random(rows, groups, width), random(rows, groups, width)
    turn = turns(256, width // 2)
    ours = fused.causal(q, k, v, turn, torch.tensor(segments), 0.3)
    at = turn[positions(segments)][:, None]
    keys, values = (t.repeat_interleave(heads // groups, dim=1) for t in (rotate_halves(k, at), v))
    require_equal(ours, plain_attention(rotate_halves(q, at), keys, values, segments, 0.3), [q, k, v])


@pytest.mark.parametrize("name", list(SEGMENTS))
def test_latent_attention_with_rotations_inside(name: str) -> None:
    segments, heads, nope, rope, value = SEGMENTS[name], 3, 12, 8, 10
    rows = sum(count for _, count, _, _ in segments)
    q, up, key = random(rows, heads, nope + rope), random(rows, heads, nope + value), random(rows, rope)
    turn = turns(256, rope // 2)
    ours = fused.causal_latent(q, up, key, turn, torch.tensor(segments), 0.3)
    at = turn[positions(segments)][:, None]
    shared = rotate_interleaved(key[:, None], at).expand(-1, heads, -1)
    query = torch.cat([q[..., :nope], rotate_interleaved(q[..., nope:], at)], dim=-1)
    keys = torch.cat([up[..., :nope], shared], dim=-1)
    require_equal(ours, plain_attention(query, keys, up[..., nope:], segments, 0.3), [q, up, key])


def test_a_prefix_without_gradient_of_its_own_gets_that_of_its_answers() -> None:
    """Only the answers' outputs are used: the prompt's keys still learn."""
    q, k, v = (random(9, 2, 8) for _ in range(3))
    out = fused.causal(q, k, v, turns(16, 4), torch.tensor([[0, 4, 0, 0], [4, 5, 0, 4]]), 1.0)
    grad_k, grad_v = torch.autograd.grad(out[4:].sum(), [k, v])
    assert grad_k[:4].any() and grad_v[:4].any()


@pytest.fixture(params=[False, True], ids=["single", "pairs"])
def pairs(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Products of bf16 values by the BLAS in fp32, or in pairs where the CPU can."""
    torch.ops.sputnik.set_bf16_dot(request.param)
    yield request.param
    torch.ops.sputnik.set_bf16_dot(multiplies_bf16())


@pytest.mark.parametrize("name", list(SEGMENTS))
@pytest.mark.parametrize(("heads", "groups", "width"), [(2, 2, 16), (4, 2, 64), (3, 1, 10), (2, 1, 70)])
def test_attention_in_bf16_is_rounded_attention(name: str, heads: int, groups: int, width: int, pairs: bool) -> None:
    segments = SEGMENTS[name]
    rows = sum(count for _, count, _, _ in segments)
    low = [random(rows, n, width, dtype=torch.bfloat16) for n in (heads, groups, groups)]
    high = [t.detach().float().requires_grad_() for t in low]
    rest = turns(256, width // 2), torch.tensor(segments), width**-0.5
    ours, exact = fused.causal(*low, *rest), fused.causal(*high, *rest)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact, atol=0.05, rtol=0.02)
    assert float((ours - exact).detach().norm() / exact.detach().norm()) < 0.01
    for got, expected in zip(gradients(ours, low), gradients(exact, high), strict=True):
        assert float((got.float() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("name", list(SEGMENTS))
@pytest.mark.parametrize(("nope", "rope", "value"), [(12, 8, 10), (16, 8, 32), (5, 2, 7)])
def test_latent_attention_in_bf16_is_rounded_attention(
    name: str, nope: int, rope: int, value: int, pairs: bool
) -> None:
    segments = SEGMENTS[name]
    rows = sum(count for _, count, _, _ in segments)
    shapes = ((rows, 3, nope + rope), (rows, 3, nope + value), (rows, rope))
    low = [random(*shape, dtype=torch.bfloat16) for shape in shapes]
    high = [t.detach().float().requires_grad_() for t in low]
    turn, table = turns(256, rope // 2), torch.tensor(segments)
    ours, exact = fused.causal_latent(*low, turn, table, 0.3), fused.causal_latent(*high, turn, table, 0.3)
    assert float((ours - exact).detach().norm() / exact.detach().norm()) < 0.01
    for got, expected in zip(gradients(ours, low), gradients(exact, high), strict=True):
        assert float((got.float() - expected).norm() / expected.norm()) < 0.02


def test_attention_tells_of_nan_and_of_segments_that_cannot_be() -> None:
    q, k, v = (random(4, 1, 8) for _ in range(3))
    with torch.no_grad():
        q[2] = torch.nan
    out = fused.causal(q, k, v, turns(8, 4), torch.tensor([[0, 4, 0, 0]]), 1.0)
    assert out[2].isnan().all() and not out[[0, 1, 3]].isnan().any()
    wrong = [[[0, 9, 0, 0]], [[2, 2, 0, 2]], [[2, 3, 0, 0]], [[0, 2, 0, 0], [2, 2, 0, 1]]]
    for segments in [*wrong, [[0, 3, 0, 0]], [[0, 2, 0, 0], [1, 3, 0, 0]]]:  # a row in none, a row in two
        with pytest.raises(RuntimeError, match="attention:"):
            fused.causal(q, k, v, turns(8, 4), torch.tensor(segments), 1.0)


def test_what_a_kernel_would_read_past_is_refused() -> None:
    q, low = random(4, 2, 8), random(4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="Float on the CPU is needed, not BFloat16"):
        fused.causal(q, low, q, turns(8, 4), torch.tensor([[0, 4, 0, 0]]), 1.0)
    with pytest.raises(RuntimeError, match="rows do not fit"):
        fused.causal(q, q[:3], q, turns(8, 4), torch.tensor([[0, 4, 0, 0]]), 1.0)
    with pytest.raises(RuntimeError, match="sizes do not fit"):
        torch.ops.sputnik.swiglu_forward(torch.ones(2, 8), torch.ones(1, 8))
    with pytest.raises(RuntimeError, match="target for each row"):
        fused.loss_error_(torch.ones(3, 8), torch.zeros(2, dtype=torch.long))


def test_norm_takes_the_gradient_of_a_plain_sum() -> None:
    """Which is one number, seen as many."""
    x, weight = random(3, 5), random(5)
    inputs = [x, weight]
    ours = torch.autograd.grad(fused.rms_norm(x, weight, 1e-5).sum(), inputs)
    for got, expected in zip(ours, torch.autograd.grad(F.rms_norm(x, (5,), weight, 1e-5).sum(), inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(1, 5), (3, 70, 48), (130, 33)])
@pytest.mark.parametrize("strided", [False, True])
def test_norm_with_and_without_a_sum(shape: tuple[int, ...], strided: bool) -> None:
    wide = random(*shape[:-1], shape[-1] + (7 if strided else 0))
    x, delta, weight = wide[..., : shape[-1]], random(*shape), random(shape[-1])
    twin = F.rms_norm(x, weight.shape, weight, 1e-5)
    require_equal(fused.rms_norm(x, weight, 1e-5), twin, [wide, weight], 1e-4)
    for use in (lambda total, out: out, lambda total, out: total, lambda total, out: total.sin() * out):
        plain = x + delta
        twin = use(plain, F.rms_norm(plain, weight.shape, weight, 1e-5))
        require_equal(use(*fused.add_rms_norm(x, delta, weight, 1e-5)), twin, [wide, delta], 1e-4)


@pytest.mark.parametrize("x_type", fused.TYPES)
@pytest.mark.parametrize("out_type", fused.TYPES)
def test_norm_rounds_what_comes_in_and_goes_out_in_bf16(x_type: torch.dtype, out_type: torch.dtype) -> None:
    """The numbers of a norm in fp32 between casts, bit for bit."""
    x, weight = random(70, 33, dtype=x_type), random(33)
    ours = fused.rms_norm(x, weight, 1e-5, out_type)
    twin = fused.rms_norm(x.float(), weight, 1e-5).to(out_type)
    assert torch.equal(ours, twin) and ours.dtype == out_type
    assert all(map(torch.equal, gradients(ours, [x, weight]), gradients(twin, [x, weight])))
    base = random(70, 33)
    for use in (lambda total, out: out, lambda total, out: total, lambda total, out: total.sin() * out):
        ours = use(*fused.add_rms_norm(base, x, weight, 1e-5, out_type))
        total, out = fused.add_rms_norm(base, x.float(), weight, 1e-5)
        twin, inputs = use(total, out.to(out_type)), [base, x]
        assert torch.equal(ours, twin)
        assert all(map(torch.equal, gradients(ours, inputs), gradients(twin, inputs)))


@pytest.mark.parametrize("rows", [1, 70])
def test_feed_forward_block(rows: int) -> None:
    x, gate, up, down = random(rows, 20), random(37, 20), random(37, 20), random(20, 37)
    twin = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    require_equal(fused.mlp(x, gate, up, down), twin, [x, gate, up, down], 1e-3)


def test_swiglu_in_bf16_is_the_rounded_one() -> None:
    gate, up = (random(70, 33, dtype=torch.bfloat16).detach() for _ in range(2))
    exact = F.silu(gate.float()) * up.float()
    torch.testing.assert_close(torch.ops.sputnik.swiglu_forward(gate, up).float(), exact, atol=0, rtol=0.005)


@pytest.mark.parametrize("rows", [1, 5, 700])
def test_experts_equal_the_loop(rows: int) -> None:
    """With an expert nobody chose, and one with more rows than a block holds."""
    experts = Experts(6, 20, 12)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(rows)])
    chosen[: rows // 2] = torch.tensor([0, 5])
    x, weights = random(rows, 20), random(rows, 2)
    inputs = [x, weights, experts.gate_up_proj, experts.down_proj]
    ours = fused.experts(x, weights, chosen, experts.gate_up_proj, experts.down_proj)
    require_equal(ours, loop_experts(experts, x, weights, chosen), inputs, 1e-4)


# --- products under bf16 autocast on CPUs that multiply fp32 faster ---


@pytest.fixture
def slow_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "multiplies_bf16", lambda: False)


@pytest.mark.parametrize(("left", "right"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_products_are_exact_products_of_rounded_values(left: bool, right: bool, dtype: torch.dtype) -> None:
    a, b = torch.randn(70, 33).to(dtype), torch.randn(33, 45).to(dtype)
    exact = a.bfloat16().double() @ b.bfloat16().double()
    a, b = a.t().contiguous() if left else a, b.t().contiguous() if right else b
    wide, narrow = (fused.product(a, left, b, right, narrow=narrow) for narrow in (False, True))
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(wide.double(), exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(narrow, wide.bfloat16())


def test_a_narrow_product_keeps_nan_and_refuses_what_does_not_fit() -> None:
    a = torch.full((2, 3), torch.nan)
    assert fused.product(a, False, torch.ones(3, 1), False).isnan().all()
    assert not fused.product(torch.ones(2, 0), False, torch.ones(0, 3), False).any()
    with pytest.raises(RuntimeError, match="do not fit"):
        fused.product(a, True, torch.ones(3, 1), False)


@pytest.mark.parametrize("rows", [1, 5, 700])
def test_narrow_experts_are_the_loop_over_rounded_ones(rows: int) -> None:
    experts = Experts(6, 20, 12)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.data.bfloat16().float()
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(rows)])
    x, weights = random(rows, 20, dtype=torch.bfloat16), random(rows, 2)
    inputs = [x, weights, experts.gate_up_proj, experts.down_proj]
    ours = fused.experts(x, weights, chosen, experts.gate_up_proj, experts.down_proj)
    twin = loop_experts(experts, x.float(), weights, chosen)
    assert ours.dtype == torch.bfloat16
    assert float((ours - twin).detach().norm()) < 0.005 * float(twin.detach().norm())
    for got, expected in zip(gradients(ours, inputs), gradients(twin, inputs), strict=True):
        assert float((got - expected).norm() / expected.norm()) < 0.01


@pytest.mark.usefixtures("slow_bf16")
@pytest.mark.parametrize(("family", "changes"), [("deepseek", {}), ("dense", {}), ("dense", {"model_type": "qwen2"})])
def test_autocast_by_fp32_units_is_as_near_to_fp32_as_torch_s(
    family: str, changes: dict[str, str], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three differ by rounding alone: ours is no further from fp32 than torch's bf16 products are."""
    model, ids = build(family, **changes), torch.randint(101, (2, 33))

    def found() -> Tensor:
        loss = head_loss(model.trunk(ids).hidden.flatten(0, 1), model.lm_head.weight, ids.flatten())
        used = [p for p in model.parameters() if p.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, used, allow_unused=True) if g is not None])

    exact = found()
    with torch.autocast("cpu", torch.bfloat16):
        ours = found()
        monkeypatch.setattr(fused, "multiplies_bf16", lambda: True)
        theirs = found()
    distance, bound = (ours - exact).norm(), (theirs - exact).norm()
    assert 0 < distance < 1.1 * bound


def test_loss_and_its_gradient_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(70, 101) * 5, torch.randint(101, (70,))
    targets[[0, 69]] = IGNORE
    ours, twin = logits.clone(), logits.clone()
    loss = loss_error_(ours, targets)
    monkeypatch.setattr(fused, "usable", lambda x: False)
    torch.testing.assert_close(loss, loss_error_(twin, targets))
    torch.testing.assert_close(ours, twin, atol=1e-6, rtol=1e-5)
    assert not ours[0].any()


def loss_and_gradients(model: Transformer, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = model(ids).log_softmax(dim=-1)[..., 7].mean()
    used = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), [g for g in torch.autograd.grad(loss, used, allow_unused=True) if g is not None]


@pytest.mark.parametrize("family", ["deepseek", "dense"])
def test_model_without_kernels_computes_the_same(family: str, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(family), torch.randint(101, (2, 33))
    loss, found = loss_and_gradients(model, ids)
    monkeypatch.setattr(fused, "usable", lambda x: False)
    twin, expected = loss_and_gradients(model, ids)
    torch.testing.assert_close(loss, twin, atol=1e-6, rtol=1e-6)
    assert len(found) == len(expected) > 10
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-3)


def test_numbers_do_not_depend_on_threads(build: Build) -> None:
    model, ids, results = build(), torch.randint(101, (3, 70)), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(loss_and_gradients(model, ids))
    finally:
        torch.set_num_threads(before)
    for got, want in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-4)
