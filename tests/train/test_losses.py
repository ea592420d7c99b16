"""Each variant of the objective against a reference that is written token by token from the paper's formula."""

import math

import pytest
import torch

from sputnik.errors import ConfigError
from sputnik.train.losses import OBJECTIVES, Objective, PolicyBatch, group_advantages, k3, policy_loss, token_weights

LENGTHS = [3, 5, 1, 4]
MAX_TOKENS = 6


def example(seed: int = 0, spread: float = 0.3) -> tuple[torch.Tensor, PolicyBatch]:
    """Current log-probabilities and a batch of four ragged sequences; padding holds zeros."""
    noise = torch.Generator().manual_seed(seed)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = True

    def logprobs(shift: float) -> torch.Tensor:
        return (base + shift * torch.randn(4, 5, generator=noise)).masked_fill(~mask, 0.0)

    base = -torch.rand(4, 5, generator=noise) * 2 - 0.1
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    old, reference, sampler = logprobs(0.0), logprobs(spread), logprobs(spread)
    batch = PolicyBatch(mask, torch.empty(0), advantages, old, sampler, reference)
    return logprobs(spread).requires_grad_(), batch


def with_weights(batch: PolicyBatch, objective: Objective) -> PolicyBatch:
    weights = token_weights(batch.mask, objective.average, MAX_TOKENS)
    reference = batch.reference if objective.kl_beta else None
    return PolicyBatch(batch.mask, weights, batch.advantages, batch.old, batch.sampler, reference)


def reference_loss(logprobs: torch.Tensor, batch: PolicyBatch, objective: Objective) -> float:
    """The formulas, one token at a time."""
    total_tokens = sum(LENGTHS)
    loss = 0.0
    assert batch.reference is not None
    for i, length in enumerate(LENGTHS):
        drift = [float(logprobs[i, t] - batch.old[i, t]) for t in range(length)]
        for t in range(length):
            rho = math.exp(sum(drift) / length if objective.ratio == "sequence" else drift[t])
            a = float(batch.advantages[i])
            gain = min(rho * a, max(min(rho, 1 + objective.clip_high), 1 - objective.clip_low) * a)
            if objective.importance_cap:
                gain *= min(math.exp(float(batch.old[i, t] - batch.sampler[i, t])), objective.importance_cap)
            r = float(batch.reference[i, t] - logprobs[i, t])
            gain -= objective.kl_beta * (math.exp(r) - r - 1)
            share = {"sequence": 1 / length / 4, "token": 1 / total_tokens, "constant": 1 / (4 * MAX_TOKENS)}
            loss -= gain * share[objective.average]
    return loss


VARIANTS = [
    *OBJECTIVES.values(),
    Objective(importance_cap=2.0),
    Objective(importance_cap=0.9, kl_beta=0.1),
    Objective(clip_low=0.01, clip_high=10.0),
    Objective(ratio="sequence", average="token", kl_beta=0.5),
]


