"""`sputnik keys create NAME`, `list`, `revoke NAME`: the keys of `sputnik serve`, running or not (docs/keys.md).

sputnik keys create ci --scope chat --budget 5 --expires 30d
sputnik keys list
sputnik keys revoke ci                    # running servers know it within a second
"""

import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from sputnik.cli.console import Console
from sputnik.errors import ConfigError, MissingPackage
from sputnik.serve.identity import SCOPES, Class

if TYPE_CHECKING:
    from sputnik.serve.books.database import Database

UNITS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}


@dataclass(frozen=True)
class Create:
    """Make a key; it is the last word of what is printed, and is shown this once."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """What you call it: letters, digits and . _ @ / : + -"""
    scope: UseAppendAction[tuple[str, ...]] = ()
    """chat, completions or models; may be repeated. All of them if none is given."""
    budget: str = ""
    """Money that its requests may cost, in the currency of the price table: 5 or 0.25."""
    expires: str = ""
    """30d, 12h, 2w, or a date: 2027-01-31, or 2027-01-31T12:00:00+01:00."""
    priority: Class = "paid"
    """Its class in the queue."""
    database: str = ""
    """As that of `sputnik serve`."""

    def run(self) -> None:
        from sputnik.serve.books.access import Grant, create

        scopes = frozenset(self.scope) or SCOPES
        grant = Grant(self.name, scopes, self.priority, _amount(self.budget), _moment(self.expires))
        database, pepper = _open(self.database, new=True)
        with database.writing() as connection:
            key = create(connection, pepper, grant)
        database.close()
        print(f"key {self.name}, shown this once: {key}")


@dataclass(frozen=True)
class List:
    """All keys, without their secrets."""

    database: str = ""
    """As that of `sputnik serve`."""

    def run(self) -> None:
        from sputnik.serve.books.access import changes
        from sputnik.serve.books.key import shown
        from sputnik.serve.books.prices import money

        database, _ = _open(self.database)
        with database.reading() as connection:
            rows = changes(connection)
        database.close()
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("name", "key", "scopes", "class", "spent", "budget", "last used", "state"):
            right, wraps = column in ("spent", "budget"), column in ("name", "scopes")
            table.add_column(column, justify="right" if right else "left", no_wrap=not wraps, overflow="fold")
        for row in sorted(rows, key=lambda each: each.created):
            over = row.expires is not None and row.expires <= time.time()
            state = "revoked" if row.revoked else "expired" if over else _until(row.expires)
            scopes = "all" if frozenset(row.scopes.split(",")) == SCOPES else row.scopes
            budget = "" if row.budget is None else money(row.budget)
            table.add_row(row.name, shown(row.id), scopes, row.rank, money(row.spent), budget, _day(row.used), state)
        Console().print(table)


@dataclass(frozen=True)
class Revoke:
    """End a key, and what runs for it."""

    key: Annotated[Positional[str], arg(metavar="KEY")]
    """Its name, or the beginning of the key as `list` shows it."""
    database: str = ""
    """As that of `sputnik serve`."""

    def run(self) -> None:
        from sputnik.serve.books.access import revoke

        database, _ = _open(self.database)
        with database.writing() as connection:
            name = revoke(connection, self.key)
        database.close()
        print(f"key {name} is revoked")


KeysConfig = Create | List | Revoke


def main(config: KeysConfig) -> int:
    for package in ("sqlalchemy", "alembic"):
        if find_spec(package) is None:
            raise MissingPackage(package, extra="serve")
    from sputnik.serve.books.database import Down

    try:
        config.run()
    except Down as down:
        raise ConfigError(f"the database cannot be used now: {down.reason}") from None
    return 0


def _open(url: str, new: bool = False) -> "tuple[Database, str]":
    from sputnik.serve.books.access import open_keys

    return open_keys(url, os.environ, new)


def _amount(text: str) -> int | None:
    """Money in millionths."""
    if not text:
        return None
    if not re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text):
        raise ConfigError(f"--budget {text}: an amount such as 5 or 0.25")
    return int(Decimal(text) * 1_000_000)


def _moment(text: str) -> int | None:
    """Seconds since 1970."""
    if not text:
        return None
    if found := re.fullmatch(r"(\d{1,4})([hdw])", text):
        return int(time.time()) + int(found[1]) * UNITS[found[2]]
    moment = _date(text, "--expires")
    if moment <= time.time():
        raise ConfigError(f"--expires {text}: that is over already")
    return moment


def since(text: str) -> int:
    """The beginning of a time that ends now, in seconds since 1970; empty: of all time."""
    if found := re.fullmatch(r"(\d{1,4})([hdw])", text):
        return int(time.time()) - int(found[1]) * UNITS[found[2]]
    return _date(text, "--since") if text else 0


def _date(text: str, flag: str) -> int:
    """A date without a time zone is UTC's."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{flag} {text}: 30d, 12h, 2w or a date such as 2027-01-31") from None
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp())


def _day(at: int | None) -> str:
    return "never" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def _until(expires: int | None) -> str:
    return "valid" if expires is None else f"to {_day(expires)}"
