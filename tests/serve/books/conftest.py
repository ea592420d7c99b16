"""A fresh database for each test, on SQLite and on a PostgreSQL server of our own; a gateway without its engine."""

import asyncio
import getpass
import itertools
import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sputnik.serve import wire
from sputnik.serve.app import make_app
from sputnik.serve.books.access import Grant, create
from sputnik.serve.books.database import Database, open_database, upgrade
from sputnik.serve.identity import key_hash
from sputnik.serve.service import Service
from sputnik.serve.settings import BookSettings, GatewaySettings

PEPPER = "5a" * 32


class Postgres:
    """A cluster in a directory, reached by a Unix socket in it; run by an unprivileged user, who owns both."""

    def __init__(self, programs: Path, folder: Path, user: str) -> None:
        self._programs, self._folder, self._user = programs, folder, user
        self._server: subprocess.Popen[bytes] | None = None
        self._made = 0
        self._run("initdb", "-D", str(folder / "data"), "-U", "sputnik", "--auth=trust", "--no-sync", "-E", "UTF8")

    def start(self) -> None:
        """Return when it takes connections."""
        command = [str(self._programs / "postgres"), "-D", str(self._folder / "data"), "-k", str(self._folder)]
        settings = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=50"]
        log = (self._folder / "log").open("ab")
        self._server = subprocess.Popen(
            [*command, *settings], user=self._user, stdout=log, stderr=log, cwd=self._folder
        )
        log.close()
        end = time.monotonic() + 60
        while self._run("pg_isready", "-q", "-h", str(self._folder), check=False):
            assert time.monotonic() < end and self._server.poll() is None, (self._folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """At once: SIGQUIT, as after a crash."""
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait(60)

    def new(self) -> str:
        """The URL of a fresh database."""
        self._made += 1
        name = f"books{self._made}"
        self._run("createdb", "-h", str(self._folder), "-U", "sputnik", name)
        return f"postgresql+psycopg://sputnik@/{name}?host={self._folder}"

    def _run(self, program: str, *arguments: str, check: bool = True) -> int:
        command = [str(self._programs / program), *arguments]
        done = subprocess.run(command, user=self._user, cwd=self._folder, capture_output=True, timeout=120)
        assert not check or done.returncode == 0, done.stderr.decode()
        return done.returncode


def programs() -> Path | None:
    """Where PostgreSQL's programs are, all of them; Debian keeps them out of the PATH."""
    path = os.pathsep.join([*map(str, Path("/usr/lib/postgresql").glob("*/bin")), os.environ.get("PATH", "")])
    found = shutil.which("pg_isready", path=path)
    return Path(found).parent if found is not None and Path(found).with_name("initdb").exists() else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    place = programs()
    if place is None:
        pytest.skip("PostgreSQL is not installed: scripts/postgres.sh, or apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="sputnik-postgres-"))
    user = getpass.getuser()
    if os.geteuid() == 0:
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            user = "nobody"
        shutil.chown(folder, user)
    cluster = Postgres(place, folder, user)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'books.db'}"
    cluster: Postgres = request.getfixturevalue("postgres")
    return cluster.new()


@pytest.fixture
def open_books(url: str) -> Iterator[Callable[[], Database]]:
    """Connections to the same database, each as another process would have them."""
    opened: list[Database] = []

    def connect() -> Database:
        opened.append(open_database(url))
        return opened[-1]

    upgrade(connect())
    yield connect
    for each in opened:
        each.close()


@pytest.fixture
def database(open_books: Callable[[], Database]) -> Database:
    return open_books()


# --- a gateway in this process, all of it but the engine ---


class CountingEngine:
    """In the link's place: writes a token a step for each run, and counts those that were taken from it."""

    def __init__(self, hello: wire.Hello) -> None:
        self.hello: wire.Hello | None = hello
        self.back, self.died, self.up = asyncio.Event(), 0, True
        self.back.set()
        self.paused, self.rest = False, 0.0
        self.hit = self.miss = self.output = 0
        self.dice = random.Random(0)
        self._runs: dict[int, tuple[wire.Start, Any, int]] = {}
        self._numbers = itertools.count(1)

    def number(self) -> int:
        return next(self._numbers)

    def start(self, start: wire.Start, receiver: Any) -> bool:
        self._runs[start.run] = start, receiver, 0
        return True

    def abort(self, run: int) -> None:
        self._runs.pop(run, None)

    def done(self, run: int) -> None:
        self._runs.pop(run, None)

    async def figures(self) -> dict[str, float]:
        return {}

    def end(self, run: int, sample: int) -> None: ...

    def answer_now(self, run: int) -> None: ...

    def die(self) -> None:
        """All that ran is lost; another is there at once."""
        lost, self._runs = self._runs, {}
        for run, (_, receiver, _) in lost.items():
            receiver.lost(run)

    def step(self) -> None:
        for run, (start, receiver, seq) in list(self._runs.items()):
            if run in self._runs:
                self._write(run, start, receiver, seq)

    def _write(self, run: int, start: wire.Start, receiver: Any, seq: int) -> None:
        cached = self.dice.randrange(len(start.prompt)) if seq == 0 and not start.written else 0
        if seq == 0 and not start.written:
            self.hit += cached
            self.miss += len(start.prompt) - cached
        self.output += 1
        last = seq + 1 + len(start.written) == start.params.max_tokens
        finish: Any = (
            "failed" if start.params.seed == FAILS and seq + len(start.written) == 3 else "length" if last else None
        )
        self._runs[run] = start, receiver, seq + 1
        receiver.token(wire.Token(run, seq, 0, 300 + self.dice.randrange(40), finish, cached))

    async def run(self) -> None:
        while True:
            if not self.paused:
                self.step()
            await asyncio.sleep(self.rest if self._runs and not self.paused else 0.002)


FAILS = 666
"""Seed of requests that fail at their fourth token."""


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Front:
    """The gateway's application with its books, called as a server calls it."""

    Answer = Answer

    def __init__(self, model: Path, url: str, keys: list[str] | None = None) -> None:
        books = BookSettings(url, PEPPER)
        hashes = [key_hash(key) for key in keys or []]
        settings = GatewaySettings("none", "127.0.0.1", 1, 2, "babbler", hashes, max_tokens=8, books=books)
        self.service = Service(settings)
        self.engine = CountingEngine(
            wire.Hello(wire.VERSION, str(model), "babbler", "auto", 2048, 64, 0, 4096, True, "one")
        )  # fmt: skip
        self.service.link = self.service.engine = self.engine  # type: ignore[assignment]
        self.service._joined(msgspec.structs.replace(self.engine.hello, template="chat"))
        self.app, self.ended = make_app(self.service, None), 0
        self.service.closed.append(self._count)
        assert self.service.books is not None
        self.books = self.service.books

    def _count(self, *ended: object) -> None:
        self.ended += 1

    async def __aenter__(self) -> "Front":
        self._tasks = self.service.begin()
        await self.until(lambda: self.books.ready)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert await self.books.finish(60)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until(self, wanted: Callable[[], bool], seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            while not wanted():
                await asyncio.sleep(0.01)

    async def post(
        self, path: str, body: Any, key: str, headers: dict[str, str] | None = None, leaves_after: int | None = None,
        answer: Answer | None = None, method: str = "POST",
    ) -> Answer:  # fmt: skip
        """`leaves_after`: the client goes when so many pieces have come; 0: before the first."""
        sent, found, gone = json.dumps(body).encode(), answer or Answer(), asyncio.Event()
        if leaves_after == 0:
            asyncio.get_running_loop().call_soon(gone.set)
        lines = {"authorization": f"Bearer {key}", "content-length": str(len(sent))} | (headers or {})
        messages = iter([{"type": "http.request", "body": sent, "more_body": False}])

        async def receive() -> Any:
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                found.status = message["status"]
                found.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                found.body += message.get("body", b"")
                if leaves_after is not None and found.body.count(b"\n\n") >= leaves_after:
                    gone.set()

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "root_path": "", "query_string": b"", "scheme": "http",
            "headers": [(name.encode(), value.encode()) for name, value in lines.items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1),
        }  # fmt: skip
        await self.app(scope, receive, send)
        return found

    async def ask(self, key: str, text: str = "What is 1 + 2?", **more: Any) -> Answer:
        call = {name: more.pop(name) for name in ("headers", "leaves_after", "answer") if name in more}
        body = {"model": "babbler", "messages": [{"role": "user", "content": text}], "max_tokens": 8} | more
        return await self.post("/v1/chat/completions", body, key, **call)


@pytest.fixture
def make_key(database: Database) -> Callable[..., str]:
    def make(name: str, **grant: Any) -> str:
        with database.writing() as connection:
            return create(connection, PEPPER, Grant(name, **grant))

    return make


@pytest.fixture
def make_front(checkpoint: Path, url: str, database: Database) -> Callable[..., Front]:
    """Gateways on the database of the test."""
    return lambda **more: Front(checkpoint, url, **more)


@pytest.fixture
def front_of(checkpoint: Path) -> Callable[..., Front]:
    return lambda url, keys: Front(checkpoint, url, keys)
