"""The gateway's end of the wire: one connection to the engine worker, made again whenever it breaks.

    link = Link("worker.sock")
    task = asyncio.create_task(link.run())
    run = link.start(start, receiver)              # a receiver: token(), refused(), lost()
    link.abort(run);  await link.probe();  await link.figures()

Whoever has a run when the worker dies is told (`lost`); `link.back` says when another is there. Left out: what to do
about it (`generations.py`).
"""

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from sputnik.serve import wire

RETRY = 0.05
"""Seconds between attempts to reach a worker."""
T = TypeVar("T")


class Receiver(Protocol):
    """Where the messages of one run go."""

    def token(self, token: wire.Token) -> None: ...

    def refused(self, message: wire.Refused) -> None: ...

    def lost(self, run: int) -> None:
        """The worker is gone; this run brings nothing more."""


class Link:
    def __init__(self, path: str, joined: Callable[[wire.Hello], None], stepped: Callable[[int], None]) -> None:
        """`joined`: a worker is there; `stepped`: it has written so many tokens."""
        self._path, self._joined, self._stepped = path, joined, stepped
        self.hello: wire.Hello | None = None
        """Of the worker that is there."""
        self.back = asyncio.Event()
        """Set while a worker is there."""
        self.died = 0
        """Workers that were lost."""
        self._channel: wire.Channel[wire.FromWorker] | None = None
        self._runs: dict[int, Receiver] = {}
        self._seen: dict[int, int] = {}
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[wire.Probed | wire.Figures]] = {}

    @property
    def up(self) -> bool:
        """Whether a worker is there that begins answers."""
        return self._channel is not None and self.hello is not None

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path)
            except OSError:
                await asyncio.sleep(RETRY)
                continue
            channel = wire.Channel[wire.FromWorker](reader, writer, wire.FromWorker)
            try:
                await self._serve(channel)
            except wire.WireError as error:
                print(f"gateway: {error}", file=sys.stderr, flush=True)
                await asyncio.sleep(1.0)
            finally:
                channel.close()
                self._lose()

    async def _serve(self, channel: wire.Channel[wire.FromWorker]) -> None:
        hello = await channel.receive()
        if not isinstance(hello, wire.Hello):
            return
        wire.check_version(hello.version)
        channel.send(wire.Join(wire.VERSION))
        self._channel, self.hello = channel, hello
        self._joined(hello)
        self.back.set()
        while (message := await channel.receive()) is not None:
            match message:
                case wire.Step():
                    self._stepped(len(message.tokens))
                    for token in message.tokens:
                        self._token(token)
                case wire.Refused():
                    if message.draining:  # it finishes what it has, and then another takes its place
                        self.hello = None
                        self.back.clear()
                    receiver = self._forget(message.run)
                    if receiver is not None:
                        receiver.refused(message)
                case wire.Probed() | wire.Figures():
                    future = self._asked.pop(message.number, None)
                    if future is not None and not future.done():
                        future.set_result(message)
                case wire.Hello():
                    raise wire.WireError("a second hello")

    def _token(self, token: wire.Token) -> None:
        receiver = self._runs.get(token.run)
        if receiver is None:
            return
        if token.seq != self._seen[token.run]:
            raise wire.WireError(f"run {token.run}: token {token.seq} came when {self._seen[token.run]} was next")
        self._seen[token.run] += 1
        receiver.token(token)

    def _lose(self) -> None:
        lost, self._channel = list(self._runs.items()), None
        self.back.clear()
        self.died += self.hello is not None
        self.hello = None
        self._runs.clear()
        self._seen.clear()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(ConnectionResetError("the worker has gone"))
        self._asked.clear()
        for run, receiver in lost:
            receiver.lost(run)

    # --- runs ---

    def number(self) -> int:
        return next(self._numbers)

    def start(self, start: wire.Start, receiver: Receiver) -> bool:
        """False: there is no worker now."""
        if self._channel is None:
            return False
        self._runs[start.run], self._seen[start.run] = receiver, 0
        self._channel.send(start)
        return True

    def end(self, run: int, sample: int) -> None:
        self._send(run, wire.End(run, sample))

    def answer_now(self, run: int) -> None:
        self._send(run, wire.AnswerNow(run))

    def abort(self, run: int) -> None:
        self._send(run, wire.Abort(run))
        self._forget(run)

    def done(self, run: int) -> None:
        """All of its samples have ended."""
        self._forget(run)

    def _send(self, run: int, message: wire.Message) -> None:
        if self._channel is not None and run in self._runs:
            self._channel.send(message)

    def _forget(self, run: int) -> Receiver | None:
        self._seen.pop(run, None)
        return self._runs.pop(run, None)

    # --- questions ---

    async def probe(self) -> float:
        """Seconds a real token took; ConnectionError if there is no worker."""
        begun = time.monotonic()
        await self._ask(wire.Probe(self.number()))
        return time.monotonic() - begun

    async def figures(self) -> dict[str, float]:
        message = await self._ask(wire.Ask(self.number()))
        return message.values if isinstance(message, wire.Figures) else {}

    async def _ask(self, question: wire.Probe | wire.Ask) -> wire.Probed | wire.Figures:
        if self._channel is None:
            raise ConnectionRefusedError("no worker is there")
        future: asyncio.Future[wire.Probed | wire.Figures] = asyncio.get_running_loop().create_future()
        self._asked[question.number] = future
        self._channel.send(question)
        try:
            return await future
        finally:
            with contextlib.suppress(KeyError):
                del self._asked[question.number]
