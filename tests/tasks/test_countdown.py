import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sputnik.errors import ConfigError
from sputnik.tasks.base import Problem, Verdict
from sputnik.tasks.countdown import Countdown, compute, parse_expression, working

TASK = Countdown()
PROBLEM = Problem(prompt="Make 22 ...", gold="5 * 3 + 7", meta={"numbers": [3, 5, 7], "target": 22})


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("5 * 3 + 7", Verdict.CORRECT),
        (" 7+(3*5) ", Verdict.CORRECT),
        ("7 + 3 \N{MULTIPLICATION SIGN} 5", Verdict.CORRECT),
        ("5 * 3", Verdict.WRONG),
        ("22", Verdict.WRONG),
        ("5 + 3 + 7", Verdict.WRONG),
        ("5 * 3 + 7 + 5 - 5", Verdict.WRONG),
        ("7 / (5 - 5)", Verdict.WRONG),
        ("3 / (7 - 7 * 5 / 5)", Verdict.WRONG),
        ("(" * 90 + "3" + ")" * 90, Verdict.WRONG),
        *[
            (text, Verdict.UNPARSEABLE)
            for text in ("", "5 * 3 + 7 = 22", "5 * 3 + 7, 22", "5 * 3 + 7\n5 * 3 + 7", "1e1")
        ],
        *[(text, Verdict.UNPARSEABLE) for text in ("3 ** 5", "7 // 5", "-7 + 3", "0x16", "2_2", "7(3)", "5 3", "03")],
        *[
            (text, Verdict.UNPARSEABLE)
            for text in ("__import__('os')", "(" * 5000, "(" * 199, "-" * 190 + "3", "9" * 9999)
        ],
    ],
)
def test_only_a_plain_expression_over_the_given_numbers_is_paid(answer: str, verdict: Verdict) -> None:
    assert TASK.verify(PROBLEM, answer) == verdict


@given(st.text(alphabet="0123456789+-*/() ", max_size=60))
def test_value_equals_python_whenever_we_accept_the_text(text: str) -> None:
    tree = parse_expression(text)
    if tree is not None:
        try:
            value = float(compute(tree))
        except (ZeroDivisionError, OverflowError):
            return
        assert re.search(r"//|\*\*", text.replace(" ", "")) is None
        assert value == pytest.approx(eval(text))


def test_every_gold_uses_all_numbers_and_hits_the_target() -> None:
    for problem in TASK.problems("train", 300):
        assert TASK.verify(problem, problem.gold) == Verdict.CORRECT
        assert sorted(map(int, re.findall(r"\d+", problem.gold))) == sorted(problem.meta["numbers"])
        assert str(problem.meta["target"]) in problem.prompt


def test_leaving_numbers_out_is_paid_only_when_allowed() -> None:
    problem = Problem(prompt="Make 15 ...", gold="3 * 5 * (8 - 7)", meta={"numbers": [3, 5, 7, 8], "target": 15})
    assert Countdown(use_all=False).verify(problem, "3 * 5") == Verdict.CORRECT
    assert TASK.verify(problem, "3 * 5") == Verdict.WRONG
    assert Countdown(use_all=False).verify(problem, "3 * 5 + 3 - 3") == Verdict.WRONG


def test_a_sign_that_was_not_offered_is_not_paid() -> None:
    assert Countdown(operators="+-").verify(PROBLEM, "5 * 3 + 7") == Verdict.BAD_GOLD
    problem = Problem(prompt="Make 6 ...", gold="1 + 2 + 3", meta={"numbers": [1, 2, 3], "target": 6})
    assert Countdown(operators="+-").verify(problem, "1 * 2 * 3") == Verdict.WRONG


def test_order_of_the_numbers_does_not_make_a_new_question() -> None:
    other = Problem(prompt="Make 22 from 7, 3, 5", gold="", meta={"numbers": [7, 3, 5], "target": 22})
    assert TASK.identity(other) == TASK.identity(PROBLEM)


def test_searching_demonstrations_are_right_and_guesses_rarely() -> None:
    examples = TASK.demonstrations(400, seed=0)
    gold = {problem.prompt: problem for problem in TASK.problems("train", 400, seed=0)}
    for example in examples:
        if example.prompt in gold:
            paid = TASK.verify(gold[example.prompt], example.answer) == Verdict.CORRECT
            assert paid == example.correct
        assert TASK.self_checks(example.thinking or "") == (example.style == "checked")
    assert all(example.correct for example in examples if example.style in ("search", "checked"))
    assert sum(example.correct for example in examples if example.style in ("guess", "sloppy")) < 40
    styles = Counter(example.style for example in examples)
    assert 150 < styles["guess"] < 210 and 60 < styles["checked"] < 100 and sum(styles.values()) == 400


def test_every_equation_of_a_thought_holds() -> None:
    for example in TASK.demonstrations(200, seed=1):
        for left, right in re.findall(r"^(.+) = (-?[0-9/]+)", example.thinking or "", re.MULTILINE):
            assert eval(left) == pytest.approx(eval(right)), example.thinking


def test_the_working_of_an_expression_ends_at_its_value() -> None:
    assert working("5 * 3 + 7") == ["5 * 3 = 15", "15 + 7 = 22"]
    assert working("8 / (3 - 8 / 3)") == ["8 / 3 = 8/3", "3 - (8/3) = 1/3", "8 / (1/3) = 24"]
    assert working("7") == working("no expression") == []


def test_style_weights_are_checked() -> None:
    with pytest.raises(ConfigError, match="style_weights"):
        Countdown(style_weights={"guess": -1})
