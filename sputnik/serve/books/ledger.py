"""The ledger: what is done to its tables, as functions on a connection inside a transaction of `Database.writing`.

    purse = reserve(connection, reservation)              # None: the budget has no room for it
    purse = settle(connection, id, tokens, "finished")    # None: it is settled, or was never reserved
    recover(connection, gateway)                          # what a gateway that died left open
    usage(connection, since=...);  audit(connection)      # who used what; what does not add up

Each request is settled once, whoever comes first: of two at once, one finds it ended. What it cost follows from its
tokens and from the prices that were written down when it was reserved.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, TextClause, delete, func, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from sputnik.serve.books.prices import Price, Tokens
from sputnik.serve.books.tables import Account, Entry, Gateway, Key, Repeat, Request

DAY = 86_400
BANK, SOLD = "bank", "sold"
CRASHED = "crashed"
# What every request does, as text: SQLAlchemy takes longer to put such statements together than databases to run them.
TAKE = TextClause(
    "UPDATE accounts SET held = held + :amount WHERE id = :account"
    " AND (budget IS NULL OR spent + held + :amount <= budget) RETURNING budget, spent, held"
)
PAY = TextClause(
    "UPDATE accounts SET spent = spent + :cost, held = held - :reserved WHERE id = :account"
    " RETURNING budget, spent, held"
)
OPEN = TextClause(
    "INSERT INTO requests (id, account, model, gateway, sent, hit_price, miss_price, output_price, reserved,"
    " hit, miss, output, reasoning)"
    " VALUES (:id, :account, :model, :gateway, :sent, :hit, :miss, :output, :reserved, 0, 0, 0, 0)"
)
NOTE = TextClause(
    "UPDATE requests SET hit = :hit, miss = :miss, output = :output, reasoning = :reasoning"
    " WHERE id = :id AND ended IS NULL"
)
END = TextClause(
    "UPDATE requests SET hit = :hit, miss = :miss, output = :output, reasoning = :reasoning, ended = :ended"
    " WHERE id = :id AND ended IS NULL RETURNING account, reserved, hit_price, miss_price, output_price"
)
ENTER = TextClause(
    "INSERT INTO entries (request, kind, source, target, amount, at)"
    " VALUES (:request, :kind, :source, :target, :amount, :at)"
)


@dataclass(frozen=True)
class Reservation:
    id: str
    account: str
    model: str
    gateway: str
    sent: int
    price: Price
    amount: int
    """The most that it can cost."""


@dataclass(frozen=True)
class Purse:
    """Of one account, in millionths."""

    budget: int | None
    spent: int
    held: int

    @property
    def left(self) -> int | None:
        """None: there is no limit."""
        return None if self.budget is None else self.budget - self.spent - self.held


@dataclass(frozen=True)
class Used:
    """What an account used on a day."""

    account: str
    name: str | None
    """Of the key; None: it is none of the database's."""
    day: int
    """Since 1970-01-01, UTC."""
    requests: int
    tokens: Tokens
    spent: int


# --- writing ---


def reserve(connection: Connection, asked: Reservation) -> Purse | None:
    purse = _take(connection, asked)
    if purse is None:
        if not open_account(connection, asked.account, None):
            return None
        purse = _take(connection, asked)
    price = asked.price
    row = dict(
        id=asked.id, account=asked.account, model=asked.model, gateway=asked.gateway, sent=asked.sent,
        hit=price.hit, miss=price.miss, output=price.output, reserved=asked.amount,
    )  # fmt: skip
    connection.execute(OPEN, row)
    _enter(connection, asked.id, ("reserve", _key(asked.account), _held(asked.account), asked.amount))
    return purse


def settle(connection: Connection, id: str, tokens: Tokens, ended: str) -> tuple[str, Purse] | None:
    """Its account, and what that has now."""
    row = connection.execute(END, {"id": id, "ended": ended} | _counts(tokens)).one_or_none()
    if row is None:
        return None
    key, held = _key(row.account), _held(row.account)
    cost = Price(row.hit_price, row.miss_price, row.output_price).cost(tokens)
    entries = [("settle", held, SOLD, cost)]
    if cost > row.reserved:
        entries.insert(0, ("extend", key, held, cost - row.reserved))
    elif cost < row.reserved:
        entries.append(("release", held, key, row.reserved - cost))
    _enter(connection, id, *entries)
    paid = {"account": row.account, "cost": cost, "reserved": row.reserved}
    return row.account, Purse(*connection.execute(PAY, paid).one())


def note(connection: Connection, id: str, tokens: Tokens) -> None:
    """How far a request is: what it is settled with if its gateway dies."""
    connection.execute(NOTE, {"id": id} | _counts(tokens))


