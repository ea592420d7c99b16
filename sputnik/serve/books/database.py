"""The database: SQLite's file with its settings, or PostgreSQL by URL; its version; and what may be wrong with it.

    database = open_database(url)            # "", a path, sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME
    upgrade(database)                        # to this program's version; ConfigError if it is a newer one's
    with database.writing() as connection: ...        # one transaction, kept when the block ends
    with database.reading() as connection: ...        # never waits for a writer

SQLite is in WAL mode with synchronous=FULL: what has been committed outlives a crash and a loss of power, as far as the
disk keeps its word. What must outlive a crash alone need not wait for the disk (`light`). The file must be on a local
disk. What the database fails with becomes `Down`, which says whether the disk is full. Left out: several databases, and
pools larger than a gateway needs.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NoSuchModuleError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from sputnik.errors import ConfigError
from sputnik.serve.books.key import state_directory

BUSY = 1.0
"""Seconds to wait for another writer."""
PATIENCE: Mapping[str, int] = {
    "connect_timeout": 3, "tcp_user_timeout": 10_000,
    "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3,
}  # fmt: skip
"""How soon PostgreSQL is taken for gone where the network says nothing: seconds, and one in milliseconds."""
MIGRATIONS = Path(__file__).parent / "migrations"
SQLITE_FULL, DISK_FULL, DEADLOCK = sqlite3.SQLITE_FULL, "53100", "40P01"
OURS = (IntegrityError, DataError, ProgrammingError)
"""Errors that are no fault of the database's."""


class Down(Exception):
    """The database takes nothing now; `full`: for lack of space."""

    def __init__(self, reason: str, full: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.full = reason, full


class Clash(Down):
    """Two transactions waited for each other, and this one was given up."""


@dataclass(frozen=True)
class Database:
    engine: Engine
    """Whose transactions write from their first moment."""
    light: Engine
    """The same, but does not wait for the disk: its commits outlive the process at once, and a loss of power from the
    next commit of `engine` on. With PostgreSQL, which may crash alone, it is `engine`."""
    reader: Engine
    """Each statement for itself."""
    path: Path | None
    """Of SQLite's file."""

    @contextmanager
    def writing(self, light: bool = False) -> Iterator[Connection]:
        with _telling(), (self.light if light else self.engine).begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with _telling(), self.reader.connect() as connection:
            yield connection

    def close(self) -> None:
        self.engine.dispose()
        self.light.dispose()
        self.reader.dispose()


def default_url() -> str:
    return f"sqlite:///{state_directory() / 'sputnik.db'}"


def open_database(url: str = "") -> Database:
    """No connection is made yet. ConfigError: not a URL of a database that we can use."""
    url = url or default_url()
    if "://" not in url:
        url = f"sqlite:///{url}"
    with contextlib.suppress(ArgumentError, NoSuchModuleError):
        parsed = make_url(url)
        match parsed.get_backend_name():
            case "sqlite" if parsed.database:
                return _sqlite(Path(parsed.database))
            case "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
                options: dict[str, Any] = {"connect_args": {**PATIENCE}, "pool_pre_ping": True}
                engine = create_engine(parsed, pool_size=2, **options)
                return Database(engine, engine, engine.execution_options(isolation_level="AUTOCOMMIT"), None)
    raise ConfigError("--database: give a path, sqlite:///PATH or postgresql+psycopg://USER:PASSWORD@HOST/NAME")


def _sqlite(path: Path) -> Database:
    def engine(synchronous: str) -> Engine:
        def prepare(connection: sqlite3.Connection, record: ConnectionPoolEntry) -> None:
            connection.isolation_level = None  # transactions are ours to begin: the driver's would begin too late
            for setting in ("journal_mode=WAL", f"synchronous={synchronous}"):
                connection.execute(f"PRAGMA {setting}").close()

        made = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY})
        event.listen(made, "connect", prepare)
        return made

    writer, light, reader = engine("FULL"), engine("NORMAL"), engine("FULL")
    for each in (writer, light):
        event.listen(each, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return Database(writer, light, reader, path)


@contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except OURS:
        raise
    except PoolTimeout:
        raise Down("it is slow, and no connection is free") from None
    except DBAPIError as error:
        found: Any = error.orig
        full = SQLITE_FULL if isinstance(found, sqlite3.Error) else DISK_FULL
        code = found.sqlite_errorcode if isinstance(found, sqlite3.Error) else found.sqlstate
        kind = Clash if code == DEADLOCK else Down
        raise kind((str(found).splitlines() or ["no reason is known"])[0], code == full) from None


# --- its version ---


def upgrade(database: Database, to: str = "head") -> None:
    """Make the tables, or bring them to the newest version. ConfigError: they are of a newer program than this one."""
    if database.path is not None:
        _make_file(database.path)
    script = ScriptDirectory(MIGRATIONS)
    try:
        with database.writing() as connection:
            if database.path is None:
                connection.execute(text("SELECT pg_advisory_xact_lock(7305)"))  # one program at a time
            _check_version(connection, script)
            _migrate(connection, lambda revision, context: script._upgrade_revs(to, revision))
    except (Down, ProgrammingError) as error:
        raise ConfigError(f"--database {name_of(database)}: {str(error).splitlines()[0]}") from None


def downgrade(database: Database, to: str = "base") -> None:
    """Back to an older version; what only newer ones keep is lost."""
    script = ScriptDirectory(MIGRATIONS)
    with database.writing() as connection:
        _migrate(connection, lambda revision, context: script._downgrade_revs(to, revision))


def name_of(database: Database) -> str:
    """For messages: without a password."""
    return str(database.path) if database.path else database.engine.url.render_as_string(hide_password=True)


def _migrate(connection: Connection, steps: Callable[[Any, MigrationContext], Any]) -> None:
    context = MigrationContext.configure(connection, opts={"fn": steps})
    with Operations.context(context):
        context.run_migrations()


def _check_version(connection: Connection, script: ScriptDirectory) -> None:
    known = {revision.revision for revision in script.walk_revisions()}
    for found in MigrationContext.configure(connection).get_current_heads():
        if found not in known:
            raise ConfigError(f"the database is a newer Sputnik's, of version {found}: update this one")


def _make_file(path: Path) -> None:
    """Of mode 0600, in a directory that is made if need be."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigError(f"--database {path}: {error.strerror}: name a file in a directory of yours") from None
