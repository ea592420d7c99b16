import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sputnik.errors import ConfigError, TaskError
from sputnik.tasks.base import Judgement, Problem, Task, Verdict, best_constant, judge, load_task, self_check
from sputnik.tasks.verify import VerifierPool

TASKS = ("arithmetic", "countdown")


class Digit(Task):
    """Forty questions in all; the verifier is replaced in the tests that need a bad one."""

    name = "digit"

    def generate(self, rng: random.Random) -> Problem:
        number = rng.randrange(40)
        return Problem(prompt=f"Last digit of {number}?", gold=str(number % 10))

    def verify(self, problem: Problem, answer: str) -> Verdict | bool:
        return answer.strip() == problem.gold


@pytest.mark.parametrize("spec", TASKS)
@settings(max_examples=6, deadline=None)
@given(seeds=st.tuples(*[st.integers(0, 10**6)] * 3))
def test_splits_share_no_question_whatever_the_seeds(spec: str, seeds: tuple[int, int, int]) -> None:
    task = load_task(spec)
    splits = ("train", "validation", "test")
    ids = [{problem.id for problem in task.problems(split, 40, seed)} for split, seed in zip(splits, seeds)]
    assert all(len(found) == 40 for found in ids)
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]


@pytest.mark.parametrize("spec", TASKS)
def test_same_seed_same_problems_other_seed_others(spec: str) -> None:
    task = load_task(spec)
    assert task.problems("train", 50, 3) == load_task(spec).problems("train", 50, 3)
    assert task.problems("train", 50, 3) != task.problems("train", 50, 4)


def test_other_options_never_move_a_question_into_another_split() -> None:
    short = {problem.id for problem in load_task("arithmetic", {"terms": [2, 3]}).problems("train", 500)}
    long = {problem.id for problem in load_task("arithmetic", {"terms": [2, 4]}).problems("test", 500)}
    assert not short & long


def test_demonstrations_come_from_the_train_split_only() -> None:
    task = load_task("arithmetic", {"terms": [2, 3]})
    shown = {example.prompt for example in task.demonstrations(3000, seed=1)}
    held_out = {problem.prompt for split in ("validation", "test") for problem in task.problems(split, 150)}
    assert len(shown) > 500 and not shown & held_out


def test_a_family_that_runs_dry_says_how_many_it_has() -> None:
    sizes = []
    for split in ("train", "validation", "test"):
        with pytest.raises(TaskError, match=rf"'digit' has only \d+ distinct {split} problems; 41 were") as caught:
            Digit().problems(split, 41)
        sizes.append(int(re.findall(r"only (\d+)", str(caught.value))[0]))
    assert sum(sizes) == 40


@pytest.mark.parametrize("spec", TASKS)
def test_shipped_task_passes_its_self_check_in_process_and_in_the_pool(spec: str) -> None:
    self_check(load_task(spec))
    with VerifierPool(spec) as pool:
        self_check(load_task(spec), verify=pool.verify)


@pytest.mark.parametrize(
    ("cheat", "named"),
    [
        (lambda problem, answer: problem.gold in answer, "attack"),
        (lambda problem, answer: answer.strip() in problem.gold, "'empty'"),
        (lambda problem, answer: answer != "", "damaged gold"),
        (lambda problem, answer: False, "WRONG to the gold answer"),
        (lambda problem, answer: int(answer) == int(problem.gold), "ERROR to attack 'empty'.*ValueError"),
        (lambda problem, answer: None, "ERROR to the gold answer.*Verdict or a bool"),
        (lambda problem, answer: answer.strip().split(" ")[0] == problem.gold, "'several'"),
        (lambda problem, answer: answer.strip().endswith(problem.gold), "'several'"),
        (lambda problem, answer: answer.strip().isdecimal() and int(answer) == int(problem.gold), "unicode_digits"),
    ],
)
def test_self_check_refuses_a_verifier_that_can_be_cheated(cheat, named: str, monkeypatch) -> None:
    monkeypatch.setattr(Digit, "verify", lambda self, problem, answer: cheat(problem, answer))
    with pytest.raises(TaskError, match=named) as caught:
        self_check(Digit())
    assert "\n" not in str(caught.value)


