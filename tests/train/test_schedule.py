"""The published schedule, read off at its own numbers (V3 report, section 4.2), and the same shape at laptop size."""

from itertools import pairwise

import pytest

from sputnik.train.schedule import Plan, bias_speed, mtp_weight, v3_batch, v3_lr, warmup_steps

T = 1e12
TOTAL = 14.8 * T
PEAK = 2.2e-4


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (0.1 * T, 2.2e-4),
        (9.99 * T, 2.2e-4),
        (10 * T + 2.15 * T, (2.2e-4 + 2.2e-5) / 2),
        (14.2999999 * T, 2.2e-5),
        (14.31 * T, 2.2e-5),
        (14.632 * T, 2.2e-5),
        (14.634 * T, 7.3e-6),
        (14.79 * T, 7.3e-6),
    ],
)
def test_learning_rate_is_the_published_one(done: float, expected: float) -> None:
    assert v3_lr(done, TOTAL, PEAK) == pytest.approx(expected, rel=1e-6)


def test_learning_rate_never_rises() -> None:
    rates = [v3_lr(done, 10_000, 1.0) for done in range(10_000)]
    assert all(later <= earlier for earlier, later in pairwise(rates))


def test_batch_ramp_is_the_published_one() -> None:
    assert v3_batch(0, TOTAL, 15360) == 3072
    assert v3_batch(0.2345 * T, TOTAL, 15360) == (3072 + 15360) // 2
    assert v3_batch(0.47 * T, TOTAL, 15360) == 15360 == v3_batch(14 * T, TOTAL, 15360)
    assert v3_batch(0, 100, 1) == 1


def test_the_published_run_has_about_240_000_steps() -> None:
    """The share of the warm-up, 2,000 steps, rests on this count."""
    plan = Plan.make(int(TOTAL / 4096), 15360)
    assert plan.steps == pytest.approx(240_000, rel=0.03)
    assert plan.warmup == pytest.approx(2_000, rel=0.03)


def test_mtp_weight_and_bias_speed_switch_where_published() -> None:
    assert (mtp_weight(9.9 * T, TOTAL), mtp_weight(10.1 * T, TOTAL)) == (0.3, pytest.approx(0.1))
    assert (bias_speed(14.2 * T, TOTAL), bias_speed(14.4 * T, TOTAL)) == (0.001, 0.0)


@pytest.mark.parametrize(("budget", "batch"), [(16, 16), (1000, 7), (5000, 64), (33, 32)])
def test_a_plan_spends_its_budget_and_no_more(budget: int, batch: int) -> None:
    plan = Plan.make(budget, batch)
    assert budget - batch < plan.total <= budget
    assert plan.starts == tuple(sum(plan.rows[:step]) for step in range(plan.steps + 1))
    assert max(plan.rows) <= batch and list(plan.rows) == sorted(plan.rows)


def test_warm_up_reaches_the_peak_and_is_a_small_part() -> None:
    plan = Plan.make(4000, 16)
    rates = [plan.lr(step, 1.0) for step in range(1, plan.steps + 1)]
    assert rates[0] == 1 / plan.warmup and max(rates) == 1.0 == rates[plan.warmup - 1]
    assert warmup_steps(20) == 2 and warmup_steps(400) == 20 and warmup_steps(240_000) == 2_000
