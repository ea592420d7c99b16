"""Keys in the database: made, listed, revoked; and a gateway's copy of them in memory, which every request asks.

    key = create(connection, pepper, Grant("ci", scopes, budget=5_000_000))        # shown once, kept nowhere
    revoke(connection, "ci")
    issued = Issued(pepper);  issued.learn(changes(connection, issued.seen))       # a few times a second
    identity = issued.find(key)                                                    # no database in it

A key is known by its public part and then compared by HMAC, in a time that tells nothing.
"""

import hmac
import re
import time
from collections.abc import Collection, Iterable, MutableMapping
from dataclasses import dataclass
from typing import get_args

from sqlalchemy import Connection, Row, func, insert, select, text, update

from sputnik.errors import ConfigError, DataError
from sputnik.serve.books.database import Database, Down, name_of, open_database, upgrade
from sputnik.serve.books.key import SHOWN, digest, id_of, new_key, read_pepper
from sputnik.serve.books.ledger import open_account
from sputnik.serve.books.tables import Account, Fact, Key
from sputnik.serve.identity import SCOPES, Class, Identity
from sputnik.serve.refusals import Refusal

NAME = re.compile(r"[\w.@/:+-]{1,64}")


@dataclass(frozen=True)
class Grant:
    """What a new key may do."""

    name: str
    scopes: Collection[str] = SCOPES
    rank: Class = "paid"
    budget: int | None = None
    """Millionths."""
    expires: int | None = None
    """Seconds since 1970."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"name {self.name!r}: up to 64 letters, digits and . _ @ / : + -")
        unknown = set(self.scopes) - SCOPES
        if unknown or not self.scopes:
            raise ConfigError(
                f"no scope {', '.join(sorted(unknown)) or 'at all'}: choose of {', '.join(sorted(SCOPES))}"
            )
        if self.rank not in get_args(Class):
            raise ConfigError(f"no priority {self.rank!r}: choose one of {', '.join(get_args(Class))}")
        if self.budget is not None and self.budget < 0:
            raise ConfigError("a budget is not below zero")


def create(connection: Connection, pepper: str, grant: Grant) -> str:
    key = new_key()
    id = id_of(key)
    assert id is not None
    changed = _next_change(connection)
    if connection.execute(select(Key.id).where(Key.name == grant.name, Key.revoked.is_(None))).first():
        raise ConfigError(f"there is a key {grant.name!r} already: choose another name, or revoke that one")
    connection.execute(
        insert(Key).values(
            id=id, name=grant.name, digest=digest(key, pepper), scopes=",".join(sorted(grant.scopes)),
            rank=grant.rank, created=int(time.time()), expires=grant.expires, changed=changed,
        )
    )  # fmt: skip
    open_account(connection, id, grant.budget)
    return key


def revoke(connection: Connection, which: str) -> str:
    """By name, or by the beginning of its id as it is shown; its name. DataError if that is not one valid key."""
    changed = _next_change(connection)
    valid, start = select(Key.id, Key.name).where(Key.revoked.is_(None)), which.removeprefix("sk-").removesuffix("...")
    rows = connection.execute(valid.where(Key.name == which)).all()
    if not rows and len(start) >= SHOWN:  # a shorter one is a name with a typing error
        rows = connection.execute(valid.where(Key.id.startswith(start, autoescape=True))).all()
    if len(rows) != 1:
        found = "no valid key" if not rows else f"{len(rows)} keys"
        raise DataError(f"{found} {which!r}: `sputnik keys list` shows names and ids")
    values = dict(revoked=int(time.time()), changed=changed)
    connection.execute(update(Key).where(Key.id == rows[0].id).values(**values))
    return str(rows[0].name)


def changes(connection: Connection, after: int = 0) -> list[Row[tuple[Key, Account]]]:
    """Keys with their accounts, as rows, of all that changed after that."""
    found = select(Key.__table__, Account.budget, Account.spent, Account.held).join(Account, Account.id == Key.id)
    return list(connection.execute(found.where(Key.changed > after).order_by(Key.changed)))


def touch(connection: Connection, used: dict[str, int]) -> None:
    """When keys were last used."""
    for id, at in sorted(used.items()):  # in one order, so that two gateways never wait for each other
        connection.execute(update(Key).where(Key.id == id).values(used=at))


def open_keys(url: str, environment: MutableMapping[str, str], new: bool = True) -> tuple[Database, str]:
    """The database, of this program's version, and the pepper of its keys. ConfigError: what is wrong with them.

    `new`: a file that is named and not there is made.
    """
    database = open_database(url)
    if url and not new and database.path is not None and not database.path.exists():
        raise ConfigError(f"--database {name_of(database)}: there is none; `sputnik keys create` makes it")
    upgrade(database)
    pepper = read_pepper(environment)
    try:
        with database.writing() as connection:
            check_pepper(connection, pepper)
    except Down as down:
        raise ConfigError(f"--database {name_of(database)}: {down.reason}") from None
    return database, pepper


def check_pepper(connection: Connection, pepper: str) -> None:
    """ConfigError if the keys of this database were made with another."""
    mark = digest("pepper", pepper)
    found = connection.execute(select(Fact.value).where(Fact.name == "pepper")).scalar()
    if found is None:
        connection.execute(insert(Fact).values(name="pepper", value=mark))
    elif not hmac.compare_digest(found, mark):
        raise ConfigError("the pepper is not the one this database's keys were made with: set SPUTNIK_PEPPER to that")


def _next_change(connection: Connection) -> int:
    """Nobody else changes keys until this transaction has ended, so the numbers are seen in order."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE keys IN SHARE ROW EXCLUSIVE MODE"))
    return int(connection.execute(select(func.coalesce(func.max(Key.changed), 0))).scalar_one()) + 1


@dataclass(frozen=True)
class _Known:
    digest: str
    identity: Identity
    expires: int | None
    revoked: bool


class Issued:
    def __init__(self, pepper: str) -> None:
        self._pepper = pepper
        self._known: dict[str, _Known] = {}
        self.seen: int | None = None
        """Number of the last change that is known; None: the database has not been read yet."""

    def learn(self, rows: Iterable[Row[tuple[Key, Account]]]) -> list[str]:
        """Take in changes; the ids of keys that have been revoked by them."""
        revoked = list[str]()
        self.seen = self.seen or 0
        for row in rows:
            salt = bytes.fromhex(row.digest[:32])
            identity = Identity(row.id, row.rank, salt, row.name, frozenset(row.scopes.split(",")))
            self._known[row.id] = _Known(row.digest, identity, row.expires, row.revoked is not None)
            self.seen = max(self.seen, row.changed)
            if row.revoked is not None:
                revoked.append(row.id)
        return revoked

    def find(self, key: str) -> Identity | None:
        """None: not a key of ours. Refusal 401: it was one."""
        id = id_of(key)
        if id is None:
            return None
        if self.seen is None:
            raise Refusal(503, "keys cannot be looked up at the moment", code="books_unavailable", retry_after=2)
        known = self._known.get(id)
        if known is None or not hmac.compare_digest(known.digest, digest(key, self._pepper)):
            return None
        self.check(id)
        return known.identity

    def check(self, id: str) -> None:
        """Refusal 401: this key of the database holds no more."""
        known = self._known.get(id)
        if known is not None and known.revoked:
            raise Refusal(401, "this key has been revoked", code="invalid_api_key")
        if known is not None and known.expires is not None and known.expires <= time.time():
            raise Refusal(401, "this key has expired", code="invalid_api_key")
