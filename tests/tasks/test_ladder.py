"""The rungs: golds that an independent reckoning confirms, and worked examples of the promised quality."""

import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from sputnik.errors import ConfigError, TaskError
from sputnik.tasks.base import Problem, Verdict, judge, load_task, self_check
from sputnik.tasks.ladder import RUNGS, Rung
from sputnik.tasks.spelling import COMMON
from sputnik.tasks.verify import VerifierPool

NAMES = [f"ladder:{name}" for name in RUNGS]


def reckoned(name: str, prompt: str) -> str:
    """The answer, found another way and from the words of the question alone."""
    numbers = list(map(int, re.findall("[0-9]+", prompt)))
    match name:
        case "ladder:compare":
            return str(sorted(numbers)[-1])
        case "ladder:sort":
            return " ".join(sorted(map(str, numbers), key=int))
        case "ladder:gcd":
            return str(math.gcd(*numbers))
        case "ladder:equation":
            left, right = prompt.removeprefix("Solve ").removesuffix(" for x.").split("=")
            at_0, at_1 = (eval(left.replace("x", f"*{x}")) for x in (0, 1))
            return str((int(right) - at_0) // (at_1 - at_0))
        case "ladder:reverse":
            return "".join(reversed(prompt.split('"')[1]))
        case _:
            letter, word = re.fullmatch(r'How many times is (.) in "(.*)"\?', prompt).groups()  # type: ignore[union-attr]
            return str(len(re.findall(letter, word)))


@pytest.mark.parametrize("name", NAMES)
def test_gold_is_what_another_reckoning_finds(name: str) -> None:
    for problem in load_task(name).problems("train", 300):
        assert problem.gold == reckoned(name, problem.prompt), problem.prompt


@pytest.mark.parametrize("name", NAMES)
def test_each_family_passes_the_self_check_and_says_its_answers_in_sentences(name: str) -> None:
    task = load_task(name)
    with VerifierPool(name) as pool:
        self_check(task, verify=pool.verify)
    for problem in task.problems("test", 20):
        said = task.conclude(problem, problem.gold)
        quote = '"' if name == "ladder:reverse" else ""
        assert said == f"The answer is {quote}{problem.gold}{quote}."
        assert judge(task, problem, said).verdict is Verdict.CORRECT


@pytest.mark.parametrize("name", NAMES)
def test_demonstrations_have_the_promised_quality(name: str) -> None:
    task = load_task(name)
    right = defaultdict(list)
    for example in task.demonstrations(1500, seed=0):
        gold = reckoned(name, example.prompt)
        problem = Problem(prompt=example.prompt, gold=gold, meta={})
        assert example.correct == (task.verify(problem, example.answer) is Verdict.CORRECT)
        assert task.self_checks(example.thinking or "") == (example.style == "checked")
        right[example.style].append(example.correct)
    share = {style: sum(found) / len(found) for style, found in right.items()}
    assert share["guess"] < 0.5 and share["sloppy"] < share["steps"] - 0.1
    assert share["guess"] < share["steps"] - 0.3
    assert share["steps"] > 0.7 and share["steps"] < share["checked"] < 1
    assert [round(len(right[style]) / 1500, 1) for style in ("steps", "checked")] == [0.2, 0.2]


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_follows_the_working_and_a_check_mends_a_slip(name: str) -> None:
    slips = {"style_weights": {"sloppy": 1, "checked": 1}, "slip": 0.4, "careful_slip": 0.4, "miss": 0.0}
    task = load_task(name, slips)
    mended = 0
    for example in task.demonstrations(200, seed=0):
        assert example.thinking is not None
        mended += "Wait, not" in example.thinking
        assert example.correct or example.style == "sloppy"
        last = example.thinking.splitlines()[-1]
        if name != "ladder:sort" and not last.startswith("Wait"):
            assert last.replace(" ", "").endswith(example.answer)
    assert mended > 20


@pytest.mark.parametrize("name", NAMES)
def test_demonstrations_come_from_the_train_split_and_from_the_seed(name: str) -> None:
    task = load_task(name)
    shown = {example.prompt for example in task.demonstrations(500, seed=1)}
    held_out = {problem.prompt for problem in [*task.problems("validation", 100), *task.problems("test", 100)]}
    assert not shown & held_out
    assert task.demonstrations(30, 7) == load_task(name).demonstrations(30, 7) != task.demonstrations(30, 8)


@pytest.mark.parametrize(
    ("name", "gold", "answer", "verdict"),
    [
        ("sort", "1 5 12", "1, 5, 12", Verdict.CORRECT),
        ("sort", "1 5 12", " 1 5  12.\n", Verdict.CORRECT),
        ("sort", "1 5 12", "1 12 5", Verdict.WRONG),
        ("sort", "1 5 12", "1 5", Verdict.WRONG),
        ("sort", "1 5 12", "1 5 12 12", Verdict.WRONG),
        ("sort", "1 5 12", "1 5 12 or so", Verdict.UNPARSEABLE),
        ("sort", "1 5 12", "", Verdict.UNPARSEABLE),
        ("reverse", "enots", '"Enots".', Verdict.CORRECT),
        ("reverse", "enots", '"enots"', Verdict.CORRECT),
        ("reverse", "enots", "ENOTS.", Verdict.CORRECT),
        ("reverse", "enots", "stone", Verdict.WRONG),
        ("reverse", "enots", "e n o t s", Verdict.UNPARSEABLE),
        ("reverse", "enots", "enots enots", Verdict.UNPARSEABLE),
        ("count", "2", "two", Verdict.UNPARSEABLE),
        ("gcd", "12", "12.", Verdict.CORRECT),
        ("gcd", "twelve", "twelve", Verdict.BAD_GOLD),
    ],
)
def test_verdicts(name: str, gold: str, answer: str, verdict: Verdict) -> None:
    task = load_task(f"ladder:{name}")
    assert task.verify(Problem(prompt="?", gold=gold), answer) == verdict


def test_spellings_of_one_answer_are_one_vote() -> None:
    for name, spellings in (
        ("sort", ("1 5", "1, 5", "1 5.")),
        ("reverse", ("abc", '"abc"', "Abc.")),
        ("gcd", ("7", "07")),
    ):
        assert len({load_task(f"ladder:{name}").normalise(text) for text in spellings}) == 1


def test_order_of_the_numbers_makes_no_new_question() -> None:
    for name in ("compare", "gcd", "sort"):
        task = load_task(f"ladder:{name}")
        pair = [Problem(prompt=str(n), gold="3 7", meta={"numbers": n}) for n in ([3, 7], [7, 3])]
        assert task.identity(pair[0]) == task.identity(pair[1])


def test_counts_are_spread() -> None:
    """Else a constant would do."""
    golds = Counter(problem.gold for problem in load_task("ladder:count").problems("train", 400))
    assert golds.most_common(1)[0][1] < 180 and len(golds) >= 4


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        ("ladder", {}, TaskError, "ladder has no family ''; write ladder: and one of compare, sort, gcd"),
        ("ladder:gdc", {}, TaskError, "no family 'gdc'"),
        ("ladder:sort", {"cuont": [3, 4]}, ConfigError, "did you mean 'count'"),
        ("ladder:sort", {"count": [4, 3]}, ConfigError, "need 2 <= count"),
        ("ladder:compare", {"count": [1, 3]}, ConfigError, "need 2 <= count"),
        ("ladder:gcd", {"largest": 5}, ConfigError, "largest = 5"),
        ("ladder:equation", {"largest": 1}, ConfigError, "largest = 1"),
        ("ladder:count", {"letters": [9, 3]}, ConfigError, "shortest, longest"),
        ("ladder:count", {"style_weights": {"guess": -1}}, ConfigError, "style_weights"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_fix(
    spec: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        load_task(spec, options)
    assert "\n" not in str(caught.value)


def test_all_rungs_make_one_mixture_with_worked_examples() -> None:
    task = load_task("mix", {"families": [{"task": name} for name in NAMES]})
    shown = Counter(example.style.partition(": ")[0] for example in task.demonstrations(120, seed=0))
    assert shown == dict.fromkeys(NAMES, 20)
    assert all(issubclass(rung, Rung) and rung.name == f"ladder:{name}" for name, rung in RUNGS.items())


def test_the_questions_of_the_docs_have_the_answers_of_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", page.split("\n## The ladder\n")[1], re.MULTILINE
    )
    assert [name for name, _, _ in rows] == list(RUNGS)
    assert all(reckoned(f"ladder:{name}", question) == answer for name, question, answer in rows)


def test_what_is_spelt_out_needs_no_sum_and_no_comparison_of_numbers_in_the_head() -> None:
    def thought(name: str, **meta: Any) -> list[str]:
        task = load_task(f"ladder:{name}", {"spelt": True})
        assert isinstance(task, Rung)
        return [str(step) for step in task.working(Problem(prompt="", gold="", meta=meta), lambda: False)]

    assert thought("compare", numbers=[327, 332, 45, 332]) == [
        "327 332 3=3 2<3: 332", "332 45 3>2: 332", "332 332 3=3 3=3 2>2: 332"
    ]  # fmt: skip
    assert thought("gcd", numbers=[90, 36]) == ["2*36=72", "90-72=18", "2*18=36", "36-36=0", "so 18"]
    assert thought("count", word="fifi", letter="i") == ["f-i 0", "i=i 1", "f-i 1", "i=i 2"]


@pytest.mark.parametrize("name", ["compare", "gcd", "count"])
def test_what_is_spelt_out_ends_as_what_is_not(name: str) -> None:
    short, spelt = (load_task(f"ladder:{name}", {"spelt": each}) for each in (False, True))
    assert isinstance(short, Rung) and isinstance(spelt, Rung)
    for problem in short.problems("train", 200):
        ends = [task.outcome(task.working(problem, lambda: False)) for task in (short, spelt)]
        assert ends == [problem.gold] * 2


@pytest.mark.parametrize("name", ["reverse", "count"])
def test_english_words_are_real_ones_or_look_like_them(name: str) -> None:
    task = load_task(f"ladder:{name}", {"english": True, "letters": [3, 10]})
    problems = task.problems("train", 1000)
    words = {problem.meta["word"] for problem in problems}
    assert all(re.fullmatch("[a-z]{3,10}", word) for word in words)
    assert 50 <= len(words & set(COMMON.split())) <= 400  # of 185, for the train split
    assert sum(re.search(r"(st|th|ch|ng|tr)", word) is not None for word in words) > 150
    assert all(reckoned(task.name, problem.prompt) == problem.gold for problem in problems)


@pytest.mark.parametrize("name", [*NAMES, "arithmetic"])
def test_other_wordings_hold_the_same_question(name: str) -> None:
    def parts(text: str) -> list[str]:
        text = text.replace(" plus ", "+").replace(" minus ", "-")
        return re.findall(r"\d+|[-+]", text)

    task = load_task(name)
    for problem in task.problems("train", 20):
        others = task.wordings(problem)
        assert len(set(others)) == len(others) >= 5 and problem.prompt not in others
        for other in others:
            assert parts(other) == parts(problem.prompt)
            for held in ("word", "letter"):
                assert held not in problem.meta or re.search(rf"\b{problem.meta[held]}\b", other)