def recover(connection: Connection, gateway: str) -> int:
    """Settle what a dead gateway left open, by what it had last written down, and forget it. How many it were."""
    rows = connection.execute(
        select(Request.id, Request.hit, Request.miss, Request.output, Request.reasoning).where(
            Request.gateway == gateway, Request.ended.is_(None)
        )
    ).all()
    for row in rows:
        settle(connection, row.id, Tokens(row.hit, row.miss, row.output, row.reasoning), CRASHED)
    connection.execute(delete(Repeat).where(Repeat.gateway == gateway, Repeat.answer.is_(None)))
    connection.execute(delete(Gateway).where(Gateway.id == gateway))
    return len(rows)


def forget_repeats(connection: Connection, before: int) -> int:
    """Delete the answers that were kept for who asks again, of earlier than that; how many."""
    old = delete(Repeat).where(Repeat.at < before, Repeat.answer.is_not(None))
    return int(connection.execute(old).rowcount)


def join(connection: Connection, gateway: str) -> None:
    """A gateway is there; done twice, it is there once."""
    row = dict(id=gateway, started=int(time.time()))
    connection.execute(kind_of(connection).insert(Gateway).values(**row).on_conflict_do_nothing())


def open_account(connection: Connection, id: str, budget: int | None) -> bool:
    """False: it is there already."""
    row = dict(id=id, budget=budget, spent=0, held=0)
    asked = kind_of(connection).insert(Account).values(**row).on_conflict_do_nothing().returning(Account.id)
    made = connection.execute(asked).first() is not None
    if made and budget is not None:
        _enter(connection, id, ("grant", BANK, _key(id), budget))
    return made


def _take(connection: Connection, asked: Reservation) -> Purse | None:
    row = connection.execute(TAKE, {"account": asked.account, "amount": asked.amount}).one_or_none()
    return None if row is None else Purse(*row)


def _enter(connection: Connection, request: str, *entries: tuple[str, str, str, int]) -> None:
    """Kind, source, target and amount of each."""
    now = int(time.time())
    names = ("kind", "source", "target", "amount")
    connection.execute(ENTER, [dict(zip(names, entry)) | {"request": request, "at": now} for entry in entries])


def _counts(tokens: Tokens) -> dict[str, int]:
    return dict(hit=tokens.hit, miss=tokens.miss, output=tokens.output, reasoning=tokens.reasoning)


def kind_of(connection: Connection) -> Any:
    """Whose `on_conflict_do_nothing` it is: each dialect has its own insert."""
    return postgresql if connection.dialect.name == "postgresql" else sqlite


def _key(account: str) -> str:
    return f"key:{account}"


def _held(account: str) -> str:
    return f"held:{account}"


# --- reading ---


def gateways(connection: Connection) -> list[str]:
    return list(connection.execute(select(Gateway.id)).scalars())


def purses(connection: Connection, accounts: Sequence[str]) -> dict[str, Purse]:
    rows = connection.execute(
        select(Account.id, Account.budget, Account.spent, Account.held).where(Account.id.in_(accounts))
    )
    return {row.id: Purse(row.budget, row.spent, row.held) for row in rows}


def usage(connection: Connection, name: str | None = None, since: int = 0) -> list[Used]:
    """By account and day, in that order, of requests that have ended; `name`: of a key, or the id of an account."""
    day: ColumnElement[int] = Request.sent // DAY
    sums = [func.sum(each) for each in (Request.hit, Request.miss, Request.output, Request.reasoning, Entry.amount)]
    asked = (
        select(Request.account, Key.name, day, func.count(), *sums)
        .join(Entry, (Entry.request == Request.id) & (Entry.kind == "settle"))
        .outerjoin(Key, Key.id == Request.account)
        .where(Request.sent >= since)
        .group_by(Request.account, Key.name, day)
        .order_by(Key.name, Request.account, day)
    )
    if name is not None:
        asked = asked.where(or_(Key.name == name, Request.account == name))
    return [
        Used(account, key, int(when), count, Tokens(*map(int, four)), int(spent))
        for account, key, when, count, *four, spent in connection.execute(asked)
    ]


def audit(connection: Connection) -> list[str]:
    """What does not add up: nothing, in a ledger that is whole."""
    balances: dict[str, int] = {}
    for source, target, amount in connection.execute(
        select(Entry.source, Entry.target, func.sum(Entry.amount)).group_by(Entry.source, Entry.target)
    ):
        balances[source] = balances.get(source, 0) - int(amount)
        balances[target] = balances.get(target, 0) + int(amount)
    wrong, spent = list[str](), 0
    for row in connection.execute(select(Account)):
        spent += row.spent
        wanted = {_key(row.id): (row.budget or 0) - row.spent - row.held, _held(row.id): row.held}
        wrong += [
            f"{name}: the entries come to {balances.get(name, 0)}, the account says {amount}"
            for name, amount in wanted.items()
            if balances.get(name, 0) != amount
        ]
    if balances.get(SOLD, 0) != spent:
        wrong.append(f"{SOLD}: the entries come to {balances.get(SOLD, 0)}, the accounts to {spent}")
    return wrong
