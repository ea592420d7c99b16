"""Which gateways of a database live: each holds a lock that its death gives back, however it dies.

    alive = Alive(database, id)
    if alive.hold(): ...                                    # again and again: a lost connection loses PostgreSQL's lock
    dead = alive.dead(others)
    alive.let_go()

With SQLite the lock is on a file beside the database's, with PostgreSQL it is an advisory one of a session.
"""

import contextlib
import fcntl
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

from sputnik.serve.books.database import Database, Down


class Alive:
    def __init__(self, database: Database, id: str) -> None:
        self._database, self._id = database, id
        self._file: TextIO | None = None
        self._session: Connection | None = None
        self._held = False

    def hold(self) -> bool:
        """Take the lock, or see that it is still held; whether it was taken. Down if that cannot be."""
        held, self._held = self._held, False
        if self._database.path is not None:
            self._file = self._file or self._lock_file(self._id)
            self._held = True
            return not held
        try:
            self._session = self._session or self._database.reader.connect()
            if held:
                self._session.execute(text("SELECT 1"))
                self._held = True
            else:  # a connection of ours that only we know to be lost may have it still
                self._held = bool(self._session.execute(_lock(self._id)).scalar_one())
            return self._held and not held
        except DBAPIError as error:
            if self._session is not None:
                self._session.invalidate()
                self._session.close()
            self._session = None
            raise Down(str(error.orig).splitlines()[0]) from None

    def dead(self, others: Iterable[str]) -> list[str]:
        """Those of `others` that hold no lock any more."""
        return [id for id in others if id != self._id and self._is_free(id)]

    def let_go(self) -> None:
        if self._file is not None:
            self._path(self._id).unlink(missing_ok=True)
            self._file.close()
        if self._session is not None:
            with contextlib.suppress(DBAPIError):
                self._session.execute(text("SELECT pg_advisory_unlock_all()"))
            self._session.close()

    def _is_free(self, id: str) -> bool:
        if self._database.path is None:
            with self._database.reading() as connection:
                found = connection.execute(_lock(id)).scalar_one()
                if found:
                    connection.execute(text("SELECT pg_advisory_unlock(:n)"), {"n": _number(id)})
                return bool(found)
        file = self._lock_file(id)
        if file is not None:
            self._path(id).unlink(missing_ok=True)
            file.close()
        return file is not None

    def _lock_file(self, id: str) -> TextIO | None:
        """None: it is another's."""
        try:
            file = self._path(id).open("a", encoding="ascii")
        except OSError as error:
            raise Down(f"{self._path(id)}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def _path(self, id: str) -> Path:
        assert self._database.path is not None
        return self._database.path.with_name(f"{self._database.path.name}.{id}.alive")


def _lock(id: str) -> TextClause:
    return text("SELECT pg_try_advisory_lock(:n)").bindparams(n=_number(id))


def _number(id: str) -> int:
    """PostgreSQL's locks are named by signed 64-bit numbers."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big", signed=True)
