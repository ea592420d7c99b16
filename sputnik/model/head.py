"""From hidden states to logits, losses and log-probabilities, without ever holding all logits.

`head_loss` is what pre-training and SFT minimise. `token_logprobs` is what reinforcement learning compares and `logits`
what the sampler draws from: both fp32 throughout, so that the two sides of a ratio are computed alike.
N tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sputnik.model.precision import compute_dtype, linear_fp32

IGNORE = -100


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(..., D) x (V, D) -> fp32 (..., V)."""
    return linear_fp32(hidden, weight)


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 512) -> Tensor:
    """Summed negative log-likelihood of `targets` (N,) under hidden (N, D), fp32; targets of -100 count nothing.
    Products in the compute type, softmax in fp32, `chunk` tokens at a time."""
    loss: Tensor = _HeadLoss.apply(hidden, weight, targets, chunk, compute_dtype(weight))  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    """The gradient of each chunk is taken while its logits are there (softmax minus one-hot), so nothing of size V is
    kept and nothing is computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(dtype)
            for start in range(0, len(targets), chunk):
                part, target = hidden[start : start + chunk].to(dtype), targets[start : start + chunk]
                logprobs = F.linear(part, head).float().log_softmax(dim=-1)
                total += F.nll_loss(logprobs, target, reduction="sum", ignore_index=IGNORE)
                if grad_hidden is None and grad_weight is None:
                    continue
                valid = (target != IGNORE)[:, None]
                error = logprobs.exp_().scatter_add_(1, target.clamp(min=0)[:, None], -valid.float()).mul_(valid)
                error = error.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + chunk] = error @ head
                if grad_weight is not None:
                    grad_weight += error.t() @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        by_hidden, by_weight = (None if g is None else g * grad for g in ctx.saved_tensors)
        return by_hidden, by_weight, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` (N,) and entropy of the whole distribution, both (N,) fp32 with gradient, of the
    distribution the sampler draws from at `temperature`."""
    parts = [
        checkpoint(_chunk_logprobs, h, weight, t, temperature, use_reentrant=False)
        for h, t in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _chunk_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    all_logprobs = (logits(hidden, weight) / temperature).log_softmax(dim=-1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)
    return all_logprobs.gather(1, targets[:, None]).squeeze(1), entropy
