"""Which numbers are computed in which type.

The residual stream, norms, router and softmax sums stay in the parameters' type (fp32 in training); matrix products run
in the compute type: bfloat16 under `torch.autocast`, else the type of the layer's own weights. `Transformer.lowered`
makes a copy whose matrix weights already are bfloat16, which computes the same numbers without autocast's casts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in fp32 whatever autocast says."""
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x.float(), weight.float())
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed and returned in the weight's type (fp32 in training, also under autocast)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
