import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from sputnik.errors import SputnikError, TaskError
from sputnik.tasks.base import Problem, Verdict, load_task
from sputnik.tasks.verify import VerifierPool

HOSTILE = """
import ctypes, os, re, sys, time
from sputnik.tasks.base import Problem, Task

class Hostile(Task):
    name = "hostile"

    def generate(self, rng):
        return Problem(prompt="?", gold="yes")

    def verify(self, problem, answer):
        match answer:
            case "spin":
                while True: pass
            case "regex": re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter
            case "sleep": time.sleep(1000)
            case "exit": os._exit(3)
            case "sys.exit": sys.exit(4)
            case "segfault": ctypes.string_at(0)
            case "memory": return len(bytearray(64 << 30)) > 0
            case "raise": return 1 / 0
            case "none": return None
            case "print": print("not a verdict")
            case "input": return input() == ""
            case "torch": return "torch" in sys.modules
        return answer == problem.gold
"""
YES = Problem(prompt="?", gold="yes")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tasks") / "hostile.py"
    path.write_text(HOSTILE)
    return str(path)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def gone(pid: int, within_s: float) -> bool:
    late = time.monotonic() + within_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > late:
            return False
        time.sleep(0.02)
    return True


def test_every_kind_of_trouble_costs_one_item_and_nothing_else(hostile: str) -> None:
    troubles = {
        "spin": (Verdict.TIMEOUT, "killed after 0.5 s"),
        "regex": (Verdict.TIMEOUT, "killed after 0.5 s"),
        "sleep": (Verdict.TIMEOUT, "killed after 0.5 s"),
        "exit": (Verdict.ERROR, "exit status 3"),
        "sys.exit": (Verdict.ERROR, "exit status 4"),
        "segfault": (Verdict.ERROR, "SIGSEGV"),
        "memory": (Verdict.ERROR, "MemoryError"),
        "raise": (Verdict.ERROR, "hostile.py:21: Hostile.verify raised ZeroDivisionError: division by zero"),
        "none": (Verdict.ERROR, "must return a Verdict or a bool"),
        "print": (Verdict.WRONG, ""),
        "input": (Verdict.ERROR, "EOFError"),
        "torch": (Verdict.WRONG, ""),
        "\ud800": (Verdict.WRONG, ""),
    }
    items = [(YES, answer) for trouble in troubles for answer in ("yes", trouble, "no")]
    with VerifierPool(hostile, deadline_s=0.5) as pool:
        found = pool.verify(items)
        assert [judgement.verdict for judgement in found[0::3]] == [Verdict.CORRECT] * len(troubles)
        assert [judgement.verdict for judgement in found[2::3]] == [Verdict.WRONG] * len(troubles)
        for (trouble, (verdict, detail)), judgement in zip(troubles.items(), found[1::3]):
            assert judgement.verdict == verdict, trouble
            assert detail in judgement.detail, trouble
        assert pool.verify([]) == []
        assert pool.verify([(YES, "yes")])[0].verdict == Verdict.CORRECT


def test_several_workers_keep_the_order_while_one_of_them_hangs(hostile: str) -> None:
    answers = ["yes", "no", "spin", "yes"] + ["yes", "no"] * 200 + ["exit", "no"]
    with VerifierPool(hostile, workers=2, deadline_s=0.5) as pool:
        found = [judgement.verdict for judgement in pool.verify([(YES, answer) for answer in answers])]
    expected = {"yes": Verdict.CORRECT, "no": Verdict.WRONG, "spin": Verdict.TIMEOUT, "exit": Verdict.ERROR}
    assert found == [expected[answer] for answer in answers]


def test_the_deadline_is_for_one_item_not_for_the_batch(hostile: str) -> None:
    with VerifierPool(hostile, deadline_s=0.4) as pool:
        begun = time.monotonic()
        while time.monotonic() - begun < 0.8:
            assert {judgement.verdict for judgement in pool.verify([(YES, "yes")] * 300)} == {Verdict.CORRECT}


def test_pool_agrees_with_the_verifier_called_directly() -> None:
    task = load_task("countdown")
    items = [(problem, answer) for problem in task.problems("train", 50) for answer in (problem.gold, "1 + 1", "?")]
    with VerifierPool("countdown") as pool:
        assert [judgement.verdict for judgement in pool.verify(items)] == [task.verify(*item) for item in items]


def test_close_leaves_no_process_and_a_closed_pool_says_so(hostile: str) -> None:
    before = children()
    pool = VerifierPool(hostile, workers=2)
    assert len(children() - before) == 2
    pool.close()
    pool.close()
    assert children() == before
    with pytest.raises(RuntimeError, match="closed"):
        pool.verify([(YES, "yes")])


def test_a_task_that_does_not_load_is_an_error_at_once(tmp_path: Path) -> None:
    before = children()
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ny = x / 0\n")
    with pytest.raises(TaskError, match=r"broken.py:2: import raised ZeroDivisionError"):
        VerifierPool(str(path))
    path.write_text(
        "import os, sys\nif not sys.flags.safe_path: from sputnik.tasks.base import Task\nraise SystemExit(5)\n"
    )
    with pytest.raises(SystemExit):
        load_task(str(path))
    path.write_text(HOSTILE + "\nif sys.flags.safe_path: os._exit(6)\n")  # dies in the worker only
    with pytest.raises(SputnikError, match="could not start: .*exit status 6"):
        VerifierPool(str(path))
    assert children() == before


SCRIPT = """
import sys, threading
from sputnik.tasks.base import Problem
from sputnik.tasks.verify import VerifierPool
pool = VerifierPool(sys.argv[1], workers=2, deadline_s=float(sys.argv[2]))
print(*[worker._process.pid for worker in pool._workers], flush=True)
if sys.argv[3] == "busy":
    pool.verify([(Problem(prompt="?", gold="yes"), answer) for answer in ("regex", "sleep")])
else:
    threading.Event().wait()
"""


def start_script(*arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    script = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert script.stdout is not None
    return script, [int(pid) for pid in script.stdout.readline().split()]


@pytest.mark.parametrize(
    ("deadline", "state", "how"),
    [("60", "idle", signal.SIGKILL), ("1", "busy", signal.SIGKILL), ("60", "busy", signal.SIGINT)],
)
def test_no_worker_outlives_its_parent(hostile: str, deadline: str, state: str, how: signal.Signals) -> None:
    script, workers = start_script(hostile, deadline, state)
    with script:
        assert len(workers) == 2
        time.sleep(0.3)
        script.send_signal(how)
    assert all(gone(pid, within_s=4.0) for pid in workers)


def test_a_cheap_verifier_costs_microseconds() -> None:
    problems = load_task("arithmetic").problems("train", 64)
    items = [(problem, str(number)) for problem in problems for number in range(32)]
    with VerifierPool("arithmetic") as pool:
        best = min(_seconds(pool, items) for _ in range(5))
    assert best / len(items) < 200e-6  # 5 us on a quiet machine; the bound leaves room for a busy one


def _seconds(pool: VerifierPool, items: list[tuple[Problem, str]]) -> float:
    begun = time.perf_counter()
    pool.verify(items)
    return time.perf_counter() - begun


def test_a_worker_ends_without_a_word_when_its_parent_died_while_writing() -> None:
    setup = b'{"spec":"arithmetic","options":{},"deadline_s":5.0,"memory_bytes":4294967296}\n'
    command = [sys.executable, "-P", "-c", "from sputnik.tasks.verify import serve; serve()"]
    done = subprocess.run(command, input=setup + b'[[{"prompt":"1+', capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
