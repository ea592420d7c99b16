"""Starts gateway and worker, and keeps them alive: watches their beats, kills what hangs, starts again what died.

    code = Supervisor([worker, gateway], say).run()            # until SIGTERM or Ctrl-C, or it gives up

SIGTERM, Ctrl-C and the end of its terminal drain: first the gateway, which lets nobody in and waits for whoever is,
then the worker. Ctrl-C after any of these ends both at once; a second SIGTERM changes nothing. Exit code 0 when all has
ended well, 1 when it gave up, 2 when settings or model are wrong.
"""

import contextlib
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import msgspec

from sputnik.serve.beats import Ear
from sputnik.serve.settings import GatewaySettings, WorkerSettings
from sputnik.serve.watch import WRONG, Rules, Watch

Say = Callable[[str], None]
LOOK = 0.2
"""Seconds between looks, if nothing is heard."""
SLEPT = 2.0
"""Seconds between looks that mean that this process was stopped: a paused machine, a debugger, Ctrl-Z."""


class Child:
    """One process, and the one after it."""

    def __init__(
        self, role: str, settings: WorkerSettings | GatewaySettings, say: Say, rules: Rules,
        command: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """`command`: what to run in place of our process of this role."""
        self.role, self._settings, self._say = role, settings, say
        self._command = command or [sys.executable, "-m", f"sputnik.serve.{role}"]
        self.watch = Watch(rules)
        self.gave_up: int | None = None
        """The exit code after which it was not started again."""
        self.process: subprocess.Popen[bytes] | None = None
        self._ear: Ear | None = None
        self._again = 0.0

    def start(self, now: float) -> None:
        ours, theirs = socket.socketpair()
        settings = msgspec.structs.replace(self._settings, beats=theirs.fileno())
        self._ear = Ear(ours)
        self.watch.started(now)
        with theirs:
            try:
                self.process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], process_group=0
                )
            except OSError as error:  # no memory or no processes left just now
                self._say(f"{self.role}: cannot be started ({error.strerror})")
                self._ended(1, now, drains=False)
                return
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:  # it died at once: `look` will see it
            pipe.write(msgspec.json.encode(settings))

    def look(self, now: float, drains: bool = False) -> None:
        """Hear its beats, kill it if it is sick, start it again if it is dead and its time has come."""
        if self.gave_up is not None:
            return
        if self.process is None:
            if now >= self._again and not drains:
                self.start(now)
            return
        self._hear(now)
        code = self.process.poll()
        if code is None:
            reason = self.watch.sick(now)
            if reason is not None:
                self._say(f"{self.role}: {reason}, killed")
                self.process.kill()
                code = self.process.wait()
        if code is not None:
            self._ended(code, now, drains)

    def _hear(self, now: float) -> None:
        assert self._ear is not None
        for beat in self._ear.hear():
            was = self.watch.ready
            self.watch.heard(beat, now)
            if self.watch.ready and not was:
                self._say(f"{self.role}: ready")

    def _ended(self, code: int, now: float, drains: bool) -> None:
        assert self._ear is not None
        self._hear(now)
        self._ear.close()
        self.process = self._ear = None
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if drains:
            self.gave_up = 0 if code == -signal.SIGTERM else code  # one that was loading has nothing to finish
            if self.gave_up:
                self._say(f"{self.role}: did not end well ({how})")
            return
        delay = self.watch.ended(code, now)
        self.watch.ready = False
        if delay is None:
            self.gave_up = code
            if code != WRONG:
                self._say(f"{self.role}: {how} again and again before it was ready: given up")
            return
        self._say(f"{self.role}: ended ({how}), started again in {delay:.1f} s")
        self._again = now + delay

    def signal(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def descriptor(self) -> int | None:
        """To wait on for beats; None where none can come."""
        return None if self._ear is None or self._ear.ended else self._ear.fileno()


class Supervisor:
    def __init__(self, children: Sequence[Child], say: Say, ready: Callable[[], None], drain: float) -> None:
        """`children` in the order in which they drain, last first; `ready` is called when all are, the first time."""
        self._children, self._say, self._ready, self._drain = children, say, ready, drain
        self._asked = 0
        self._looked = time.monotonic()
        self._told = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, self._ask)
        try:
            while not self._asked:
                now = self._now()
                for child in self._children:
                    child.look(now)
                if (code := self._given_up()) is not None:
                    return code
                if not self._told and all(child.watch.ready for child in self._children):
                    self._told = True
                    self._ready()
                self._listen()
            return self._end()
        finally:
            for child in self._children:
                child.kill()

    def _now(self) -> float:
        now = time.monotonic()
        if now - self._looked > SLEPT:
            for child in self._children:
                child.watch.slept(now - self._looked)
        self._looked = now
        return now

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked += number == signal.SIGINT or not self._asked

    def _given_up(self) -> int | None:
        codes = [child.gave_up for child in self._children if child.gave_up is not None]
        return None if not codes else WRONG if WRONG in codes else 1

    def _listen(self) -> None:
        """Until somebody beats or dies, or it is time to look."""
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                if child.descriptor is not None:
                    selector.register(child.descriptor, selectors.EVENT_READ)
            selector.select(LOOK)

    def _end(self) -> int:
        """Drain, one after the other."""
        running = next((c.watch.last.busy for c in reversed(self._children) if c.watch.last is not None), 0)
        self._say(f"draining, {running} requests are under way; once more ends them at once")
        codes = []
        for child in reversed(self._children):
            child.signal(signal.SIGTERM)
            end = time.monotonic() + self._drain + 10
            while child.process is not None and self._asked < 2 and time.monotonic() < end:
                now = self._now()
                for each in self._children:
                    each.look(now, drains=each is child)
                self._listen()
            waited = child.process is None and child.gave_up is None  # to be started again: it has nothing to finish
            codes.append(0 if waited else child.gave_up)
        self._say("stopped")
        return 0 if all(code == 0 for code in codes) else 1
