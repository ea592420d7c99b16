"""The training kernels as differentiable functions: what torch does in many passes over memory, in one.

    if fused.usable(x):
        out = fused.causal_latent(q, up, key, turn, segments, scale)

Each has its slow twin in the module that uses it, taken wherever `usable` says no: another device, another type, no
library. N rows (batch x tokens), H heads, G key heads, Q and V widths, R rotated width, P positions, S segments.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sputnik.hardware import multiplies_bf16
from sputnik.model import kernels

TYPES = (torch.float32, torch.bfloat16)


def usable(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in TYPES and kernels.load()


def narrows(x: Tensor) -> bool:
    """Whether products with x are of bf16 values, under autocast or because x is bf16, and to be taken here: by a CPU's
    fp32 units, where those are faster."""
    if x.device.type != "cpu" or multiplies_bf16():
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and kernels.load()
    return x.dtype == torch.bfloat16 and kernels.load()


def batch_segments(batch: int, tokens: int) -> Tensor:
    """(B, 4): sequences of `tokens` rows each, one after another, that share nothing."""
    starts = torch.arange(0, batch * tokens, tokens)
    return torch.stack([starts, torch.full_like(starts, tokens), *torch.zeros(2, batch, dtype=torch.long)], dim=1)


def causal(q_nhq: Tensor, k_ngq: Tensor, v_ngv: Tensor, turn: Tensor, segments: Tensor, scale: float) -> Tensor:
    """Causal attention of (N, H, Q), (N, G, Q), (N, G, V) -> (N, H, V). Queries and keys come unrotated and are rotated
    by halves as Llama does; `turn` (P, R/2) complex; `segments` (S, 4): first row, rows, first row and rows of a prefix
    that an earlier segment is, or zeros."""
    out: Tensor = _Causal.apply(q_nhq, k_ngq, v_ngv, turn, False, segments, scale)  # type: ignore[no-untyped-call]
    return out


def causal_latent(
    q_nhq: Tensor, up_nhx: Tensor, key_nr: Tensor, turn: Tensor, segments: Tensor, scale: float
) -> Tensor:
    """The same for MLA: `up` (N, H, Q - R + V) holds unrotated parts of keys, then values; all share `key` (N, R).
    Pairs are interleaved as DeepSeek does."""
    out: Tensor = _Causal.apply(q_nhq, up_nhx, key_nr, turn, True, segments, scale)  # type: ignore[no-untyped-call]
    return out


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, first: Tensor, second: Tensor, turn: Tensor, latent: bool, *rest: Any
    ) -> Tensor:
        ctx.table, ctx.latent, ctx.rest = torch.view_as_real(turn).contiguous(), latent, rest
        key, shared, value = _parts(query, first, second, latent)
        out, lse = torch.ops.sputnik.causal_forward(query, key, shared, value, ctx.table, latent, *rest)
        ctx.save_for_backward(query, first, second, out, lse)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, first, second, out, lse = ctx.saved_tensors
        key, shared, value = _parts(query, first, second, ctx.latent)
        grad_query, grad_first = torch.empty_like(query), torch.empty_like(first)
        # The key all heads share gets a gradient from each.
        grad_second = second.new_empty(*first.shape[:2], second.shape[-1]) if ctx.latent else torch.empty_like(second)
        grad_key, grad_shared, grad_value = _parts(query, grad_first, grad_second, ctx.latent)
        torch.ops.sputnik.causal_backward(
            grad.contiguous(), out, lse, query, key, shared, value, ctx.table, ctx.latent, *ctx.rest,
            grad_query, grad_key, grad_shared, grad_value,
        )  # fmt: skip
        return grad_query, grad_first, grad_second.sum(1) if ctx.latent else grad_second, None, None, None, None


def _parts(query: Tensor, first: Tensor, second: Tensor, latent: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(key, shared key, value), all (N, heads, width)."""
    if not latent:
        return first, None, second
    shared = second if second.ndim == 3 else second[:, None]
    nope = query.shape[-1] - shared.shape[-1]
    return first[..., :nope], shared, first[..., nope:]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """x (..., D) / rms(x) * weight -> `dtype`; the weight is fp32."""
    _, out = _Norm.apply(x.reshape(-1, x.shape[-1]), None, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return out.view(x.shape)  # type: ignore[no-any-return]


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """x + delta, and its norm in `dtype`: (..., D); x, weight and the sum are fp32."""
    flat = x.reshape(-1, x.shape[-1]), delta.reshape(-1, x.shape[-1])
    total, out = _Norm.apply(*flat, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return total.view(x.shape), out.view(x.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor]:
        total, out, scale = torch.ops.sputnik.norm_forward(x, delta, weight, eps, dtype == torch.bfloat16)
        ctx.save_for_backward(total, scale, weight)
        ctx.set_materialize_grads(False)
        ctx.narrow = delta is not None and delta.dtype == torch.bfloat16 and ctx.needs_input_grad[1]
        return None if delta is None else total, out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, straight: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        total, scale, weight = ctx.saved_tensors
        if grad is None:
            narrowed = straight.bfloat16() if ctx.narrow and straight is not None else straight
            return straight, narrowed, None, None, None
        grad, straight = _dense_rows(grad), None if straight is None else _dense_rows(straight)
        by_x, by_delta, by_weight = torch.ops.sputnik.norm_backward(grad, straight, total, scale, weight, ctx.narrow)
        if ctx.needs_input_grad[1] and by_delta is None:
            by_delta = by_x
        return by_x, by_delta, by_weight, None, None


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) @ weight (O, I).T + bias -> bf16 (..., O): of bf16 values, sums in fp32. Where `narrows` says so."""
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


def product(a: Tensor, transpose_a: bool, b: Tensor, transpose_b: bool, narrow: bool = True) -> Tensor:
    """op(a) op(b) of the operands' values rounded to bf16, summed in fp32; rounded to bf16 if `narrow`."""
    return torch.ops.sputnik.narrow_product(a.contiguous(), transpose_a, b.contiguous(), transpose_b, narrow)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.bfloat16()
        ctx.save_for_backward(x, weight)
        if bias is None:
            return product(x, False, weight, True)
        return product(x, False, weight, True, narrow=False).add_(bias.bfloat16()).bfloat16()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (wants_x, wants_weight, wants_bias) = ctx.saved_tensors, ctx.needs_input_grad
        by_x = product(grad, False, weight, False) if wants_x else None
        by_weight = product(grad, True, x, False, narrow=False) if wants_weight else None
        return by_x, by_weight, grad.sum(0, dtype=torch.float32) if wants_bias else None


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x) for x (N, D), all of one type; where `narrows` says so, x is bf16 and the rest fp32."""
    kind = _NarrowMLP if narrows(x) else _MLP
    out: Tensor = kind.apply(x, gate, up, down)  # type: ignore[no-untyped-call]
    return out


class _MLP(torch.autograd.Function):
    """The activation is not kept: the pass that takes its gradient makes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate_ni, up_ni = x @ gate.t(), x @ up.t()
        ctx.save_for_backward(x, gate, up, down, gate_ni, up_ni)
        return torch.ops.sputnik.swiglu_forward(gate_ni, up_ni) @ down.t()  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, gate, up, down, gate_ni, up_ni = ctx.saved_tensors
        act, grad_gate, grad_up = torch.ops.sputnik.swiglu_backward(grad @ down, gate_ni, up_ni)
        grad_x = (grad_gate @ gate).addmm_(grad_up, up)
        return grad_x, grad_gate.t() @ x, grad_up.t() @ x, grad.t() @ act


