"""Children that are not as they should be, over the real supervisor: none of them brings it down or makes it spin."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from sputnik.serve.settings import WorkerSettings
from sputnik.serve.supervisor import Child, Supervisor
from sputnik.serve.watch import Rules

LARGE = WorkerSettings("m" * (1 << 20), "socket")
"""More than a pipe holds: who does not read it breaks it."""
QUICK = Rules(first=0.01, slowest=0.02)


def run(*command: str, settings: WorkerSettings = LARGE, rules: Rules = QUICK) -> tuple[int, list[str]]:
    said: list[str] = []
    child = Child("worker", settings, said.append, rules, command)
    return Supervisor([child], said.append, lambda: None, 1.0).run(), said


@pytest.mark.parametrize("command", ["/bin/false", "/no/such/program"])
def test_what_cannot_start_is_given_up_after_five_times(command: str) -> None:
    code, said = run(command)
    assert code == 1 and "given up" in said[-1]
    assert sum("started again" in line for line in said) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_it_ends_with_its_terminal_and_a_child_that_was_loading_is_no_failure(number: int) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # under nohup a terminal's end would be ignored, as it should
    kill = threading.Timer(0.3, os.kill, (os.getpid(), number))
    kill.start()
    try:
        code, said = run("/bin/sleep", "60", settings=WorkerSettings("m", "socket"))
    finally:
        signal.signal(number, before)
    assert code == 0 and said[-1] == "stopped", said


def test_a_child_that_waits_to_be_started_again_is_no_failure() -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code, said = run("/bin/false", settings=WorkerSettings("m", "socket"), rules=Rules(first=60, slowest=60))
    assert code == 0 and "started again in 60.0 s" in said[-3] and said[-1] == "stopped", said


def test_a_child_that_closes_its_beats_does_not_make_it_spin(monkeypatch: Any) -> None:
    looks = 0
    listen = Supervisor._listen

    def counted(self: Supervisor) -> None:
        nonlocal looks
        looks += 1
        listen(self)

    monkeypatch.setattr(Supervisor, "_listen", counted)
    script = "import os, time, sys; sys.stdin.read(); os.closerange(3, 99); time.sleep(60)"
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code, _ = run(sys.executable, "-S", "-c", script, settings=WorkerSettings("m", "socket"))
    assert code == 0 and looks < 40


def test_a_child_that_hangs_without_a_supervisor_is_ended() -> None:
    script = (
        "import signal, socket, sys, time\n"
        "from sputnik.serve.beats import Beat, Pulse\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "ours, theirs = socket.socketpair()\n"
        "Pulse(theirs.detach(), lambda: Beat('ready'), grace=0.2).start()\n"
        "ours.close()\n"
        "time.sleep(120)\n"
    )
    begun = time.monotonic()
    assert subprocess.run([sys.executable, "-c", script], timeout=100).returncode == -signal.SIGKILL
    assert time.monotonic() - begun < 60
