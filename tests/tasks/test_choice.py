"""Multiple choice: the letter counts wherever one would look for it, hedging pays nothing, no letter is favoured."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sputnik.errors import DataError, TaskError
from sputnik.tasks.base import Problem, Task, Verdict, best_constant, judge, load_task, self_check
from sputnik.tasks.choice import chosen


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return f"choice:{path}"


@pytest.fixture
def spec(tmp_path: Path) -> str:
    """The right one is always written first in the file."""
    rows = [
        {"question": f"Twice {n}?", "choices": [2 * n, n, n + 1, "none\nof these"], "answer": 0} for n in range(2, 202)
    ]
    return write(tmp_path / "twice.jsonl", rows)


@pytest.fixture
def task(spec: str) -> Task:
    return load_task(spec, {"benchmark": True})


def shown(problem: Problem) -> list[str]:
    """The options as the question lists them."""
    return problem.prompt.split("?\n\n", 1)[1].split("\n")


def test_the_task_passes_its_own_check(task: Task) -> None:
    self_check(task)


@pytest.mark.parametrize(
    "form",
    ["X", "(X)", " X. ", "**X**", "X)", "Hm.\nAnswer: X", "It is so.\n\n**Answer: X**", "answer: (X)\n", "Answer: $X$",
     "The answer is X.", "\\boxed{X}", "Answer: \\boxed{X}", "Final answer: X", "Answer: X\nAnswer: X"],
)  # fmt: skip
def test_the_letter_is_found_in_every_usual_place(task: Task, form: str) -> None:
    problem = task.problems("test", 1)[0]
    other = "A" if problem.gold != "A" else "B"
    assert judge(task, problem, form.replace("X", problem.gold)).verdict == Verdict.CORRECT
    assert judge(task, problem, form.replace("X", other)).verdict == Verdict.WRONG
    assert task.normalise(form.replace("X", problem.gold)) == problem.gold


@pytest.mark.parametrize(
    "text",
    ["A or B", "AB", "A, B", "Answer: A\nAnswer: B", "E", "Answer: Z", "a", "An answer: A or B", "Answer: A or B", ""],
)
def test_hedges_and_letters_that_are_not_there_are_unreadable(task: Task, text: str) -> None:
    assert {judge(task, problem, text).verdict for problem in task.problems("test", 20)} == {Verdict.UNPARSEABLE}


def test_a_long_answer_is_read_in_no_time() -> None:
    """Tens of thousands of characters that could each begin the form."""
    began = time.process_time()
    assert chosen("answer " * 1400 + "answer" + " *(" * 3000) is None and chosen("answer" + " " * 9000 + "B") is None
    assert time.process_time() - began < 0.5


def test_options_are_shuffled_by_question_and_seed_and_the_gold_letter_follows(spec: str) -> None:
    task = load_task(spec, {"benchmark": True})
    problems = task.problems("test", 200)
    for problem in problems:
        assert len(shown(problem)) == 5  # one option has two lines
        number = int(problem.prompt.split("Twice ")[1].split("?")[0])
        assert f"{problem.gold}) {2 * number}" in shown(problem)
        assert problem.meta == {"options": 4, "chance": 0.25}
    golds = Counter(problem.gold for problem in problems)
    assert set(golds) == set("ABCD") and max(golds.values()) < 75
    constant = best_constant(problems, lambda items: [judge(task, *item) for item in items])
    assert constant.accuracy == max(golds.values()) / 200
    again = load_task(spec, {"benchmark": True}).problems("test", 200)
    other = {p.id: p for p in load_task(spec, {"benchmark": True, "order": 1}).problems("test", 200)}
    assert again == problems and {p.id for p in problems} == set(other)
    assert 100 < sum(other[p.id].prompt != p.prompt for p in problems) < 200


def test_the_right_choice_may_be_named_in_three_ways(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "choices": ["x", "y"], "answer": a} for n, a in enumerate([1, "B", "y"])]
    problems = load_task(write(tmp_path / "a.jsonl", rows), {"benchmark": True}).problems("test", 3)
    assert all(f"{problem.gold}) y" in problem.prompt for problem in problems)


def test_splits_do_not_overlap_and_a_benchmark_is_all_test(spec: str) -> None:
    task = load_task(spec)
    ids = [{p.id for p in task.stream(split, 0)} for split in ("train", "validation", "test")]
    assert sum(map(len, ids)) == 200 == len(set.union(*ids))
    with pytest.raises(TaskError, match="only 0 distinct train"):
        load_task(spec, {"benchmark": True}).problems("train", 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["x", "y"], "answer": 0}, "needs a text under question"),
        ({"question": "?", "choices": ["x"], "answer": 0}, "2 to 26 different texts"),
        ({"question": "?", "choices": ["x", "x"], "answer": 0}, "2 to 26 different texts"),
        ({"question": "?", "choices": ["x", "y"], "answer": 2}, "answer 2 is neither"),
        ({"question": "?", "choices": ["x", "y"], "answer": "C"}, "answer 'C' is neither"),
        ({"question": "?", "choices": ["x", "y"]}, "answer None is neither"),
        ({"question": "1+1?", "choices": [1, 2, 3], "answer": 2}, "answer 2 is one choice and the number of another"),
    ],
)
def test_lines_that_are_no_question_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"question": "Fine?", "choices": ["x", "y"], "answer": 0}
    task = load_task(write(tmp_path / "a.jsonl", [good, row]), {"benchmark": True})
    with pytest.raises(DataError, match=f"a.jsonl:2: .*{message}"):
        task.problems("test", 1)


@pytest.mark.parametrize("answer", [0, "7", "A"])
def test_choices_may_be_numbers(tmp_path: Path, answer: Any) -> None:
    row = {"question": "3+4?", "choices": [7, 5, 8], "answer": answer}
    (problem,) = load_task(write(tmp_path / "a.jsonl", [row]), {"benchmark": True}).problems("test", 1)
    assert f"{problem.gold}) 7" in problem.prompt
