"""The policy objective: pure functions from log-probabilities and rewards to a loss and the figures that explain it.

GRPO as published (DeepSeekMath 4.1, R1 2.1) is the default `Objective`; Dr. GRPO, DAPO and GSPO are other settings of
the same few switches, so that two variants differ by data and not by code. Nothing here knows of models, prompts or
optimisers.

Shapes: N sequences, L completion positions; `mask` (N, L) is True on sampled tokens (end-of-sequence included).
Sampling-side matters live in `train/reinforcement.py` (dropping groups without spread) and `train/rewards.py` (the
overlong penalty).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sputnik.config import from_dict
from sputnik.errors import ConfigError


@dataclass(frozen=True)
class Objective:
    """Switches of the policy objective. `Objective.named("dapo", {...})` starts from a published variant."""

    clip_low: float = 0.2
    """Ratio may fall to 1 - clip_low before the gradient stops."""
    clip_high: float = 0.2
    """Ratio may rise to 1 + clip_high; DAPO's clip-higher is 0.28, R1's second RL stage used 10."""
    kl_beta: float = 0.001
    """Weight of the k3 estimate of KL(policy || reference), added to the loss and not to the reward."""
    reference_refresh: int = 400
    """The reference becomes the policy of that moment every so many steps (R1 2.1: 400)."""
    std_normalised: bool = True
    """Divide the group advantage by the group's standard deviation; Dr. GRPO does not (difficulty bias)."""
    average: Literal["sequence", "token", "constant"] = "sequence"
    """sequence: 1/|o_i|, then the mean (GRPO). token: mean over all tokens (DAPO). constant: 1/limit (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """sequence: one length-normalised ratio per answer (GSPO)."""
    importance_cap: float = 0.0
    """Truncated importance sampling: weigh tokens by min(pi_trainer / pi_sampler, cap). 0 switches it off."""
    replay_routes: bool = False
    """The learner sends each token to the experts the sampler chose: else a near tie makes the two sides two policies
    (Ma et al. 2025, rollout routing replay)."""
    train_mtp: bool = True
    """Train the model's MTP modules too, if it has any, in the first update on each rollout: else they go on drafting
    for the base model, worse each step. The policy is the same bit for bit either way."""
    mask_truncated: bool = False
    """Answers cut off by the length limit carry no gradient (DAPO)."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by new questions (DAPO)."""
    overlong_share: float = 0.0
    """Soft penalty, growing to 1, over this last share of the token limit (DAPO: 4,096 of 20,480). 0: none."""

    @classmethod
    def named(cls, name: str, changes: Mapping[str, Any], where: str = "objective") -> "Objective":
        """A published variant with some switches changed; unknown names and keys are ConfigErrors."""
        if name not in OBJECTIVES:
            raise ConfigError(f"{where}: no objective {name!r}; choose one of {', '.join(OBJECTIVES)}")
        checked = from_dict(cls, changes, where)
        objective = replace(OBJECTIVES[name], **{key: getattr(checked, key) for key in changes})
        if objective.reference_refresh < 1:
            raise ConfigError(f"{where}: reference_refresh = {objective.reference_refresh}: set it above 0")
        if objective.clip_low < 0 or objective.clip_high < 0 or objective.kl_beta < 0 or objective.importance_cap < 0:
            raise ConfigError(f"{where}: clip_low, clip_high, kl_beta and importance_cap must not be negative")
        if not 0 <= objective.overlong_share <= 1:
            raise ConfigError(f"{where}: overlong_share = {objective.overlong_share}: choose a share, 0 to 1")
        return objective


OBJECTIVES: Mapping[str, Objective] = {
    "grpo": Objective(),
    "dr_grpo": Objective(kl_beta=0.0, std_normalised=False, average="constant"),
    "dapo": Objective(
        clip_high=0.28, kl_beta=0.0, average="token", mask_truncated=True, dynamic_sampling=True, overlong_share=0.2
    ),
    "gspo": Objective(clip_low=3e-4, clip_high=4e-4, kl_beta=0.0, ratio="sequence"),
}


def group_advantages(rewards: Tensor, std_normalised: bool = True) -> Tensor:
    """(groups, G) rewards -> (groups, G) advantages relative to the group: A_i = (r_i - mean) / std.

    A group whose rewards are all equal teaches nothing and gets exactly zero, also where rounding leaves a tiny spread.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = rewards.std(dim=1, keepdim=True, correction=0)
    flat = spread < 1e-6
    scaled = centred / spread.masked_fill(flat, 1.0) if std_normalised else centred
    return scaled.masked_fill(flat, 0.0)


def token_weights(mask: Tensor, average: str, max_tokens: int) -> Tensor:
    """(N, L) weights that turn per-token losses into the objective by a plain weighted sum.

    Computed over the whole mini-batch, so that splitting it into micro-batches changes nothing.
    """
    weights = mask.float()
    if average == "sequence":
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1.0) / mask.shape[0]
    if average == "token":
        return weights / weights.sum().clamp(min=1.0)
    return weights / (mask.shape[0] * max_tokens)


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Per-token unbiased, non-negative estimate of KL(policy || reference): r - log r - 1 with r = pi_ref / pi."""
    log_ratio = reference - logprobs
    return log_ratio.exp() - log_ratio - 1


@dataclass(frozen=True)
class PolicyBatch:
    """What the objective needs of some sequences; all (N, L) but `advantages` (N,)."""

    mask: Tensor
    weights: Tensor
    advantages: Tensor
    old: Tensor | None
    """log pi_old by the trainer's own forward pass, before the first update on this rollout. None: this is the first
    update, and pi_old is the policy itself."""
    sampler: Tensor
    """log pi_old as the sampler saw it: used with `importance_cap`, and for the mismatch between the two sides."""
    reference: Tensor | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """The loss (scalar, differentiable) and detached sums over the masked tokens, to be added up over micro-batches."""

    loss: Tensor
    tokens: Tensor
    kl_sum: Tensor
    clipped: Tensor
    """Number of tokens whose gradient the clip switched off."""
    ratio_error: Tensor
    """max |ratio - 1|: exactly zero in the first optimiser step after a rollout."""


def policy_loss(logprobs: Tensor, batch: PolicyBatch, objective: Objective) -> PolicyLoss:
    """The clipped surrogate with KL penalty, to be minimised. `logprobs` (N, L): the current policy, with gradient."""
    mask = batch.mask.float()
    old = logprobs.detach() if batch.old is None else batch.old
    log_ratio = (logprobs - old) * mask
    if objective.ratio == "sequence":
        log_ratio = (log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1.0)).expand_as(mask)
    ratio = log_ratio.exp()
    advantages = batch.advantages[:, None]
    clipped_ratio = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    if objective.importance_cap:
        surrogate = surrogate * (old - batch.sampler).exp().clamp(max=objective.importance_cap)
    per_token = -surrogate
    kl_sum = torch.zeros((), dtype=logprobs.dtype, device=logprobs.device)
    if batch.reference is not None:
        kl = k3(logprobs, batch.reference)
        per_token = per_token + objective.kl_beta * kl
        kl_sum = (kl.detach() * mask).sum()
    off = (ratio * advantages > clipped_ratio * advantages) & batch.mask
    return PolicyLoss(
        loss=(per_token * batch.weights).sum(),
        tokens=mask.sum(),
        kl_sum=kl_sum,
        clipped=off.sum(),
        ratio_error=((ratio.detach() - 1).abs() * mask).max(),
    )
