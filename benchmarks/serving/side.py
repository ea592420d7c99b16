"""One side of a comparison: a child process that holds a model and answers questions (benchmarks/peers/protocol.py).

    with Side([python, "run_llama.py", file]) as side:
        side.ask("generate", prompts=[[1, 2, 3]], new=8)        -> (seconds inside the child, value)

Every side, ours too, is alone in a process that it may crash. `Absent` is why a side cannot take part: it becomes the
reason that a row gives, never an error of the benchmark.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any


class Absent(Exception):
    """A side that cannot take part, and why."""


class Side(AbstractContextManager["Side"]):
    """A child process that has loaded its model. Raises Absent, with its last words, when it dies."""

    def __init__(self, command: Sequence[str | Path], env: dict[str, str]) -> None:
        self.words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in __exit__
        self.child = subprocess.Popen(
            list(map(str, command)), env=os.environ | env, text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words,
        )  # fmt: skip
        try:
            self.start_s, self.about = self._answer()
        except Absent:
            self.__exit__()
            raise

    @property
    def name(self) -> str:
        return str(self.about["name"])

    def ask(self, do: str, **arguments: Any) -> tuple[float, Any]:
        """(seconds inside the child, answer)."""
        assert self.child.stdin is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self.child.stdin, flush=True)
        except BrokenPipeError:
            raise Absent(self._last_words()) from None
        return self._answer()

    def _answer(self) -> tuple[float, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise Absent(self._last_words())
        answer = json.loads(line)
        return answer["seconds"], answer["value"]

    def _last_words(self) -> str:
        self.child.wait()
        self.words.seek(0)
        lines = [line.strip() for line in self.words if line.strip()]
        return f"ended with {self.child.returncode}: {lines[-1][:300] if lines else 'no word of why'}"

    def __exit__(self, *_: object) -> None:
        for stream in (self.child.stdin, self.child.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # what the dead were to read
                    stream.close()
        try:
            self.child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.words.close()


class Busy:
    """How many cores other processes kept busy, on average, since this was made; nan where the system does not say."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.pids = [os.getpid(), *(side.child.pid for side in sides)]
        self.start = time.perf_counter(), self._others()

    def others(self) -> float:
        return (self._others() - self.start[1]) / (time.perf_counter() - self.start[0])

    def _others(self) -> float:
        import psutil

        machine = psutil.cpu_times()
        mine = [psutil.Process(pid).cpu_times() for pid in self.pids]
        return machine.user + machine.nice + machine.system - sum(times.user + times.system for times in mine)
