"""Training with FP8 products, computed as if this machine had them (V3 3.3): what rounding does, not how fast it is.

    emulate(model)      # from now on all matrix products of the decoder layers go through E4M3, forward and backward

Each of the three products of a linear layer gets both factors rounded to E4M3 with a scale of its own for every tile:
activations and their gradients in tiles of 1 x 128 along the sum, weights in blocks of 128 x 128. For the gradient of
the weight the sum runs over tokens, so the stored FP8 activation is cut anew into tiles of 128 tokens. Sums are in
fp32, where the report's promotion to fp32 registers ends. Embedding, head, gates, norms, attention core, `eh_proj`,
master weights and optimiser keep their type. N tokens, I inputs, O outputs.

Left out: E5M6 for what the attention output is multiplied with, FP8 copies of SwiGLU's inputs, BF16 moments, and speed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sputnik.model.attention import Pass
from sputnik.model.fp8 import BLOCK, LARGEST
from sputnik.model.mla import MLA
from sputnik.model.moe import MLP, Experts
from sputnik.model.precision import Linear
from sputnik.model.transformer import Transformer

TILE = (1, 128)


def emulate(model: Transformer) -> Transformer:
    """Turn the products of all decoder layers, the prediction modules' too, into FP8 ones; returns the same model.
    Parameters stay the same objects under the same names."""
    twins: dict[type, type] = {Linear: _Linear, MLP: _MLP, Experts: _Experts, MLA: _MLA}
    for layer in [*model.model.layers, *(module.block for module in model.mtp)]:
        for module in layer.modules():
            if type(module) in twins:
                module.__class__ = twins[type(module)]
    return model


def rounded(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """x (A, B) -> what is left of it after E4M3 with one scale for each tile of tile[0] x tile[1]; edge tiles are
    smaller. What is not finite stays so."""
    rows, columns = x.shape
    down, across = -(-rows // tile[0]), -(-columns // tile[1])
    padded = F.pad(x.float(), (0, across * tile[1] - columns, 0, down * tile[0] - rows))
    tiles = padded.view(down, tile[0], across, tile[1])
    largest = tiles.abs().amax(dim=(1, 3), keepdim=True)
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (_e4m3((tiles / scale).clamp(-LARGEST, LARGEST)) * scale).view(padded.shape)[:rows, :columns]


def _e4m3(x: Tensor) -> Tensor:
    """To float8_e4m3fn and back, by table: torch converts back one number at a time."""
    table = torch.arange(256, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn).float()
    return table.take(x.to(torch.float8_e4m3fn).view(torch.uint8).long())


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I) @ weight (O, I).T in FP8 -> fp32 (..., O)."""
    out: Tensor = _Product.apply(x.flatten(0, -2), weight)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ni: Tensor, weight_oi: Tensor) -> Tensor:
        x, weight = rounded(x_ni, TILE), rounded(weight_oi, BLOCK)
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad_no: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = rounded(grad_no, TILE) @ weight
        grad_weight = rounded(grad_no.t(), TILE) @ rounded(x.t(), TILE).t()
        return grad_x, grad_weight


class _Linear(Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = product(x, self.weight)
        return out if self.bias is None else out + self.bias


class _MLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Experts(Experts):
    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """One expert at a time."""
        out = torch.zeros_like(x)
        for index in range(self.gate_up_proj.shape[0]):
            token, place = (chosen == index).nonzero(as_tuple=True)
            if len(token):
                gate, up = (product(x[token], half) for half in self.gate_up_proj[index].chunk(2))
                act = product(F.silu(gate) * up, self.down_proj[index])
                out = out.index_add(0, token, act * weights[token, place, None])
        return out


class _MLA(MLA):
    def raised(self, latent_btc: Tensor, now: Pass) -> Tensor:
        out: Tensor = self.kv_b_proj(latent_btc)
        return out.unflatten(-1, (self.heads, -1))
