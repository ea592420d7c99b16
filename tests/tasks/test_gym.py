import inspect
import re
from pathlib import Path

import pytest

from sputnik.errors import ConfigError, TaskError
from sputnik.tasks.base import Verdict, judge, load_task, self_check
from sputnik.tasks.gym import EVALUATED, REFUSED
from sputnik.tasks.verify import VerifierPool

pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "simple_equations", "leg_counting", "number_sorting"])
def test_ladder_families_pass_the_self_check(name: str) -> None:
    self_check(load_task(f"gym:{name}"), n=4)


def test_workers_judge_like_the_parent() -> None:
    task = load_task("gym:chain_sum", {"max_terms": 3})
    problems = task.problems("train", 20)
    with VerifierPool("gym:chain_sum", {"max_terms": 3}) as pool:
        found = pool.verify([(problem, answer) for problem in problems for answer in (problem.gold, "1", "")])
    assert [judgement.verdict for judgement in found] == [Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE] * 20


def test_partial_credit_is_wrong() -> None:
    task = load_task("gym:time_intervals")
    for problem in task.problems("train", 10):
        assert judge(task, problem, problem.gold).verdict == Verdict.CORRECT
        assert judge(task, problem, task.damage(problem.gold)).verdict in (Verdict.WRONG, Verdict.UNPARSEABLE)


def test_splits_share_no_question() -> None:
    task = load_task("gym:gcd")
    train, test = ({problem.prompt for problem in task.problems(split, 200)} for split in ("train", "test"))
    assert len(train) == len(test) == 200 and not train & test


@pytest.mark.parametrize("name", [name for name, _ in REFUSED])
def test_a_family_known_to_be_bad_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(TaskError, match=f"gym:{name} is refused: it"):
        load_task(f"gym:{name}")


def test_a_lenient_scorer_is_refused_until_it_is_taken_knowingly() -> None:
    with pytest.raises(TaskError, match="'several'|'options'"):
        self_check(load_task("gym:spell_backward"), n=4)
    self_check(load_task("gym:spell_backward", {"tolerates": ["several", "options", "sentence", "hedge"]}), n=4)


def test_text_that_makes_the_scorer_raise_is_unparseable() -> None:
    task = load_task("gym:prime_factorization")
    problem = task.problems("train", 1)[0]
    assert task.verify(problem, "not an answer") == Verdict.UNPARSEABLE


@pytest.mark.parametrize("name", EVALUATED)
def test_an_answer_is_never_run(name: str, tmp_path: Path) -> None:
    """Scorers that call `eval` see lists and formulas alone: code could read the gold answer, or change it."""
    task = load_task(f"gym:{name}")
    problem = task.problems("train", 1)[0]
    assert task.verify(problem, problem.gold) == Verdict.CORRECT
    mark = tmp_path / "mark"
    for answer in (
        f"open('{mark}', 'w')",
        f"__import__('os').mkdir('{mark}')",
        "entry['answer']",
        "[entry for entry['answer'] in '1']",
        f"[open(path, chr(119)) for path in ['{mark}']]",
        "exec(chr(105))",
        "x.real",
        "9**9**9**9 if 0 else 1",
        "1" * 9000 + "!",
    ):
        assert task.verify(problem, answer) == Verdict.UNPARSEABLE, answer
    assert not mark.exists()


def test_every_scorer_that_evaluates_an_answer_is_known() -> None:
    from reasoning_gym.factory import DATASETS

    scorers = {name: inspect.getsource(dataset.score_answer) for name, (dataset, _) in DATASETS.items()}
    found = {name for name, source in scorers.items() if re.search(r"(eval|parse_expr|sympify|exec)\(answer", source)}
    assert found - {name for name, _ in REFUSED} == set(EVALUATED)


def test_a_problem_that_cannot_be_made_again_is_not_judged() -> None:
    task, other = load_task("gym:chain_sum"), load_task("gym:chain_sum", {"min_digits": 3, "max_digits": 3})
    problem = task.problems("train", 1)[0]
    with pytest.raises(TaskError, match="came out different"):
        other.verify(problem, problem.gold)


def test_unknown_names_and_options_are_one_line_errors() -> None:
    with pytest.raises(TaskError, match="no family 'chain_sums'.*known: .*chain_sum"):
        load_task("gym:chain_sums")
    with pytest.raises(ConfigError, match="did you mean 'max_terms'"):
        load_task("gym:chain_sum", {"max_term": 3})
    with pytest.raises(ConfigError, match="gym:chain_sum"):
        load_task("gym:chain_sum", {"min_terms": 9, "max_terms": 3})
