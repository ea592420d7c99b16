"""Signs of life: what a child process tells its supervisor twice a second, over a socket it was born with.

    ours, theirs = socket.socketpair()                              # the child inherits `theirs`
    Pulse(theirs.fileno(), lambda: Beat("ready", steps, busy)).start()        # in the child
    for beat in Ear(ours).hear(): ...                                         # in the supervisor, never waiting

A beat counts scheduler steps, so a process that lives and does nothing is seen too; one that is stopped or dead beats
no more. A child whose supervisor has gone ends itself, as on SIGTERM, and if that takes too long, at once.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

EVERY = 0.5
"""Seconds between beats."""
GRACE = 60.0
"""Seconds that a child without a supervisor has to end."""


class Beat(msgspec.Struct, frozen=True):
    state: Literal["loading", "ready", "draining"]
    steps: int = 0
    """Scheduler steps of a worker, looks at the clock of a gateway."""
    busy: int = 0
    """Requests under way."""


class Pulse(threading.Thread):
    """The child's side, a thread of its own: it beats while the process computes."""

    def __init__(self, descriptor: int, read: Callable[[], Beat], grace: float = GRACE) -> None:
        super().__init__(name="pulse", daemon=True)
        self._socket = socket.socket(fileno=descriptor)
        self._socket.settimeout(None)
        self._read, self._grace = read, grace
        self._now = threading.Event()
        self._orphaned = False

    def run(self) -> None:
        while True:
            try:
                self._socket.sendall(msgspec.json.encode(self._read()) + b"\n")
            except OSError:
                break
            self._now.wait(EVERY)
            self._now.clear()
        self._orphaned = True
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self._grace)
        os.kill(os.getpid(), signal.SIGKILL)  # it hangs, and nobody else is there to end it

    def beat(self) -> None:
        """At once: the state has changed."""
        self._now.set()

    def tidy(self, directory: Path) -> None:
        """At the end: a supervisor that was killed has left its directory, which is empty once we are gone."""
        if self._orphaned:
            with contextlib.suppress(OSError):
                directory.rmdir()


class Ear:
    """The supervisor's side."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket, self._rest = connection, b""
        self._decoder = msgspec.json.Decoder(Beat)
        self.ended = False
        """The child has closed its end."""

    def hear(self) -> list[Beat]:
        """Beats since the last call, oldest first."""
        with contextlib.suppress(OSError):
            while found := self._socket.recv(1 << 16):
                self._rest += found
            self.ended = True
        *lines, self._rest = self._rest.split(b"\n")
        return [self._decoder.decode(line) for line in lines]

    def fileno(self) -> int:
        """To wait on."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
