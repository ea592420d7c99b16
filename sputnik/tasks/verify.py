"""Judge answers in killable worker processes, so that no expression can hang, crash or starve the run.

`VerifierPool(spec, options).verify([(problem, answer), ...])` keeps order and always returns one judgement per item.
A worker over its deadline gets SIGKILL and its item TIMEOUT; a worker that dies gives its item ERROR; the rest of the
chunk goes on in a new worker. A worker is a fresh interpreter (never a fork: the parent may hold torch and its threads)
that reads chunks as JSON lines on stdin and answers one line per item, so the parent knows which item is in hand.

When the parent is gone, idle workers see the pipe close and busy ones are ended by their own alarm. Left out: a
sandbox. A task's code runs with the rights of the user; a verifier that runs code written by a model needs more.
"""

import contextlib
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import msgspec

from sputnik.errors import SputnikError, TaskError
from sputnik.tasks.base import Judgement, Problem, Verdict, judge, load_task

__all__ = ["Judgement", "VerifierPool"]

CHUNK = 128  # items sent at once: enough to hide the round trip, few enough to share out among workers
STARTUP_S = 120.0  # importing a heavy verifier (sympy, reasoning_gym) on a busy machine
ALARM_GRACE_S = 1.0  # how much later than the parent a worker's own alarm goes off
MEMORY_BYTES = 4 << 30  # address space of a worker

Item = tuple[Problem, str]


class Setup(msgspec.Struct):
    """First line to a worker."""

    spec: str
    options: dict[str, Any]
    deadline_s: float
    memory_bytes: int


