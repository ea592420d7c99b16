"""Intervals are tested by simulation: the truth must lie inside in about 95 of 100 cases, also at the ends."""

import math
from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sputnik.errors import DataError
from sputnik.eval.stats import Interval, cons_at_k, interval95, paired, pass_at_1, pass_at_k, sign_flip, student

Difficulty = Callable[[np.random.Generator, int], np.ndarray]
RUNS = 400


def beta(a: float, b: float) -> Difficulty:
    return lambda rng, n: rng.beta(a, b, n)


def simulate(difficulty: Difficulty, n: int, k: int, rng: np.random.Generator) -> list[float]:
    return list(rng.binomial(k, difficulty(rng, n)) / k)


@pytest.mark.parametrize(
    ("difficulty", "truth"),
    [
        pytest.param(beta(0.5, 0.5), 0.5, id="half solved half not"),
        pytest.param(beta(2, 2), 0.5, id="broad"),
        pytest.param(beta(1, 9), 0.1, id="mostly hard"),
        pytest.param(beta(9, 1), 0.9, id="mostly easy"),
        pytest.param(lambda rng, n: np.full(n, 0.3), 0.3, id="all alike"),
        pytest.param(lambda rng, n: (rng.random(n) < 0.3) * 0.93 + 0.02, 0.299, id="two kinds"),
    ],
)
@pytest.mark.parametrize(("n", "k"), [(30, 16), (60, 1), (200, 4)])
def test_interval_covers_the_truth_in_95_of_100_cases(difficulty: Difficulty, truth: float, n: int, k: int) -> None:
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(RUNS):
        interval = interval95(simulate(difficulty, n, k, rng), [k] * n)
        inside += interval.low <= truth <= interval.high
    assert 0.92 <= inside / RUNS <= 0.985


@pytest.mark.parametrize("truth", [0.003, 0.997])
def test_interval_covers_the_truth_near_the_ends_where_t_fails(truth: float) -> None:
    rng = np.random.default_rng(8)
    ours = t = 0
    for _ in range(RUNS):
        means = simulate(lambda rng, n: np.full(n, truth), 30, 4, rng)
        interval = interval95(means, [4] * 30)
        ours += interval.low <= truth <= interval.high
        half = student(29) * float(np.std(means, ddof=1)) / math.sqrt(30)
        t += abs(float(np.mean(means)) - truth) <= half
    assert ours / RUNS >= 0.92
    assert t / RUNS < 0.6


def test_samples_of_one_question_are_not_taken_for_independent() -> None:
    """30 questions always or never solved: 16 samples each say no more than one."""
    once = interval95([1.0] * 15 + [0.0] * 15, [1] * 30)
    often = interval95([1.0] * 15 + [0.0] * 15, [16] * 30)
    assert (often.low, often.high) == (once.low, once.high)
    independent = interval95([0.5] * 30, [16] * 30)
    assert independent.high - independent.low < (once.high - once.low) / 3


@settings(max_examples=40)
@given(st.integers(1, 400), st.integers(1, 64))
def test_none_or_all_correct_gives_an_interval_with_width(n: int, k: int) -> None:
    none, every = pass_at_1([[False] * k] * n), pass_at_1([[True] * k] * n)
    assert none.mean == none.low == 0
    assert 0 < none.high == pytest.approx(1 - every.low)
    assert every.mean == every.high == 1
    assert none.high >= 3.5 / (n + 4)  # the rule of three


@settings(max_examples=40)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=40))
def test_mean_lies_inside_its_interval_inside_0_and_1(correct: list[list[bool]]) -> None:
    for score in (pass_at_1(correct), pass_at_k(correct, 1)):
        assert 0 <= score.low <= score.mean + 1e-12
        assert score.mean - 1e-12 <= score.high <= 1


def test_pass_at_1_does_not_drift_with_k() -> None:
    """The counting bug of others: the score halves each time k doubles."""
    rng = np.random.default_rng(3)
    difficulty = rng.beta(0.5, 0.5, 400)
    scores = [pass_at_1([list(rng.random(k) < p) for p in difficulty]) for k in (1, 2, 4, 8, 16, 32, 64)]
    assert all(abs(score.mean - difficulty.mean()) < 0.03 for score in scores)
    repeated = [[True, False]] * 3 + [[False, False]] * 5
    assert pass_at_1([samples * 8 for samples in repeated]).mean == pass_at_1(repeated).mean == 3 / 16


def test_questions_weigh_the_same_whatever_their_number_of_samples() -> None:
    assert pass_at_1([[True] * 10, [False]]).mean == 0.5
    assert pass_at_1([[True], [], [False]]).n == 2


@settings(max_examples=40)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(samples: list[bool], k: int) -> None:
    if k > len(samples):
        with pytest.raises(DataError):
            pass_at_k([samples], k)
        return
    subsets = list(combinations(samples, k))
    assert pass_at_k([samples], k).mean == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_1_is_pass_at_k_of_1() -> None:
    correct = [[True, False, False], [True, True, False], [False, False, False]]
    assert pass_at_k(correct, 1).mean == pytest.approx(pass_at_1(correct).mean)
    assert (pass_at_k(correct, 1).low, pass_at_k(correct, 1).high) == (pass_at_1(correct).low, pass_at_1(correct).high)


