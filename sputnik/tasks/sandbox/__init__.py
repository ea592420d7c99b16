"""Run a program somebody else wrote: no network, no files of ours, no processes left, bounded time and memory.

    with Sandbox() as sandbox:
        sandbox.run("print(int(input()) + 1)", stdin="41").stdout      # "42\n"

bubblewrap makes new user, pid, net, ipc, uts and cgroup namespaces and a file system of nothing but the interpreter;
seccomp leaves the system calls that a Python program of one process needs; rlimits and a deadline bound the rest. A
sandbox stays warm: each program runs in a process forked for it, with open files of its own, and one that leaves
anything behind, or has to be stopped, is the last of its sandbox.

It fails closed: what is missing or does not hold is a `SandboxError`, and nothing is ever run without. Left out: other
languages (docs/sandbox.md says what one takes), programs of several processes.
"""

import json
import math
import os
import select
import socket
import time
from array import array
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from sputnik.tasks.sandbox.bubble import Limits, SandboxError, Server, memory_file
from sputnik.tasks.sandbox.inside import NOT_PYTHON

__all__ = ["Limits", "Outcome", "Running", "Sandbox", "SandboxError"]

End = Literal["exit", "timeout", "output", "died"]
ERROR_BYTES = 16_384  # of stderr; more is read and dropped
# Tries what must not work, and says "closed" when nothing did.
PROBE = """
import ctypes, os, socket

def start_a_process():
    if os.fork() == 0:
        os._exit(0)

def run_a_file():
    try:
        os.execv("/nowhere", ["nowhere"])
    except FileNotFoundError:
        return

found = [] if ctypes.CDLL(None).unshare(0x10000000) else ["make namespaces"]
found += [] if os.getuid() == 65534 else [f"be user {os.getuid()}"]
for name, attempt in {
    "reach the network": socket.socket,
    "start processes": start_a_process,
    "run files": run_a_file,
    "send signals": lambda: os.kill(1, 0),
    "read /etc": lambda: os.listdir("/etc"),
    "read /proc": lambda: os.listdir("/proc"),
    "write to /": lambda: open("/file", "w"),
    "become root": lambda: os.setuid(0),
}.items():
    try:
        attempt()
    except OSError:
        continue
    found.append(name)
print(", ".join(found) or "closed")
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `status` is its exit status, negative for a signal; None if it was stopped."""

    end: End
    status: int | None
    stdout: str
    stderr: str

    @property
    def finished(self) -> bool:
        """It came to its own end without an error."""
        return self.end == "exit" and self.status == 0

    @property
    def not_python(self) -> bool:
        return self.end == "exit" and self.status == NOT_PYTHON


class Sandbox:
    """Starts when first needed and stays warm; use as a context manager, or call `close`. Not for several threads."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._server: Server | None = None

    def run(self, program: str, stdin: str = "", seconds: float | None = None) -> Outcome:
        """Run a whole program; `seconds` may shorten the limit."""
        job = {"do": "run", "source": program}
        with memory_file(stdin.encode(errors="replace")) as text, self.start(job, text, seconds) as running:
            return running.wait()

    def start(self, job: Mapping[str, Any], stdin: int, seconds: float | None = None) -> "Running":
        """Begin a job of inside.py that has the file `stdin`. The one before it must be over."""
        if self._server is None or not self._server.alive:
            self.close()
            self._server = Server(self.limits)
        return Running(self._server, job, stdin, min(seconds or self.limits.seconds, self.limits.seconds))

    def check(self) -> None:
        """SandboxError unless a program in here is shut in."""
        outcome = self.run(PROBE)
        if outcome.stdout != "closed\n":
            found = " ".join((outcome.stdout or outcome.stderr or outcome.end).split())
            raise SandboxError(f"the sandbox does not hold on this machine; what a program could do: {found[-300:]}")

    def close(self) -> None:
        """End every process in it; harmless when repeated."""
        if self._server:
            self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Running:
    """One program under way. Leaving the `with` block before its end kills it, and the sandbox with it."""

    def __init__(self, server: Server, job: Mapping[str, Any], stdin: int, seconds: float) -> None:
        self._server = server
        self._late_at = time.monotonic() + seconds
        self._end: End | None = None
        self._status: int | None = None
        self._out, self._err = bytearray(), bytearray()
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        self._texts = {out: self._out, err: self._err}
        self._poll = select.poll()
        for file in (out, err, server.control.fileno()):
            self._poll.register(file, select.POLLIN)
        with memory_file(json.dumps(job).encode()) as own:
            files = array("i", [stdin, their_out, their_err, own])
            with suppress(BrokenPipeError):  # it died: the first look at it finds out
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)]
                server.control.sendmsg([b"go"], rights, socket.MSG_NOSIGNAL)
        os.close(their_out)
        os.close(their_err)

    def wait(self, seconds: float = math.inf) -> Outcome:
        """Until it has ended, or has been ended, which `seconds` from now may bring forward."""
        self._late_at = min(self._late_at, time.monotonic() + seconds)
        while self._end is None:
            self._pump()
        out, err = (text.decode(errors="replace") for text in (self._out, self._err))
        return Outcome(self._end, self._status, out, err)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._end is None:
            self._finish("died")

    def _pump(self) -> None:
        """Wait for the next thing to happen, and see to it."""
        left = self._late_at - time.monotonic()
        events = self._poll.poll(math.ceil(left * 1000)) if left > 0 else []
        if not events:
            self._finish("timeout")
        for file, _ in events:
            if file in self._texts:
                self._receive(file)
            else:
                self._hear(file)
            if self._end is not None:
                return
        if self._status is not None and not self._texts:
            self._finish("exit")

    def _receive(self, file: int) -> None:
        data, text = os.read(file, 1 << 16), self._texts[file]
        if not data:
            self._poll.unregister(file)
            del self._texts[file]
            os.close(file)
        elif text is self._err:
            text += data[: ERROR_BYTES - len(text)]
        else:
            text += data
            if len(text) > self._server.limits.output_bytes:
                self._finish("output")

    def _hear(self, control: int) -> None:
        """The server tells of the program's end; by then all that it wrote is in the pipes."""
        self._poll.unregister(control)
        message = self._server.control.recv(64)
        if not message:
            self._finish("died")
            return
        self._status, clean = json.loads(message)
        if not clean:
            self._server.close()

    def _finish(self, end: End) -> None:
        self._end = end
        if end != "exit":
            self._status = None
            self._server.close()
        for file in self._texts:
            os.close(file)
        self._texts.clear()
