import re
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sputnik.tasks.arithmetic import Arithmetic, parse_integer, working
from sputnik.tasks.base import Problem, Verdict

ALL = Arithmetic(operators="+-*")


def test_gold_is_what_python_makes_of_the_prompt() -> None:
    for problem in ALL.problems("train", 300):
        expression = problem.prompt.removeprefix("What is ").removesuffix("?")
        assert re.fullmatch(r"[0-9+*\- ]+", expression)
        assert int(problem.gold) == eval(expression)


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(1, 9)), min_size=1, max_size=8), st.integers(1, 9))
def test_working_keeps_the_order_of_operations(rest: list[tuple[str, int]], first: int) -> None:
    words = [str(first)] + [word for sign, number in rest for word in (sign, str(number))]
    lines = working(words)
    assert lines[-1].result == eval(" ".join(words))
    assert all(eval(f"{line.left} {line.sign} {line.right}") == line.result for line in lines)


def test_non_negative_chains_never_dip_below_zero() -> None:
    for problem in Arithmetic(non_negative=True).problems("train", 200):
        assert min(line.result for line in working(problem.meta["words"])) >= 0


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("9", Verdict.CORRECT),
        (" 9\n", Verdict.CORRECT),
        ("9.", Verdict.CORRECT),
        ("+9", Verdict.CORRECT),
        ("-9", Verdict.WRONG),
        ("\N{MINUS SIGN}9", Verdict.WRONG),
        ("10", Verdict.WRONG),
        *[(text, Verdict.UNPARSEABLE) for text in ("", "nine", "8 9", "9 9", "= 9", "9.0", "\u0669", "9\x00", "inf")],
        ("9" * 100_000, Verdict.UNPARSEABLE),
    ],
)
def test_only_the_bare_number_counts(answer: str, verdict: Verdict) -> None:
    assert ALL.verify(Problem(prompt="What is 7 + 5 - 3?", gold="9"), answer) == verdict


def test_an_unreadable_gold_is_bad_gold_even_for_the_same_text() -> None:
    assert ALL.verify(Problem(prompt="?", gold="nine"), "nine") == Verdict.BAD_GOLD


@given(st.integers(-(10**18), 10**18))
def test_parse_integer_inverts_str(number: int) -> None:
    assert parse_integer(str(number)) == number


def test_demonstrations_have_the_promised_quality() -> None:
    task = Arithmetic()
    right = defaultdict(list)
    for example in task.demonstrations(2500, seed=0):
        gold = eval(example.prompt.removeprefix("What is ").removesuffix("?"))
        assert example.correct == (parse_integer(example.answer) == gold)
        right[example.style].append(example.correct)
    share = {style: sum(found) / len(found) for style, found in right.items()}
    assert 0.1 < share["guess"] < 0.19  # one of seven offsets is zero
    assert share["guess"] + 0.1 < share["sloppy"] < share["steps"] - 0.25
    assert share["steps"] + 0.05 < share["checked"] < 1  # a check finds most slips, not all
    assert [round(len(right[style]) / 2500, 1) for style in ("steps", "checked")] == [0.2, 0.2]


def test_the_answer_follows_the_working_and_a_check_mends_a_slip() -> None:
    task = Arithmetic(style_weights={"sloppy": 1, "checked": 1}, slip=0.5, careful_slip=0.5, miss=0.0)
    mended = 0
    for example in task.demonstrations(300, seed=0):
        assert example.thinking is not None
        last = re.findall(r"= ?(-?\d+)", example.thinking)[-1]
        assert last == example.answer
        assert task.self_checks(example.thinking) == (example.style == "checked")
        mended += "Wait, not" in example.thinking
        assert example.correct or example.style == "sloppy"
    assert mended > 100


def test_same_seed_same_demonstrations() -> None:
    assert Arithmetic().demonstrations(50, 7) == Arithmetic().demonstrations(50, 7)
    assert Arithmetic().demonstrations(50, 7) != Arithmetic().demonstrations(50, 8)
