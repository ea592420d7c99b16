"""Which numbers are computed in which type, and the norm.

The residual stream, norms, router, attention core and softmax stay in fp32; matrix products run in the compute type:
bfloat16 under `torch.autocast`, else the type of the layer's own weights. `Transformer.lowered` makes a copy whose
matrix weights already are bfloat16: it computes the numbers of autocast without its casts. On CPUs whose fp32 units are
the faster ones, autocast's products of bf16 values are computed by those (`kernels/fused.py`); on those that multiply
bf16 pairs, the attention kernels round queries, keys and probabilities to bf16 for their products, with sums in fp32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sputnik.model.kernels import fused


def compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in the compute type."""
    if fused.narrows(x):
        return fused.linear(x, weight)
    return F.linear(x, weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype))


class Linear(nn.Linear):
    """A linear layer in the compute type."""

    def forward(self, x: Tensor) -> Tensor:
        return (fused.linear if fused.narrows(x) else F.linear)(x, self.weight, self.bias)


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in fp32 whatever autocast says."""
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x.float(), weight.float())
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in the weight's type (fp32 in training, also under autocast)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x (..., D) -> the same shape in `dtype`, or the weight's type."""
        dtype = dtype or self.weight.dtype
        if self._fused(x, dtype):
            return fused.rms_norm(x, self.weight, self.eps, dtype)
        x = x.to(self.weight.dtype)
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps).to(dtype)
        if not torch.is_grad_enabled():
            return (x * inverse_rms(x, self.eps)).mul_(self.weight).to(dtype)
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out.to(dtype)

    def after_adding(self, x: Tensor, delta: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """x + delta, and its norm."""
        dtype = dtype or self.weight.dtype
        if x.dtype == torch.float32 and self._fused(delta, dtype):
            return fused.add_rms_norm(x, delta, self.weight, self.eps, dtype)
        x = x + delta
        return x, self(x, dtype)

    def _fused(self, x: Tensor, dtype: torch.dtype) -> bool:
        return self.weight.dtype == torch.float32 and dtype in fused.TYPES and fused.usable(x)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """`F.rms_norm`, which torch differentiates op by op on CPU, in a third of the time: the gradient of LayerNorm with
    its mean set to zero, plus the one term LayerNorm takes off for subtracting the mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        grad, zero = grad.contiguous(), torch.zeros_like(scale)
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, zero, scale, weight, None, [True, True, False]
        )
        mean = torch.mv(grad.view(-1, x.shape[-1]), weight).view_as(scale).div_(x.shape[-1])
        return grad_x.add_(mean.mul_(scale)), grad_weight, None
