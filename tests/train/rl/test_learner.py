"""Rollouts and learner on a real policy: exactness of the first step, of micro-batches, and of what is left out."""

import dataclasses
import math

import pytest
import torch

from sputnik.engine.params import SamplingParams
from sputnik.engine.sampler import Generation, Sampler
from sputnik.model.transformer import Transformer
from sputnik.tasks.base import Judgement, Verdict
from sputnik.tasks.verify import VerifierPool
from sputnik.text.chat import Completion
from sputnik.train.health import rollout_metrics
from sputnik.train.learner import Learner, MicroBatch, UpdateStats, pack
from sputnik.train.losses import OBJECTIVES, Objective
from sputnik.train.reinforcement import _over_updates
from sputnik.train.rewards import overlong_penalty
from sputnik.train.rollout import Group, RolloutWorker, Sample, with_advantages

PARAMS = SamplingParams(max_tokens=40, seed=7)


@pytest.fixture(scope="module")
def groups(policy, pool: VerifierPool) -> list[Group]:
    worker = RolloutWorker(
        Sampler(policy.model(), policy.tok.eos_id, "fp32"), policy.tok, policy.task, pool, "chat", Objective()
    )
    return worker.collect(policy.task.problems("train", 8), 8, PARAMS)


def samples_of(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group]


def learner_for(model: Transformer, objective: Objective, precision: str = "fp32") -> Learner:
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.5), objective, precision=precision)


def scored(learner: Learner, batches: list[MicroBatch]) -> list[MicroBatch]:
    for batch in batches:
        batch.policy = dataclasses.replace(batch.policy, old=learner.score(batch, learner.model))
    return batches


def gradient(model: Transformer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_rewards_are_accuracy_plus_format_and_advantages_have_no_mean(groups: list[Group]) -> None:
    samples = samples_of(groups)
    assert 0 < sum(sample.rewards["accuracy"] for sample in samples) < len(samples)
    for sample in samples:
        assert sample.rewards["accuracy"] == float(sample.judgement.verdict is Verdict.CORRECT)
        assert sample.rewards["format"] == float(sample.completion.well_formed)
        assert sample.reward == sum(sample.rewards.values())
    for group in groups:
        assert sum(sample.advantage for sample in group) == pytest.approx(0, abs=1e-4)
        best = max(group, key=lambda sample: sample.reward)
        assert best.advantage == max(sample.advantage for sample in group)


def test_answers_nobody_could_judge_leave_the_group_and_are_counted(groups: list[Group], policy) -> None:
    group = next(group for group in groups if len({sample.reward for sample in group}) > 1)
    broken = dataclasses.replace(group[0], judgement=Judgement(Verdict.ERROR, "worker died"), advantage=0.0)
    shrunk = with_advantages([broken, *group[1:]], std_normalised=True)
    alone = with_advantages(group[1:], std_normalised=True)
    assert shrunk[0].advantage == 0 and not shrunk[0].judged
    assert [sample.advantage for sample in shrunk[1:]] == [sample.advantage for sample in alone]
    assert rollout_metrics([shrunk], policy.task, policy.tok)["verdicts"]["error"] == 1
    (batch,) = pack(shrunk, Objective(kl_beta=0.0), 40, 10**6)
    assert int(batch.policy.mask.sum()) == sum(len(s.generation.ids) for s in shrunk[1:] if s.advantage)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_first_step_ratio_is_exactly_one(groups: list[Group], policy, precision: str) -> None:
    learner = learner_for(policy.model(), Objective(), precision)
    batches = scored(learner, pack(samples_of(groups), learner.objective, 40, 600))
    assert len(batches) > 3
    first, second = learner.update(batches), learner.update(batches)
    assert first.ratio_error == 0.0 and first.clip_share == 0.0
    assert second.ratio_error > 0.0, "the weights have moved"


def test_first_update_needs_no_scoring_pass(groups: list[Group], policy) -> None:
    """The same statistics, the same pi_old and the same gradient to the bit, with a ratio that still has a gradient."""
    results = []
    for score in (True, False):
        learner = learner_for(policy.model(), Objective(kl_beta=0.0))
        batches = pack(samples_of(groups), learner.objective, 40, 600)
        stats = learner.update(scored(learner, batches) if score else batches)
        old = torch.cat([batch.policy.old[batch.policy.mask] for batch in batches])
        results.append((stats, old, gradient(learner.model), learner.update(batches).ratio_error))
    scored_first, alone = results
    assert scored_first[0] == alone[0] and scored_first[3] == alone[3] > 0
    assert torch.equal(scored_first[1], alone[1]) and torch.equal(scored_first[2], alone[2])


def test_trainer_and_sampler_agree_on_log_probabilities(groups: list[Group], policy) -> None:
    learner = learner_for(policy.model(), Objective())
    for batch in scored(learner, pack(samples_of(groups), learner.objective, 40, 600)):
        gap = (batch.policy.old - batch.policy.sampler)[batch.policy.mask].abs()
        assert float(gap.max()) < 1e-4


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_micro_batches_give_the_gradient_of_the_whole(groups: list[Group], policy, name: str) -> None:
    gradients, losses = [], []
    for budget in (400, 10**6):
        learner = learner_for(policy.model(), OBJECTIVES[name])
        batches = scored(learner, pack(samples_of(groups), learner.objective, 40, budget))
        if learner.objective.kl_beta:
            for batch in batches:
                batch.policy = dataclasses.replace(batch.policy, reference=batch.policy.old - 0.1)
        learner.max_grad_norm = 1e9
        losses.append(learner.update(batches).loss)
        gradients.append(gradient(learner.model))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_leaving_out_samples_without_advantage_changes_no_gradient(groups: list[Group], policy) -> None:
    """They stay in the normaliser: with a vanishing KL weight all are trained on, with none only the useful ones."""
    results = []
    for beta in (1e-30, 0.0):
        learner = learner_for(policy.model(), Objective(kl_beta=beta))
        batches = scored(learner, pack(samples_of(groups), learner.objective, 40, 10**6))
        learner.update(batches)
        results.append((gradient(learner.model), sum(len(batch.ids) for batch in batches)))
    (full, all_rows), (lean, few_rows) = results
    torch.testing.assert_close(full, lean, atol=1e-6, rtol=1e-4)
    assert few_rows < all_rows


def test_a_non_finite_gradient_moves_nothing(groups: list[Group], policy) -> None:
    learner = learner_for(policy.model(), Objective(kl_beta=0.0))
    batches = scored(learner, pack(samples_of(groups), learner.objective, 40, 10**6))
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    batches[0].policy = dataclasses.replace(batches[0].policy, advantages=torch.full((len(batches[0].ids),), torch.nan))
    assert not learner.update(batches).finite
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())