@pytest.mark.parametrize("objective", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_equals_the_formula_token_by_token(objective: Objective, seed: int) -> None:
    logprobs, batch = example(seed)
    ours = policy_loss(logprobs, with_weights(batch, objective), objective)
    assert ours.loss.item() == pytest.approx(reference_loss(logprobs.detach(), batch, objective), abs=1e-6)


def test_every_switch_changes_the_loss() -> None:
    base = Objective(kl_beta=0.1)
    switched = [
        Objective(kl_beta=0.1, clip_low=0.01),
        Objective(kl_beta=0.1, clip_high=0.01),
        Objective(kl_beta=0.2),
        Objective(kl_beta=0.1, average="token"),
        Objective(kl_beta=0.1, average="constant"),
        Objective(kl_beta=0.1, ratio="sequence"),
        Objective(kl_beta=0.1, importance_cap=1.0),
    ]
    logprobs, batch = example()
    losses = [policy_loss(logprobs, with_weights(batch, o), o).loss.item() for o in [base, *switched]]
    assert len({round(loss, 6) for loss in losses}) == len(losses)


def test_first_step_gradient_is_the_policy_gradient() -> None:
    """At pi = pi_old nothing is clipped and the gradient is -A/|o| per token, whatever the clip."""
    _, batch = example()
    logprobs = batch.old.clone().requires_grad_()
    objective = Objective(kl_beta=0.0)
    result = policy_loss(logprobs, with_weights(batch, objective), objective)
    result.loss.backward()
    assert float(result.ratio_error) == 0.0 and int(result.clipped) == 0
    for row, length in enumerate(LENGTHS):
        expected = -batch.advantages[row] / length / 4
        torch.testing.assert_close(logprobs.grad[row, :length], expected.expand(length))
    assert not logprobs.grad[~batch.mask].any()


def test_descending_the_loss_raises_the_better_answer() -> None:
    """The sign: a good answer gets likelier and a bad one less likely."""
    _, batch = example()
    logprobs = batch.old.clone().requires_grad_()
    policy_loss(logprobs, with_weights(batch, Objective(kl_beta=0.0)), Objective(kl_beta=0.0)).loss.backward()
    moved = -logprobs.grad
    assert (moved[0][batch.mask[0]] > 0).all() and (moved[1][batch.mask[1]] < 0).all()


def test_clip_stops_the_gradient_only_outside_and_only_in_the_profitable_direction() -> None:
    mask = torch.ones(4, 1, dtype=torch.bool)
    old = torch.full((4, 1), -1.0)
    ratios = torch.tensor([[1.5], [1.5], [0.5], [0.5]])
    logprobs = (old + ratios.log()).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    batch = PolicyBatch(mask, torch.full((4, 1), 0.25), advantages, old, old)
    result = policy_loss(logprobs, batch, Objective(kl_beta=0.0))
    result.loss.backward()
    assert [bool(g) for g in logprobs.grad.flatten()] == [False, True, True, False]
    assert int(result.clipped) == 2


def test_kl_pulls_the_policy_towards_the_reference() -> None:
    reference = torch.tensor([[-0.5, -2.0]])
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    k3(logprobs, reference).sum().backward()
    towards = -logprobs.grad[0]
    assert towards[0] > 0 and towards[1] < 0


def test_k3_is_not_negative_and_unbiased() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2]).log()
    reference = torch.tensor([0.2, 0.2, 0.6]).log()
    estimates = k3(policy, reference)
    exact = float((policy.exp() * (policy - reference)).sum())
    assert (estimates >= 0).all()
    assert float((policy.exp() * estimates).sum()) == pytest.approx(exact, abs=1e-6)


def test_group_advantage_is_the_standardised_reward() -> None:
    rewards = torch.tensor([[2.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages[0], torch.tensor([2.0**0.5, 0.0, -(2.0**0.5), 0.0]))
    assert not advantages[1:].any(), "equal rewards teach nothing, also where 0.1 is not exact"
    torch.testing.assert_close(group_advantages(rewards, std_normalised=False)[0], torch.tensor([1.0, 0.0, -1.0, 0.0]))


def test_advantages_do_not_mix_groups() -> None:
    rewards = torch.tensor([[0.0, 1.0], [5.0, 6.0]])
    torch.testing.assert_close(group_advantages(rewards), torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))


def test_splitting_into_micro_batches_changes_nothing() -> None:
    logprobs, batch = example()
    objective = OBJECTIVES["grpo"]
    whole = with_weights(batch, objective)
    assert whole.reference is not None
    parts = 0.0
    for rows in ([0, 2], [1, 3]):
        part = PolicyBatch(
            whole.mask[rows],
            whole.weights[rows],
            whole.advantages[rows],
            whole.old[rows],
            whole.sampler[rows],
            whole.reference[rows],
        )
        parts += policy_loss(logprobs[rows], part, objective).loss.item()
    assert parts == pytest.approx(policy_loss(logprobs, whole, objective).loss.item(), abs=1e-7)


def test_named_objectives_take_changes_and_refuse_mistakes() -> None:
    assert Objective.named("dapo", {"clip_high": 0.3}) == Objective(
        clip_high=0.3, kl_beta=0.0, average="token", mask_truncated=True, dynamic_sampling=True, overlong_share=0.2
    )
    with pytest.raises(ConfigError, match="no objective 'ppo'; choose one of grpo"):
        Objective.named("ppo", {})
    with pytest.raises(ConfigError, match="did you mean 'clip_high'"):
        Objective.named("grpo", {"clip_hi": 0.3})
    with pytest.raises(ConfigError, match="must not be negative"):
        Objective.named("grpo", {"kl_beta": -1.0})
    with pytest.raises(ConfigError, match="average"):
        Objective.named("grpo", {"average": "median"})
