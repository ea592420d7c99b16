"""From hidden states to logits, losses and log-probabilities, without ever holding all logits.

`head_loss` is what pre-training and SFT minimise. `token_logprobs` is what reinforcement learning compares and `logits`
what the sampler draws from: both fp32 throughout, so that the two sides of a ratio are computed alike.
N tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sputnik.model.kernels import fused
from sputnik.model.precision import compute_dtype, linear_fp32

IGNORE = -100
KEPT = 2**23
"""Probabilities that `token_logprobs` keeps for its gradient, at most: 32 MiB."""


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
        narrow = fused.narrows(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(dtype)
            for start in range(0, len(targets), chunk):
                part, target = hidden[start : start + chunk].to(dtype), targets[start : start + chunk]
                error = (fused.product(part, False, head, True) if narrow else F.linear(part, head)).float()
                total += loss_error_(error, target)
                if grad_hidden is None and grad_weight is None:
                    continue
                error = error.to(dtype)
                if grad_hidden is not None:
                    by_hidden = fused.product(error, False, head, False) if narrow else error @ head
                    grad_hidden[start : start + chunk] = by_hidden
                if grad_weight is not None and dtype == torch.float32:
                    grad_weight.addmm_(error.t(), part)
                elif grad_weight is not None and narrow:
                    grad_weight += fused.product(error, True, part, False, narrow=False)
                elif grad_weight is not None:
                    grad_weight += error.t() @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        by_hidden, by_weight = (None if g is None else g * grad for g in ctx.saved_tensors)
        return by_hidden, by_weight, None, None, None


def loss_error_(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods; the fp32 logits (N, V) become its gradient: softmax minus one-hot."""
    if fused.usable(logits):
        return fused.loss_error_(logits, targets).sum()
    valid = (targets != IGNORE)[:, None]
    logprobs = logits.log_softmax(dim=-1)
    loss = F.nll_loss(logprobs, targets, reduction="sum", ignore_index=IGNORE)
    torch.exp(logprobs, out=logits)
    logits.scatter_add_(1, targets.clamp(min=0)[:, None], -valid.float()).mul_(valid)
    return loss


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` (N,), with gradient, and entropy of the whole distribution, without; both (N,) fp32,
    of the distribution the sampler draws from at `temperature`."""
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk)  # type: ignore[no-untyped-call]


class _TokenLogprobs(torch.autograd.Function):
    """The gradient of a log-probability is the row of the head minus the mean row: one-hot minus probabilities. Those
    are kept while they are few, else computed again chunk by chunk. Products in the compute type, as in `head_loss`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
        keep = any(ctx.needs_input_grad[:2]) and len(targets) * len(weight) <= KEPT
        kept = []
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            scores = _logprobs(hidden[part], weight, temperature)
            torch.gather(scores, 1, targets[part, None], out=logprobs[part, None])
            probabilities = scores.exp()
            torch.linalg.vecdot(probabilities, scores, out=entropy[part])
            if keep:
                kept.append(probabilities)
        ctx.save_for_backward(hidden, weight, targets, *kept)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.dtype = torch.float32 if fused.narrows(hidden) else compute_dtype(weight)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy.neg_()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        head = weight.to(ctx.dtype)
        for number, start in enumerate(range(0, len(targets), ctx.chunk)):
            part = slice(start, start + ctx.chunk)
            probabilities = kept[number] if kept else _logprobs(hidden[part], weight, ctx.temperature).exp_()
            by_row = grad[part, None] / ctx.temperature
            error = (probabilities * -by_row).scatter_add_(1, targets[part, None], by_row)
            error = error.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = error @ head
            if grad_weight is not None and ctx.dtype == torch.float32:
                grad_weight.addmm_(error.t(), hidden[part].float())
            elif grad_weight is not None:
                grad_weight += error.t() @ hidden[part].to(ctx.dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _logprobs(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(N, V) fp32."""
    return (logits(hidden, weight) / temperature).log_softmax(dim=-1)
