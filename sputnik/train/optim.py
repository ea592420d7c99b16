"""AdamW, clipping and the moving average of the weights (V3 report, sections 3.2.2, 4.2).

Left out: BF16 moments (V3 3.3.2); they save memory that a CPU run does not lack.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sputnik.errors import CheckpointError
from sputnik.train.state import load_module_tensors, module_tensors

CLIP_NORM = 1.0


def adamw(
    model: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.1
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: a norm's gain multiplies instead of mapping, and pulling it to zero would
    shrink the layer's output rather than make its function simpler."""
    learnable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learnable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in learnable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as "parameter name|moment" -> tensor; the order of parameters plays no part."""
    return {
        f"{name}|{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; whatever state there was is dropped."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("|")
        if name not in parameters:
            raise CheckpointError(f"the optimiser state has {name!r}, the model does not: saved by another model")
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)


def clip_gradients(model: nn.Module, limit: float = CLIP_NORM) -> float:
    """Scale all gradients so that their joint norm is at most `limit`; returns the norm before. Gradients with a NaN or
    infinity are left as they are, for whoever looks for the first one."""
    learnable = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in learnable if parameter.grad is not None])
    if bool(torch.isfinite(norm)):
        nn.utils.clip_grads_with_norm_(learnable, limit, norm)
    return float(norm)


class Ema:
    """Exponential moving average of the weights, in CPU memory and in FP32 (V3 3.2.2): an early look at how the model
    will do once the learning rate has decayed."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().float().cpu().clone() for name, value in module_tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After step number `step`. The memory is shorter at first, or the initial weights would stay in for long."""
        decay = min(self.decay, step / (step + 9))
        for name, value in module_tensors(model).items():
            self.weights[name].lerp_(value.detach().to("cpu", torch.float32), 1 - decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = {name: weights[name] for name in self.weights}

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the average."""
        load_module_tensors(model, self.weights)
