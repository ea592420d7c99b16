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
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from sputnik.tasks.sandbox.bubble import Limits, SandboxError, Server, memory_file
from sputnik.tasks.sandbox.inside import NOT_PYTHON

__all__ = ["Limits", "Outcome", "Running", "Sandbox", "SandboxError"]

End = Literal["exit", "timeout", "output", "died"]
DISMISSAL_S = 0.5
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
        with self.start({"do": "run", "source": program}, seconds, stdin) as running:
            return running.wait()

    def start(self, job: Mapping[str, Any], seconds: float | None = None, stdin: str | None = None) -> "Running":
        """Begin a job of inside.py; without `stdin` it is one that is told lines. The one before it must be over."""
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

    def __init__(self, server: Server, job: Mapping[str, Any], stdin: str | None, seconds: float) -> None:
        self._server = server
        self._late_at = time.monotonic() + seconds
        self._end: End | None = None
        self._status: int | None = None
        self._received = 0
        self._unsent, self._out, self._err = bytearray(), bytearray(), bytearray()
        self._line, asked = socket.socketpair()
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        self._texts = {out: self._out, err: self._err}
        self._poll = select.poll()
        for file in (out, err, server.control.fileno()):
            self._poll.register(file, select.POLLIN)
        with ExitStack() as theirs, asked:
            theirs.callback(os.close, their_out)
            theirs.callback(os.close, their_err)
            own = theirs.enter_context(memory_file(json.dumps(job).encode()))
            text = None if stdin is None else theirs.enter_context(memory_file(stdin.encode(errors="replace")))
            files = array("i", [asked.fileno() if text is None else text, their_out, their_err, own])
            with suppress(BrokenPipeError):  # it died: the first look at it finds out
                server.control.sendmsg([b"go"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)], socket.MSG_NOSIGNAL)

    def tell(self, line: bytes) -> None:
        """Send it a line, if it still runs; what does not fit goes out while we wait for one of its own."""
        if self._end is None:
            self._unsent += line + b"\n"
            self._send()

    def line(self) -> bytes | None:
        """The next line it writes, without the line feed; None when there is no more, for whatever reason."""
        while b"\n" not in self._out and self._pump():
            pass
        line, found, rest = bytes(self._out).partition(b"\n")
        self._out[:] = rest
        return line if found else None

    def wait(self) -> Outcome:
        """Until it has ended, or has been ended."""
        while self._pump():
            pass
        assert self._end is not None
        out, err = (text.decode(errors="replace") for text in (self._out, self._err))
        return Outcome(self._end, self._status, out, err)

    def dismiss(self) -> Outcome:
        """Nothing more is wanted of it: an empty line says so, and one that goes on is soon stopped."""
        self.tell(b"")
        self._late_at = min(self._late_at, time.monotonic() + DISMISSAL_S)
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._end is None:
            self._finish("died")

    def _pump(self) -> bool:
        """Wait for the next thing to happen; False when all is over."""
        left = self._late_at - time.monotonic()
        if self._end is None and left <= 0:
            self._finish("timeout")
        if self._end is not None:
            return False
        for file, _ in self._poll.poll(math.ceil(left * 1000)):
            if file == self._line.fileno():
                self._send()
            elif file in self._texts:
                self._receive(file)
            else:
                self._hear(file)
            if self._end is not None:
                return False
        if self._status is not None and not self._texts:
            self._finish("exit")
        return self._end is None

    def _send(self) -> None:
        """As much as goes out now. Never by way of SIGPIPE: that would let a program end this process."""
        try:
            sent = self._line.send(self._unsent, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = len(self._unsent)  # it does not listen any more
        del self._unsent[:sent]
        if self._unsent:
            self._poll.register(self._line, select.POLLOUT)
        else:
            with suppress(KeyError):
                self._poll.unregister(self._line)

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
            self._received += len(data)
            if self._received > self._server.limits.output_bytes:
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
            self._server.close()
        self._line.close()
        for file in self._texts:
            os.close(file)
        self._texts.clear()
