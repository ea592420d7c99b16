"""A fresh database for each test, on SQLite and on a PostgreSQL server of our own."""

import getpass
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sputnik.serve.books.database import Database, open_database, upgrade

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