def test_a_tolerated_attack_is_not_tried(monkeypatch) -> None:
    sentences = lambda problem: (problem.gold, f"{problem.gold}, I think")  # noqa: E731
    monkeypatch.setattr(Digit, "verify", lambda self, problem, answer: answer.strip() in sentences(problem))
    with pytest.raises(TaskError, match="'sentence'"):
        self_check(Digit())
    monkeypatch.setattr(Digit, "tolerates", ("sentence",))
    self_check(Digit())


def test_an_endless_answer_never_reaches_the_verifier() -> None:
    problem = Digit().problems("train", 1)[0]
    assert judge(Digit(), problem, problem.gold + " " * 1_000_000).verdict == Verdict.UNPARSEABLE


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"meta": {"value": complex(1, 2)}}, "Encoding objects of type complex is unsupported"),
        ({"meta": [1]}, "Expected `object`, got `array`"),
        ({"gold": 7}, "Expected `str`, got `int` - at `$[0].gold`"),
        ({"prompt": None}, "Expected `str`, got `null` - at `$[0].prompt`"),
        ({"prompt": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_a_problem_that_does_not_travel_is_refused(odd: dict[str, Any], reason: str, monkeypatch) -> None:
    problem = Problem(**{"prompt": "p", "gold": "1"} | odd)
    monkeypatch.setattr(Digit, "generate", lambda self, rng: problem)
    with pytest.raises(TaskError, match="prompt and gold must be texts, meta must be JSON: ") as caught:
        self_check(Digit())
    assert reason in str(caught.value)


def test_a_verifier_that_pays_one_answer_to_every_question_is_refused(monkeypatch) -> None:
    even = lambda self, problem, answer: re.fullmatch("[0-9]*[02468]", answer) is not None  # noqa: E731
    twice = lambda self, rng: Problem(prompt=f"Twice {(n := rng.randrange(10**6))}?", gold=str(2 * n))  # noqa: E731
    monkeypatch.setattr(Digit, "generate", twice)
    monkeypatch.setattr(Digit, "verify", even)
    with pytest.raises(TaskError, match="CORRECT to an answer to every question"):
        self_check(Digit())


def test_a_generator_with_a_chance_of_its_own_is_refused(monkeypatch) -> None:
    draw = random.Random(0)
    monkeypatch.setattr(Digit, "generate", lambda self, rng: Problem(prompt=str(draw.random()), gold="1"))
    with pytest.raises(TaskError, match="generate must draw from rng alone"):
        self_check(Digit())


def test_best_constant_is_the_commonest_gold() -> None:
    problems = load_task("arithmetic", {"terms": [2, 2], "largest": 5}).problems("train", 20)
    with VerifierPool("arithmetic") as pool:
        best = best_constant(problems, pool.verify)
    golds = [problem.gold for problem in problems]
    assert best.accuracy == golds.count(best.answer) / 20 == max(map(golds.count, golds)) / 20


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        ("arithmetics", {}, TaskError, "known: arithmetic, countdown, gym, ladder, math, mix"),
        ("arithmetic", {"term": [3, 4]}, ConfigError, "did you mean 'terms'"),
        ("arithmetic", {"terms": [4, 3]}, ConfigError, "shortest <= longest"),
        ("arithmetic", {"operators": "+/"}, ConfigError, "choose from"),
        ("arithmetic", {"style_weights": {"best": 1}}, ConfigError, "style_weights"),
        ("arithmetic:x", {}, TaskError, "takes no argument"),
        ("countdown", {"operators": "/"}, ConfigError, "not / alone"),
        ("nowhere/task.py", {}, TaskError, "no such task file"),
    ],
)
def test_a_wrong_spec_or_option_is_one_line_with_the_fix(spec, options, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        load_task(spec, options)
    assert "\n" not in str(caught.value)


def test_judge_turns_bools_into_verdicts() -> None:
    problem = Digit().problems("train", 1)[0]
    assert judge(Digit(), problem, problem.gold) == Judgement(Verdict.CORRECT)
    assert judge(Digit(), problem, "x") == Judgement(Verdict.WRONG)
