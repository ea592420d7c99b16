r"""An answer may stand in "The answer is X." or \boxed{X}, and what could be two answers earns nothing by it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sputnik.tasks.base import Problem, Task, Verdict, attacks, judge, load_task, normalised, self_check
from sputnik.tasks.final import final_answer

FORMS = ("{}", " {}\n", "The answer is {}.", "\\boxed{{{}}}", "$\\boxed{{{}}}$", "The answer is \\boxed{{{}}}.")
NOT_THE_FORM = (
    "",
    "The answer is .",
    "The answer is 7",
    "the answer is 7.",
    "So the answer is 7.",
    "The answer is 7. The answer is 8.",
    "The answer is 7. The answer is 7.",
    "The answer is 7! Or 8.",
    "The answer is 7.\nThe answer is 8.",
    "The answer is 7\n8.",
    "The answer is The answer is 7..",
    "The answer is 8. \\boxed{7}",
    "The answer is \\boxed{7} or \\boxed{8}.",
    "\\boxed{7} \\boxed{8}",
    "\\boxed{7} or {8}",
    "\\boxed{7} or 8",
    "\\boxed{\\boxed{7}}",
    "\\boxed{8 \\boxed{7}}",
    "\\boxed{7",
    "\\boxed{}",
    "\\boxed{7}}",
    "\\boxed{7. Or 8}",
    "<answer>7</answer><answer>8</answer>",
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answer", ["7", "-7", "3.5", "7 * (2 + 1)", "1 2 3", "\\frac{1}{2}", "Yes", "x^{2}"])
def test_the_form_is_taken_off(form: str, answer: str) -> None:
    assert final_answer(form.format(answer)).strip() == answer


@pytest.mark.parametrize("text", NOT_THE_FORM)
def test_anything_else_is_left_as_it_is_and_earns_nothing(text: str) -> None:
    assert final_answer(text) == text
    assert judge(load_task("arithmetic"), Problem(prompt="What is 3+4?", gold="7"), text).verdict is Verdict.UNPARSEABLE


@given(st.text(max_size=40))
def test_a_conclusion_is_read_back_as_the_answer_it_was_made_of(answer: str) -> None:
    """Where no sentence can hold the answer, the answer stands alone."""
    task = load_task("arithmetic")
    said = task.conclude(Problem(prompt="?", gold=answer), answer)
    assert said == answer or final_answer(said) == answer


def test_a_conclusion_of_a_plain_answer_is_a_sentence() -> None:
    task = load_task("arithmetic")
    assert task.conclude(Problem(prompt="?", gold="9"), "9") == "The answer is 9."
    assert task.conclude(Problem(prompt="?", gold="9"), "1 2\n3 4") == "1 2\n3 4", "a grid is no sentence"


def task_of(name: str, folder: Path) -> Task:
    if name == "math":
        pytest.importorskip("math_verify")
        rows = [{"prompt": f"Question {n}?", "answer": gold} for n, gold in enumerate(["5", "\\frac{1}{2}", "x+1"] * 9)]
        (folder / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return load_task(f"math:{folder / 'some.jsonl'}")
    if name.startswith("gym"):
        pytest.importorskip("reasoning_gym")
    return load_task(name)


@pytest.mark.parametrize("name", ["arithmetic", "countdown", "gym:gcd", "gym:chain_sum", "math"])
def test_every_form_of_the_gold_pays_is_one_vote_and_no_attack_pays(name: str, tmp_path: Path) -> None:
    task = task_of(name, tmp_path)
    self_check(task)
    for problem in task.problems("train", 5):
        said = [form.format(problem.gold) for form in FORMS]
        assert {judge(task, problem, text).verdict for text in said} == {Verdict.CORRECT}
        assert len({normalised(task, problem, text) for text in said}) == 1
        wrong = task.damage(problem.gold)
        for form in FORMS:
            assert judge(task, problem, form.format(wrong)).verdict is not Verdict.CORRECT
        for kind, text in attacks(problem, wrong, [problem.gold]):
            assert judge(task, problem, text).verdict in (Verdict.WRONG, Verdict.UNPARSEABLE), (kind, text[:80])


def test_a_gold_answer_that_is_such_a_sentence_itself_is_judged_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Says(Task):
        name = "says"

        def generate(self, rng):
            number = rng.randrange(10**6)
            return Problem(prompt=f"Say {number}.", gold=f"The answer is {number}.")

        def verify(self, problem, answer):
            return answer == problem.gold

    self_check(Says())
