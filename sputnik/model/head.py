"""From hidden states to logits, losses and log-probabilities, without ever holding all logits.

There is one path to log-probabilities: fp32 logits, fp32 log-softmax. `head_loss` is what pre-training and SFT minimise,
`token_logprobs` what reinforcement learning compares, and the sampler uses `logits`. N tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sputnik.model.precision import linear_fp32

IGNORE = -100


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(..., D) x (V, D) -> fp32 (..., V)."""
    return linear_fp32(hidden, weight)


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 512) -> Tensor:
    """Summed negative log-likelihood of `targets` (N,) under hidden (N, D); targets of -100 count nothing."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_chunk_loss, h, weight, t, use_reentrant=False)
    return total


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits(hidden, weight), targets, reduction="sum", ignore_index=IGNORE)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` (N,) and entropy of the whole distribution, both (N,) fp32 with gradient, of the
    distribution the sampler draws from at `temperature`."""
    parts = [
        checkpoint(_chunk_logprobs, h, weight, t, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _chunk_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    all_logprobs = (logits(hidden, weight) / temperature).log_softmax(dim=-1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)
    return all_logprobs.gather(1, targets[:, None]).squeeze(1), entropy
