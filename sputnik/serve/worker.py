"""The engine process: `python -m sputnik.serve.worker` with its settings as JSON on stdin. No HTTP, no text, no keys.

The main thread loads the model and steps the engine (`desk.py`); a second one reads and writes the Unix socket; a third
sends the heart-beat. SIGTERM ends it once all that runs is done, or the time for that is up. A gateway that goes takes
its runs with it. Exit codes: 0 drained, 2 the settings or the model are wrong (its user's to mend), others are ours.
"""

import asyncio
import contextlib
import hashlib
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from sputnik import __version__
from sputnik.engine.llm import LLM
from sputnik.errors import SputnikError
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.serve import wire
from sputnik.serve.beats import Beat, Pulse
from sputnik.serve.desk import Desk, Peer
from sputnik.serve.settings import Template, WorkerSettings
from sputnik.serve.titles import set_title

CHUNK = 1024
"""Tokens of prompts in a step beside answers. Twice the engine's usual: a long prompt is then read in half the steps,
each of which writes all the others' tokens as well; those wait longer for each."""


class _Connection(Peer):
    """One gateway. `post` is called by the engine's thread, all else by the socket's."""

    def __init__(self, desk: Desk, channel: wire.Channel[wire.FromGateway], preparer: ThreadPoolExecutor) -> None:
        self._desk, self._channel, self._preparer = desk, channel, preparer
        self._loop = asyncio.get_running_loop()
        self._preparing: dict[int, asyncio.Task[None]] = {}

    def post(self, message: wire.Message) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(self._channel.send, message)

    async def serve(self) -> None:
        """Until the gateway goes or says what we do not understand."""
        try:
            while (message := await self._channel.receive()) is not None:
                self._take(message)
        except wire.WireError as error:
            print(f"worker: {error}", file=sys.stderr, flush=True)
        finally:
            for task in self._preparing.values():
                task.cancel()
            self._desk.leave(self)
            self._channel.close()

    def _take(self, message: wire.FromGateway) -> None:
        match message:
            case wire.Join():
                wire.check_version(message.version)
            case wire.Start() if message.params.constrained:
                task = self._preparing[message.run] = asyncio.create_task(self._compile(message))
                task.add_done_callback(self._compiled)
            case wire.Start():
                self._start(message)
            case wire.Abort() if message.run in self._preparing:
                self._preparing.pop(message.run).cancel()
            case wire.AnswerNow() if message.run in self._preparing:  # after its start: before it, it says nothing
                self._preparing[message.run].add_done_callback(lambda task: self._desk.post(self, message))
            case _:
                self._desk.post(self, message)

    async def _compile(self, start: wire.Start) -> None:
        """A grammar takes its time: meanwhile others are served."""
        try:
            request = await self._loop.run_in_executor(self._preparer, self._desk.prepare, start)
        except SputnikError as error:
            self._refuse(start, error)
        else:
            self._desk.post(self, start, request)
        finally:
            self._preparing.pop(start.run, None)

    def _compiled(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() is not None:  # a bug of ours: let nobody wait for ever
            self._channel.close()
            task.result()

    def _start(self, start: wire.Start) -> None:
        try:
            self._desk.post(self, start, self._desk.prepare(start))
        except SputnikError as error:
            self._refuse(start, error)

    def _refuse(self, start: wire.Start, error: SputnikError) -> None:
        self._channel.send(wire.Refused(start.run, " ".join(str(error).split())))


class Socket(threading.Thread):
    """The thread that reads and writes; `ready` is called once gateways can connect."""

    def __init__(self, path: str, desk: Desk, hello: wire.Hello, ready: Callable[[], None]) -> None:
        super().__init__(name="socket", daemon=True)
        self._path, self._desk, self._hello, self._ready = path, desk, hello, ready
        self._channels: set[wire.Channel[wire.FromGateway]] = set()
        self.error: OSError | None = None
        """Why nobody can connect; the desk is told to end then."""

    def run(self) -> None:
        try:
            asyncio.run(self._listen())
        except OSError as error:
            self.error = error
            self._desk.drain(0)

    def finish(self) -> None:
        """Send what is queued, then end; from another thread."""
        if self.error is None:
            self._loop.call_soon_threadsafe(self._done.set)
        self.join(5)

    async def _listen(self) -> None:
        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        Path(self._path).unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._connected, self._path)
        Path(self._path).chmod(0o600)
        self._ready()
        await self._done.wait()
        server.close()
        for channel in list(self._channels):
            await channel.finish()
        Path(self._path).unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = wire.Channel[wire.FromGateway](reader, writer, wire.FromGateway)
        self._channels.add(channel)
        try:
            channel.send(self._hello)
            await _Connection(self._desk, channel, self._preparer).serve()
        finally:
            self._channels.discard(channel)


def fingerprint(path: Path, settings: WorkerSettings) -> str:
    """Equal for workers that give the same answers: files by name, size and time, and what decides the numbers."""
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    stats = [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files]
    decisive = (settings.device, settings.precision, settings.weights, settings.exact, settings.template)
    return hashlib.sha256(repr((__version__, stats, decisive)).encode()).hexdigest()[:16]


def load(settings: WorkerSettings) -> tuple[LLM, wire.Hello]:
    found = find_checkpoint(settings.model)
    template: Template = "zero" if settings.template == "auto" and found.template == "zero" else settings.template
    spare = settings.slots // 4
    llm = LLM(  # one slot more than all of these, for probes
        found.path, template, settings.device, precision=settings.precision, weights=settings.weights,
        exact=settings.exact, max_running=settings.slots + spare + 1, cache_bytes=settings.cache_bytes, guesses=1,
        chunk=CHUNK,
    )  # fmt: skip
    pool = llm.engine.scheduler.pool
    hello = wire.Hello(
        version=wire.VERSION, path=str(found.path.resolve()), name=settings.name, template=llm.template,
        context=llm.context, slots=settings.slots, spare=spare, cache_tokens=pool.blocks * pool.size,
        exact=settings.exact, fingerprint=fingerprint(found.path, settings),
    )  # fmt: skip
    return llm, hello


Loader = Callable[[WorkerSettings], tuple[LLM, wire.Hello]]


def main(settings: WorkerSettings, load: Loader = load) -> int:
    """`load`: where the engine comes from; another one for tests of what is around it."""
    set_title("sputnik worker")
    desks = list[Desk]()

    def life() -> Beat:
        if not desks:
            return Beat("loading")
        return Beat("draining" if desks[0].draining else "ready", desks[0].steps, desks[0].busy)

    pulse = None if settings.beats is None else Pulse(settings.beats, life, settings.drain + 10)
    if pulse is not None:
        pulse.start()
    try:
        llm, hello = load(settings)
    except SputnikError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    desk = Desk(llm)
    signal.signal(signal.SIGTERM, lambda *_: desk.drain(settings.drain))

    def ready() -> None:
        desks.append(desk)
        if pulse is not None:
            pulse.beat()

    socket = Socket(settings.socket, desk, hello, ready)
    socket.start()
    desk.run()
    socket.finish()
    if pulse is not None:
        pulse.tidy(Path(settings.socket).parent)
    if socket.error is not None:
        print(f"error: cannot listen on {settings.socket} ({socket.error}): set a shorter TMPDIR", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(main(msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerSettings)))