def test_a_gradient_that_is_no_number_shows_in_the_figures_whichever_update_it_is_in() -> None:
    sound = UpdateStats(0.1, 10, 0.0, 0.0, 1.0, 0.0, grad_norm=0.5, finite=True)
    broken = dataclasses.replace(sound, grad_norm=math.nan, finite=False)
    assert _over_updates([sound, sound])["grad_norm"] == 0.5
    assert all(math.isnan(_over_updates(stats)["grad_norm"]) for stats in ([sound, broken], [broken, sound]))


def test_updates_make_the_rewarded_answers_likelier(groups: list[Group], policy) -> None:
    learner = learner_for(policy.model(), Objective(kl_beta=0.0))
    learner.optimizer.param_groups[0]["lr"] = 0.01
    batches = scored(learner, pack(samples_of(groups), learner.objective, 40, 10**6))
    learner.update(batches)
    gain = sum(
        float(
            ((learner.score(b, learner.model) - b.policy.old) * b.policy.weights * b.policy.advantages[:, None]).sum()
        )
        for b in batches
    )
    assert gain > 0


def test_truncated_answers_are_masked_only_on_request(policy) -> None:
    problem = policy.task.problems("train", 1)[0]
    cut = Generation((0, 1), [5, 6, 7], [-1.0, -1.0, -1.0], "length")
    whole = Generation((0, 1), [5, 1], [-1.0, -1.0], "stop")
    completion = Completion("", "", False, True, False)
    samples = [
        Sample(problem, cut, completion, Judgement(Verdict.TRUNCATED, ""), advantage=-1.0),
        Sample(problem, whole, completion, Judgement(Verdict.CORRECT, ""), advantage=1.0),
    ]
    for masked, tokens in ((False, 5), (True, 2)):
        batches = pack(samples, Objective(kl_beta=0.0, mask_truncated=masked), 8, 10**6)
        assert sum(int(batch.policy.mask.sum()) for batch in batches) == tokens


def test_overlong_penalty_is_soft() -> None:
    assert [overlong_penalty(length, 100, 0.2) for length in (0, 80, 90, 100, 120)] == [0, 0, -0.5, -1, -1]
    assert overlong_penalty(100, 100, 0.0) == 0
