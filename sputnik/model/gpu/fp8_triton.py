"""`quantise_groups` and `fp8_product` in Triton.

Tensor cores sum E4M3 products with fewer than 32 bits; here they do so over 128 channels only, whose sums are then
scaled and added in fp32 (report 3.3.2).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sputnik.model.fp8 import LARGEST
from sputnik.model.gpu.tiles import row_tile

ROWS = 8


@triton.jit
def _round_e4m3(x) -> Any:
    """fp32 to the nearest number that E4M3 holds, ties to even, |x| <= 448. The cast of a GPU would do the same; that
    of the interpreter does not."""
    bits = x.to(tl.int32, bitcast=True)
    kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # four leading bits of the significand
    normal = kept.to(tl.float32, bitcast=True)
    tiny = (x + 24576.0) - 24576.0  # below 2^-6 the numbers are 2^-9 apart, as near 1.5 * 2^14 in fp32
    return tl.where(tl.abs(x) < 0.015625, tiny, normal)


@triton.jit
def _quantise(
    x, values, scales, rows, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)
    at = row.to(tl.int64)[:, None] * WIDTH + column
    real = (row < rows)[:, None] & (column < WIDTH)
    own = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    odd = tl.max((own != own).to(tl.int32), 1) > 0  # maxima drop NaN: the scale keeps it
    scale = tl.where(odd, float("nan"), tl.maximum(tl.max(tl.abs(own), 1), SMALLEST) / LARGEST)
    shrunk = tl.minimum(tl.maximum(own / scale[:, None], -LARGEST), LARGEST)
    tl.store(values + at, _round_e4m3(shrunk).to(tl.float8e4nv), mask=real)
    tl.store(scales + row * tl.cdiv(WIDTH, GROUP) + group, scale, mask=row < rows)


@triton.jit
def _multiply(
    x, x_scales, weight, weight_scales, out, rows, OUTER: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    GROUPS: tl.constexpr = (INNER + GROUP - 1) // GROUP
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_real, column_real = (row < rows)[:, None], (column < OUTER)[:, None]
    x_rows, weight_rows = x + row.to(tl.int64)[:, None] * INNER, weight + column.to(tl.int64)[:, None] * INNER
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(GROUPS):
        k = group * GROUP + tl.arange(0, GROUP)
        a = tl.load(x_rows + k, mask=row_real & (k < INNER), other=0.0)
        b = tl.load(weight_rows + k, mask=column_real & (k < INNER), other=0.0)
        scale = tl.load(x_scales + row * GROUPS + group, mask=row < rows, other=0.0)
        scale *= tl.load(weight_scales + tl.program_id(1) * BLOCK_N // GROUP * GROUPS + group)
        sums += tl.dot(a, tl.trans(b)) * scale[:, None]
    at = out + row.to(tl.int64)[:, None] * OUTER + column
    tl.store(at, sums.to(out.dtype.element_ty), mask=row_real & (column < OUTER))


def launch_quantise(x: Tensor, group: int, smallest: float) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    groups = triton.cdiv(width, group)
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    constants = {"WIDTH": width, "GROUP": group, "ROWS": ROWS, "LARGEST": LARGEST, "SMALLEST": smallest}
    _quantise[(triton.cdiv(rows, ROWS), groups)](x.contiguous(), values, scales, rows, **constants)
    return values, scales


def launch_product(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, group: int, dtype: torch.dtype
) -> Tensor:
    (rows, inner), outer = values.shape, len(weight)
    out = torch.empty(rows, outer, dtype=dtype, device=values.device)
    block = row_tile(rows)
    _multiply[(triton.cdiv(rows, block), triton.cdiv(outer, 64))](
        values, scales, weight, weight_scales, out, rows, OUTER=outer, INNER=inner, GROUP=group, BLOCK_M=block,
        BLOCK_N=64,
    )  # fmt: skip
    return out
