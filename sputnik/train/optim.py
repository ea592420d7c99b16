"""AdamW, the V3 schedules and the moving average of the weights (V3 report, sections 3.2.2, 4.2).

All schedules are functions of two numbers, how much is done and how much there is to do, in tokens: the published
boundaries (10T, 14.3T, ... of 14.8T) become fractions of the run, so a run of three million tokens has the same shape.
Left out: BF16 moments (V3 3.3.2); they save memory that a CPU run does not lack.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sputnik.errors import CheckpointError
from sputnik.train.state import load_module_tensors, module_tensors

TOTAL = 14.8e12  # tokens of the published run; the fractions below are of this
BATCH_RAMP = 0.469e12 / TOTAL
CONSTANT_UNTIL = 10e12 / TOTAL
COSINE_UNTIL = 14.3e12 / TOTAL
FIRST_TAIL_UNTIL = (14.3e12 + 0.333e12) / TOTAL
MTP_SWITCH = 10e12 / TOTAL
BIAS_SWITCH = 14.3e12 / TOTAL
FIRST_TAIL = 2.2e-5 / 2.2e-4
SECOND_TAIL = 7.3e-6 / 2.2e-4
WARMUP = 2_000 / 240_000  # 14.8T tokens at the published batch sizes are about 240,000 steps
ADAM_HORIZON = 20  # steps that beta2 = 0.95 averages over: before that the second moment is a guess
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
    """Scale all gradients so that their joint norm is at most `limit`; returns the norm before (may be inf or NaN)."""
    return float(nn.utils.clip_grad_norm_(model.parameters(), limit))


def cosine(done: float, high: float, low: float) -> float:
    """From `high` at done = 0 down to `low` at done = 1."""
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))


def warmup_steps(steps: int) -> int:
    """The published share of the run, but at least what AdamW's second moment needs, and at most a tenth of the run."""
    return max(1, round(WARMUP * steps), min(ADAM_HORIZON, steps // 10))


def v3_lr(done: float, total: float, peak: float) -> float:
    """Learning rate after `done` of `total` tokens (or steps), without the warm-up: constant, cosine to a tenth, two
    constant tails (V3 4.2)."""
    share = done / total
    if share < CONSTANT_UNTIL:
        return peak
    if share < COSINE_UNTIL:
        return cosine((share - CONSTANT_UNTIL) / (COSINE_UNTIL - CONSTANT_UNTIL), peak, FIRST_TAIL * peak)
    return peak * (FIRST_TAIL if share < FIRST_TAIL_UNTIL else SECOND_TAIL)


def v3_batch(done: float, total: float, final: int) -> int:
    """Sequences in the next batch: a fifth of `final` at first, growing linearly over the first 3.2 % (V3 4.2)."""
    grown = min(1.0, done / total / BATCH_RAMP)
    return max(1, round(final * (0.2 + 0.8 * grown)))


def mtp_weight(done: float, total: float, first: float = 0.3) -> float:
    """Lambda of the MTP loss: 0.3 for the first 10T tokens, then a third of it, 0.1."""
    return first if done / total < MTP_SWITCH else first / 3


def bias_speed(done: float, total: float, first: float = 0.001) -> float:
    """Gamma of the routing bias update: 0.001 until 14.3T tokens, then 0."""
    return first if done / total < BIAS_SWITCH else 0.0


class Ema:
    """Exponential moving average of the weights, in CPU memory and in FP32 (V3 3.2.2): an early look at how the model
    will do once the learning rate has decayed."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().float().cpu().clone() for name, value in module_tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, value in module_tensors(model).items():
            self.weights[name].lerp_(value.detach().to("cpu", torch.float32), 1 - self.decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = {name: weights[name] for name in self.weights}

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the average."""
        load_module_tensors(model, self.weights)