class _NarrowMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate_ni, up_ni = product(x, False, gate, True), product(x, False, up, True)
        ctx.save_for_backward(x, gate, up, down, gate_ni, up_ni)
        return product(torch.ops.sputnik.swiglu_forward(gate_ni, up_ni), False, down, True)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, gate, up, down, gate_ni, up_ni = ctx.saved_tensors
        by_act = product(grad, False, down, False)
        act, grad_gate, grad_up = torch.ops.sputnik.swiglu_backward(by_act, gate_ni, up_ni)
        by_x = product(grad_gate, False, gate, False, narrow=False) + product(grad_up, False, up, False, narrow=False)
        by_gate, by_up = (product(each, True, x, False, narrow=False) for each in (grad_gate, grad_up))
        return by_x.to(x.dtype), by_gate, by_up, product(grad, True, act, False, narrow=False)


def experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """sum over the K chosen of weight * expert(x): x (N, D), weights and chosen (N, K). All fp32, or x alone bf16: then
    all that is multiplied is rounded to bf16, sums are fp32."""
    out: Tensor = _Experts.apply(x, weights, chosen, gate_up, down)  # type: ignore[no-untyped-call]
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        places = torch.ops.sputnik.expert_order(chosen.contiguous(), len(gate_up))
        x, weights = x.contiguous(), weights.contiguous()
        out, inner = torch.ops.sputnik.experts_forward(x, weights, *places, gate_up, down)
        ctx.save_for_backward(x, weights, *places, gate_up, down, inner)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        by_x, by_weights, *by_matrices = torch.ops.sputnik.experts_backward(grad.contiguous(), *ctx.saved_tensors)
        return by_x, by_weights, None, *by_matrices


def loss_error_(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each of `targets` (N,) under fp32 logits (N, V), 0 where the target is negative; the
    logits become the gradient of its sum."""
    return torch.ops.sputnik.loss_error(logits, targets)  # type: ignore[no-any-return]
