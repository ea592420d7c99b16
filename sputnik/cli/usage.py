"""`sputnik usage`: what each key used on each day, in tokens and money, and the sums (docs/keys.md).

sputnik usage --since 30d
sputnik usage --key ci --json
"""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sputnik.cli.console import Console
from sputnik.cli.keys import since
from sputnik.errors import ConfigError, MissingPackage

if TYPE_CHECKING:
    from sputnik.serve.books.ledger import Used

DAY = 86_400
COUNTS = ("requests", "hit", "miss", "output", "reasoning")


@dataclass(frozen=True)
class UsageConfig:
    key: str | None = None
    """The name of one key, revoked or not; all if none is given."""
    since: str = ""
    """7d, 12h, 2w, or a date, UTC: 2026-11-01."""
    json: bool = False
    """One JSON object per line: a key on a day, and at last the sums."""
    database: str = ""
    """As that of `sputnik serve`."""
    prices: Path | None = None
    """As that of `sputnik serve`: it names the currency."""


def main(config: UsageConfig) -> int:
    for package in ("sqlalchemy", "alembic"):
        if find_spec(package) is None:
            raise MissingPackage(package, extra="serve")
    from sputnik.serve.books import ledger
    from sputnik.serve.books.access import open_keys
    from sputnik.serve.books.database import Down
    from sputnik.serve.books.prices import load_prices

    currency, begin = load_prices(config.prices).currency, since(config.since)
    database, _ = open_keys(config.database, os.environ, new=False)
    try:
        with database.reading() as connection:
            found = ledger.usage(connection, config.key, begin)
    except Down as down:
        raise ConfigError(f"the database cannot be used now: {down.reason}") from None
    finally:
        database.close()
    rows = [*map(_row, found), _total(found)]
    if config.json:
        for row in rows:
            print(json.dumps(row | {"currency": currency}))
    else:
        Console().print(_table(rows, currency))
    return 0


def _row(used: "Used") -> dict[str, Any]:
    from sputnik.serve.books.prices import money

    day = datetime.fromtimestamp(used.day * DAY, UTC).strftime("%Y-%m-%d")
    tokens = used.tokens
    counts = (used.requests, tokens.hit, tokens.miss, tokens.output, tokens.reasoning)
    return {"key": used.name or used.account, "day": day} | dict(zip(COUNTS, counts)) | {"cost": money(used.spent)}


def _total(found: "list[Used]") -> dict[str, Any]:
    from sputnik.serve.books.prices import money

    sums = [sum(row[name] for row in map(_row, found)) for name in COUNTS]
    return {"key": None, "day": None} | dict(zip(COUNTS, sums)) | {"cost": money(sum(used.spent for used in found))}


def _table(rows: list[dict[str, Any]], currency: str) -> Table:
    *_, total = rows
    table = Table(box=SIMPLE_HEAD, show_footer=True)
    for name, head in (("key", "key"), ("day", "day"), *zip(COUNTS, COUNTS), ("cost", currency)):
        foot = "all" if name == "key" else "" if name == "day" else _shown(total[name])
        table.add_column(head, foot, justify="left" if name in ("key", "day") else "right", no_wrap=True)
    for row in rows[:-1]:
        table.add_row(*map(_shown, row.values()))
    return table


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
