"""Each Triton kernel against its twin over random ragged shapes: with a GPU on it (`pytest -m gpu`), and without one
in Triton's interpreter, which is how `test_gpu_interpreter.py` runs this file."""

import os

import pytest
import torch
from torch import Tensor

from sputnik.model.fp8 import quantise
from sputnik.model.gpu.attention import paged_attention, plain_attention
from sputnik.model.gpu.experts import grouped_experts, plain_experts
from sputnik.model.gpu.fp8 import Fp8Matrix, fp8_product, plain_fp8_product, plain_quantise_groups, quantise_groups
from sputnik.model.gpu.layout import Layout
from sputnik.model.moe import Experts, loop_experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device, or TRITON_INTERPRET=1"),
]
MLA_SMALL, MLA_V3 = Layout(1, 24 + 8, 24, shared=True), Layout(1, 512 + 64, 512, shared=True)
GQA_FEW, GQA_ODD, GQA_ONE = (Layout(heads, width, width, shared=False) for heads, width in ((2, 64), (3, 20), (1, 32)))
FP32, BF16 = torch.float32, torch.bfloat16
BOUND = {FP32: 2e-5, BF16: 2e-2}


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def whole(low: int, high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# --- attention ---


@pytest.mark.parametrize(
    ("layout", "heads", "lengths", "size", "dtype"),
    [
        (MLA_SMALL, 4, [1, 2, 63, 64, 65, 130], 4, FP32),
        (MLA_SMALL, 20, [300], 16, BF16),
        (MLA_V3, 16, [33, 7], 16, BF16),
        (GQA_FEW, 6, [1, 17, 200], 16, BF16),
        (GQA_ODD, 3, [5, 64, 100, 31], 8, FP32),
        (GQA_ONE, 40, [70, 9], 16, FP32),
    ],
)
def test_paged_attention_is_that_of_gathered_pages(
    layout: Layout, heads: int, lengths: list[int], size: int, dtype: torch.dtype
) -> None:
    width = layout.key if layout.shared else 2 * layout.key_heads * layout.key
    pages = -(-max(lengths) // size) + 2  # two more than any needs: those must not be read
    free = torch.randperm(len(lengths) * pages, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    tables = free.view(len(lengths), pages).int()
    cache = numbers(len(free) + 1, size, width, seed=2, dtype=dtype)
    cache[-1] = float("nan")
    for row, length in enumerate(lengths):
        tables[row, -(-length // size) :] = len(free)
    query = numbers(len(lengths), heads, layout.key, seed=3, dtype=dtype)
    arguments = (query, cache, tables, torch.tensor(lengths, device=DEVICE), layout.key**-0.5, layout)
    ours = paged_attention(*arguments)
    theirs = plain_attention(query, cache.nan_to_num(), *arguments[2:])
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=BOUND[dtype], rtol=BOUND[dtype])


def test_a_row_of_paged_attention_does_not_see_the_others() -> None:
    cache, query = numbers(9, 8, 32, seed=0), numbers(3, 4, 32, seed=1)
    tables, lengths = whole(0, 9, 3, 3, seed=2).int(), torch.tensor([5, 24, 11], device=DEVICE)
    batch = paged_attention(query, cache, tables, lengths, 0.2, MLA_SMALL)
    for row in range(3):
        own = slice(row, row + 1)
        alone = paged_attention(query[own], cache, tables[own], lengths[own], 0.2, MLA_SMALL)
        torch.testing.assert_close(batch[own], alone, atol=2e-6, rtol=2e-6)


# --- experts ---


@pytest.mark.parametrize(
    ("tokens", "chosen", "experts", "hidden", "width", "dtype"),
    [
        (1, 2, 8, 40, 24, FP32),
        (7, 3, 5, 96, 70, BF16),
        (33, 4, 4, 64, 64, FP32),
        (90, 2, 3, 70, 130, BF16),
        (5, 1, 40, 33, 17, FP32),
    ],
)
def test_grouped_experts_are_the_experts_one_by_one(
    tokens: int, chosen: int, experts: int, hidden: int, width: int, dtype: torch.dtype
) -> None:
    x = numbers(tokens, hidden, seed=0, dtype=dtype)
    weights = numbers(tokens, chosen, seed=1).sigmoid()
    picks = numbers(tokens, experts, seed=2).topk(chosen).indices
    gate_up = numbers(experts, 2 * width, hidden, seed=3, dtype=dtype) * hidden**-0.5
    down = numbers(experts, hidden, width, seed=4, dtype=dtype) * width**-0.5
    ours = grouped_experts(x, weights, picks, gate_up, down)
    theirs = plain_experts(x, weights, picks, gate_up, down)
    torch.testing.assert_close(ours, theirs, atol=BOUND[dtype], rtol=BOUND[dtype])


def test_experts_nobody_chose_cost_no_answer_and_one_may_take_all() -> None:
    x, weights = numbers(50, 32, seed=0), numbers(50, 1, seed=1)
    gate_up, down = numbers(6, 48, 32, seed=2), numbers(6, 32, 24, seed=3)
    for picks in (torch.full((50, 1), 5, device=DEVICE), torch.zeros(50, 1, dtype=torch.long, device=DEVICE)):
        ours = grouped_experts(x, weights, picks, gate_up, down)
        torch.testing.assert_close(ours, plain_experts(x, weights, picks, gate_up, down), atol=1e-3, rtol=1e-4)


def test_the_twin_of_the_experts_is_the_models_own_loop() -> None:
    module = Experts(6, 32, 24).to(DEVICE)
    with torch.no_grad():
        for seed, weight in enumerate(module.parameters()):
            weight.copy_(numbers(*weight.shape, seed=seed) * 0.2)
    x, weights, picks = numbers(9, 32, seed=5), numbers(9, 2, seed=6), numbers(9, 6, seed=7).topk(2).indices
    ours = plain_experts(x, weights, picks, module.gate_up_proj.detach(), module.down_proj.detach())
    torch.testing.assert_close(ours, loop_experts(module, x, weights, picks).detach(), atol=1e-5, rtol=1e-5)


# --- FP8 ---


@pytest.mark.parametrize(("rows", "width"), [(1, 128), (3, 200), (17, 40), (8, 384)])
def test_groups_are_quantised_as_the_twin_does(rows: int, width: int) -> None:
    x = numbers(rows, width, seed=0) * numbers(rows, 1, seed=1).exp() * 10 ** numbers(rows, width, seed=2)
    x[0, :20] = 0
    (values, scales), (plain, plain_scales) = quantise_groups(x), plain_quantise_groups(x)
    torch.testing.assert_close(scales, plain_scales, atol=0, rtol=1e-6)
    if INTERPRETED:
        assert torch.equal(values.float(), plain.float())
    step = plain.float().abs() / 8 + 2.0**-9  # a GPU's division may be one bit off, which moves a tie
    assert bool(((values.float() - plain.float()).abs() <= step).all())


def test_quantised_groups_keep_nan() -> None:
    x = numbers(3, 256, seed=0)
    x[1, 130] = float("nan")
    assert quantise_groups(x)[1].isnan().tolist() == [[False, False], [False, True], [False, False]]
    assert Fp8Matrix.of(numbers(64, 256, seed=1)).product(x).isnan().all(dim=1).tolist() == [False, True, False]


def test_a_quantised_group_is_within_a_sixteenth() -> None:
    x = numbers(9, 300, seed=0)
    values, scales = quantise_groups(x)
    back = values.float() * scales.repeat_interleave(128, dim=1)[:, :300]
    step = scales.repeat_interleave(128, dim=1)[:, :300] * 2.0**-10
    assert bool(((back - x).abs() <= x.abs() / 16 + step).all())


@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 128, 64), (5, 300, 200), (70, 96, 130), (16, 512, 33)])
def test_an_fp8_product_is_that_of_the_dequantised_numbers(rows: int, inner: int, outer: int) -> None:
    values, scales = plain_quantise_groups(numbers(rows, inner, seed=0) * numbers(rows, 1, seed=1).exp())
    weight, weight_scales = quantise(numbers(outer, inner, seed=2))
    ours = fp8_product(values, scales, weight, weight_scales, torch.float32)
    theirs = plain_fp8_product(values, scales, weight, weight_scales, torch.float32)
    bound = 1e-5 if INTERPRETED else 1e-3  # tensor cores sum 128 products with about 14 bits
    torch.testing.assert_close(ours, theirs, atol=bound * float(theirs.abs().max()), rtol=0)


def test_an_fp8_matrix_multiplies_like_the_matrix_it_was_made_of() -> None:
    x, weight = numbers(20, 256, seed=0), numbers(100, 256, seed=1)
    ours, theirs = Fp8Matrix.of(weight).product(x), x @ weight.t()
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05