def test_majority_wins_whatever_the_order() -> None:
    votes = [("7", True), ("8", False), ("8", False), ("7", True), ("7", True)]
    assert cons_at_k([votes]).mean == cons_at_k([votes[::-1]]).mean == 1
    assert cons_at_k([votes]).k == 5


def test_unreadable_answers_have_no_vote() -> None:
    assert cons_at_k([[(None, False)] * 10 + [("7", True)]]).mean == 1
    assert cons_at_k([[(None, False)] * 10]).mean == 0


def test_tie_counts_as_its_expectation() -> None:
    assert cons_at_k([[("7", True), ("8", False)]]).mean == 0.5
    assert cons_at_k([[("7", True), ("8", False), ("9", False)]]).mean == pytest.approx(1 / 3)


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["7", "8", None]), min_size=3, max_size=7), st.integers(1, 3))
def test_a_vote_of_k_is_the_mean_over_all_subsets(said: list[str | None], k: int) -> None:
    votes = [(answer, answer == "7") for answer in said]
    subsets = [cons_at_k([list(part)]).mean for part in combinations(votes, k)]
    found = cons_at_k([votes, votes[:0], votes[: k - 1]], k)
    assert found.mean == pytest.approx(sum(subsets) / len(subsets)) and (found.n, found.k) == (1, k)
    assert cons_at_k([votes], 1).mean == pytest.approx(pass_at_1([[right for _, right in votes]]).mean)


def test_votes_of_many_samples_are_drawn_and_nearly_their_mean() -> None:
    votes = [("7", True)] * 20 + [(str(n), False) for n in range(100, 120)]
    assert cons_at_k([votes], 2).mean == pytest.approx(0.5, abs=0.08)
    assert cons_at_k([votes], 16).mean == 1


def test_consensus_beats_pass_at_1_when_errors_scatter() -> None:
    rng = np.random.default_rng(5)
    right = rng.random((100, 16)) < 0.4
    votes = [[("gold", True) if r else (f"{rng.integers(50)}", False) for r in row] for row in right]
    assert cons_at_k(votes).mean > 0.95
    assert abs(pass_at_1(right.tolist()).mean - 0.4) < 0.05


def test_paired_interval_is_narrower_and_covers_the_difference() -> None:
    rng = np.random.default_rng(6)
    inside = narrower = 0
    for _ in range(RUNS):
        easy = rng.beta(0.5, 0.5, 50) * 0.9
        a, b = rng.binomial(8, easy) / 8, rng.binomial(8, easy + 0.05) / 8
        interval = paired(list(a), list(b))
        inside += interval.low <= 0.05 <= interval.high
        alone = interval95(list(b), [8] * 50)
        narrower += interval.high - interval.low < alone.high - alone.low
    assert 0.92 <= inside / RUNS <= 0.98
    assert narrower / RUNS > 0.95


def test_equal_models_are_not_called_equal_for_certain() -> None:
    same = paired([1.0, 0.0] * 10, [1.0, 0.0] * 10)
    assert same.mean == 0
    assert same.low == -same.high
    assert 0.1 < same.high < 0.2
    with pytest.raises(DataError, match="same questions"):
        paired([1.0], [1.0, 0.0])


def test_with_one_sample_the_sign_flip_test_is_mcnemars() -> None:
    first = [1.0] * 9 + [0.0] * 2 + [1.0] * 30 + [0.0] * 5
    second = [0.0] * 9 + [1.0] * 2 + [1.0] * 30 + [0.0] * 5
    exact = 2 * sum(math.comb(11, i) for i in range(3)) / 2**11
    assert sign_flip(first, second) == sign_flip(second, first) == pytest.approx(exact)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9))
def test_the_sign_flip_test_counts_all_tosses(scores: list[tuple[int, int]]) -> None:
    differences = [b - a for a, b in scores]
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=len(scores))
    ]
    wanted = sum(abs(total) >= abs(sum(differences)) for total in sums) / len(sums)
    assert sign_flip([a / 4 for a, _ in scores], [b / 4 for _, b in scores]) == pytest.approx(wanted)


def test_p_values_of_equal_models_are_uniform_and_survive_lost_samples() -> None:
    rng = np.random.default_rng(9)
    found = []
    for _ in range(RUNS):
        chance = rng.beta(1, 1, 40)
        drawn = rng.integers(5, 9, 40)  # samples that came, not the same everywhere
        a, b = (list(rng.binomial(drawn, chance) / drawn) for _ in range(2))
        found.append(sign_flip(a, b))
    assert 0.02 <= float(np.mean(np.array(found) < 0.05)) <= 0.08
    assert 0.4 < float(np.mean(found)) < 0.6
    assert sign_flip([0.5] * 30, [0.9] * 30) < 1e-8 and sign_flip([0.5], [0.5]) == 1


def test_student_quantiles_match_the_tables() -> None:
    tables = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 29: 2.045, 199: 1.972}
    assert {v: student(v) for v in tables} == pytest.approx(tables, rel=0.005)


def test_interval_prints_as_a_score_with_its_evidence() -> None:
    assert str(Interval(0.5, 0.332, 0.668, 30, 16)) == "50.0 % [33.2, 66.8] (n=30, k=16)"