class VerifierPool:
    """`workers` processes judging with the task of `spec`; each item may take `deadline_s` seconds of wall-clock time.

    A task that does not load raises its TaskError or ConfigError here, at construction. Use as a context manager, or
    call `close`. Not for several threads at once.
    """

    def __init__(
        self, task_spec: str, options: Mapping[str, Any] | None = None, workers: int = 1, deadline_s: float = 5.0
    ) -> None:
        self._setup = Setup(task_spec, dict(options or {}), deadline_s, MEMORY_BYTES)
        self._directory = Path.cwd()
        self._workers: list[_Worker] = []
        load_task(task_spec, options)
        try:
            for _ in range(workers):
                self._workers.append(_Worker(self._setup, self._directory))
            for worker in self._workers:
                worker.wait_ready()
        except BaseException:
            self.close()
            raise

    def verify(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement per item, in order. On Ctrl-C or any other way out the workers are killed."""
        try:
            return self._verify(items)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill and reap every worker; harmless when repeated."""
        while self._workers:
            self._workers.pop().kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _verify(self, items: Sequence[Item]) -> list[Judgement]:
        if not self._workers:
            raise RuntimeError("this VerifierPool is closed")
        found: dict[int, Judgement] = {}
        size = max(1, min(CHUNK, len(items) // (2 * len(self._workers))))
        waiting = deque(list(range(start, min(start + size, len(items)))) for start in range(0, len(items), size))
        while len(found) < len(items):
            for worker in self._workers:
                if not worker.pending and waiting:
                    worker.send(waiting.popleft(), items)
            busy = [worker for worker in self._workers if worker.pending]
            now = time.monotonic()  # before reading: nobody is late for an answer that is already in the pipe
            for worker in _readable(busy, min(worker.late_at for worker in busy) - now):
                found.update(worker.receive())
            for worker in [worker for worker in busy if worker.pending and (worker.closed or worker.late_at <= now)]:
                culprit, *rest = worker.pending
                found[culprit] = worker.end()
                if rest:
                    waiting.appendleft(rest)
                self._workers[self._workers.index(worker)] = self._start()
        return [found[index] for index in range(len(items))]

    def _start(self) -> "_Worker":
        worker = _Worker(self._setup, self._directory)
        try:
            worker.wait_ready()
        except BaseException:
            worker.kill()
            raise
        return worker


class _Worker:
    """The parent's end of one worker. `pending` are the items it was sent and has not answered, oldest first."""

    def __init__(self, setup: Setup, directory: Path) -> None:
        self.pending: deque[int] = deque()
        self.late_at = 0.0  # when the item in hand is over its deadline; counted from a moment not before it was begun
        self.closed = False
        self._deadline_s = setup.deadline_s
        self._rest = b""
        path = [entry or str(directory) for entry in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from sputnik.tasks.verify import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=directory,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin: IO[bytes] = self._process.stdin
        self.stdout: IO[bytes] = self._process.stdout
        self._write(msgspec.json.encode(setup))

    def wait_ready(self) -> None:
        """Until the worker has loaded the task; TaskError if it cannot."""
        while b"\n" not in self._rest and not self.closed:
            if not _readable([self], STARTUP_S):
                raise TaskError(f"a verifier worker did not start within {STARTUP_S:.0f} s")
            self._read()
        line, _, self._rest = self._rest.partition(b"\n")
        reason = msgspec.json.decode(line) if line else self.end().detail
        if reason:
            raise TaskError(f"a verifier worker could not start: {reason}")

    def send(self, indices: list[int], items: Sequence[Item]) -> None:
        """Hand over the next chunk; the worker is idle, so it reads at once."""
        self.pending.extend(indices)
        whole = [(items[index][0], items[index][1].encode(errors="replace").decode()) for index in indices]
        self._write(msgspec.json.encode(whole))
        self.late_at = time.monotonic() + self._deadline_s

    def receive(self) -> dict[int, Judgement]:
        """Judgements that have arrived, by item."""
        self._read()
        *lines, self._rest = self._rest.split(b"\n")
        self.late_at = time.monotonic() + self._deadline_s
        return {self.pending.popleft(): msgspec.json.decode(line, type=Judgement) for line in lines}

    def end(self) -> Judgement:
        """Put an end to a worker that died or is late: the judgement for the item it had in hand."""
        code = self._process.poll()
        if self.closed and code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=1.0)  # its pipe closes a moment before it is gone
        self.kill()
        if code is None or code == -signal.SIGALRM:
            return Judgement(Verdict.TIMEOUT, f"killed after {self._deadline_s:g} s")
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return Judgement(Verdict.ERROR, f"the worker died on this answer: {how}")

    def kill(self) -> None:
        """Kill the process with all it has started, and reap it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stdin.close()
        self.stdout.close()

    def _read(self) -> None:
        data = os.read(self.stdout.fileno(), 1 << 20)
        self.closed = not data
        self._rest += data

    def _write(self, line: bytes) -> None:
        view = memoryview(line + b"\n")
        with contextlib.suppress(BrokenPipeError):  # it died: reading its output finds the end of the file next
            while view:
                view = view[os.write(self._stdin.fileno(), view) :]


def _readable(workers: Sequence[_Worker], timeout_s: float) -> list[_Worker]:
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return [key.data for key, _ in selector.select(max(0.0, timeout_s))]


def serve() -> None:
    """A worker's whole life. Stdin and stdout are the pipe; the task's code sees neither, its prints go to stderr."""
    chunks, out = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the parent is gone: end quietly
    whole = (line for line in chunks if line.endswith(b"\n"))  # another is of a parent killed while it wrote
    first = next(whole, None)
    if first is None:
        return
    setup = msgspec.json.decode(first, type=Setup)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = setup.memory_bytes if most == resource.RLIM_INFINITY else min(setup.memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        task = load_task(setup.spec, setup.options)
    except SputnikError as error:
        os.write(out, msgspec.json.encode(str(error)) + b"\n")
        return
    os.write(out, msgspec.json.encode("") + b"\n")
    decoder = msgspec.json.Decoder(list[Item])
    for line in whole:
        for problem, answer in decoder.decode(line):
            # The alarm's default action ends the process even inside C code, and even with nobody left to kill it.
            signal.setitimer(signal.ITIMER_REAL, setup.deadline_s + ALARM_GRACE_S)
            os.write(out, msgspec.json.encode(judge(task, problem, answer)) + b"\n")
        signal.setitimer(signal.ITIMER_REAL, 0)
