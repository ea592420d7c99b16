"""What is written down is what the engine counted, whatever becomes of a request; budgets hold."""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select

from sputnik.serve.books import ledger
from sputnik.serve.books.access import check_pepper
from sputnik.serve.books.database import Database
from sputnik.serve.books.ledger import Purse, Reservation
from sputnik.serve.books.prices import Price, Tokens
from sputnik.serve.books.tables import Account, Entry, Repeat, Request

PRICE = Price(140_000, 550_000, 2_190_000)
FAILS = 666


def reservation(id: str, amount: int = 100, account: str = "a") -> Reservation:
    return Reservation(id, account, "m", "g", 0, PRICE, amount)


def test_what_is_reserved_is_settled_once_and_the_rest_released(database: Database) -> None:
    tokens = Tokens(hit=64, miss=36, output=20, reasoning=12)
    with database.writing() as connection:
        assert ledger.reserve(connection, reservation("r")) == Purse(None, 0, 100)
        settled = ledger.settle(connection, "r", tokens, "finished")
        assert settled == ("a", Purse(None, PRICE.cost(tokens), 0))
        assert ledger.settle(connection, "r", Tokens(output=9), "finished") is None, "it has been"
        assert ledger.settle(connection, "never", tokens, "finished") is None
    with database.reading() as connection:
        entries = connection.execute(select(Entry.kind, Entry.source, Entry.target, Entry.amount).order_by(Entry.id))
        assert list(map(tuple, entries)) == [
            ("reserve", "key:a", "held:a", 100), ("settle", "held:a", "sold", 73), ("release", "held:a", "key:a", 27),
        ]  # fmt: skip
        assert ledger.audit(connection) == []


def test_a_cost_beyond_what_was_reserved_is_paid_all_the_same(database: Database) -> None:
    with database.writing() as connection:
        ledger.reserve(connection, reservation("r", amount=1))
        assert ledger.settle(connection, "r", Tokens(output=100), "finished") == ("a", Purse(None, 219, 0))
        assert ledger.audit(connection) == []


def test_a_budget_is_not_exceeded_by_a_millionth(database: Database) -> None:
    with database.writing() as connection:
        assert ledger.open_account(connection, "a", 250) and not ledger.open_account(connection, "a", 999)
        assert ledger.reserve(connection, reservation("1")) == Purse(250, 0, 100)
        assert ledger.reserve(connection, reservation("2")) == Purse(250, 0, 200)
        assert ledger.reserve(connection, reservation("3", amount=51)) is None
        assert ledger.reserve(connection, reservation("3", amount=50)) == Purse(250, 0, 250)
        ledger.settle(connection, "1", Tokens(), "aborted")
        assert ledger.purses(connection, ["a"])["a"].left == 100
        assert ledger.audit(connection) == []


def test_answers_that_were_kept_are_forgotten_after_a_day_and_those_that_run_are_not(database: Database) -> None:
    rows = [("old", 99, b"x"), ("runs", 99, None), ("new", 100, b"x")]
    with database.writing() as connection:
        for name, at, answer in rows:
            connection.execute(insert(Repeat).values(name=name, body="b", gateway="g", at=at, answer=answer))
        assert ledger.forget_repeats(connection, 100) == 1
        assert set(connection.execute(select(Repeat.name)).scalars()) == {"runs", "new"}


def test_old_requests_may_go_as_the_docs_say(database: Database) -> None:
    docs = Path(__file__).parents[3] / "docs" / "keys.md"
    (statement,) = re.findall(r"```sql\n(.*?);", docs.read_text(encoding="utf-8"))
    with database.writing() as connection:
        for id in ("ended", "runs"):
            ledger.reserve(connection, reservation(id))
        ledger.settle(connection, "ended", Tokens(output=9), "finished")
        assert len(ledger.usage(connection)) == 1
        connection.exec_driver_sql(statement)
        assert ledger.usage(connection) == [] and ledger.audit(connection) == []
        ledger.settle(connection, "runs", Tokens(output=9), "finished")
        assert len(ledger.usage(connection)) == 1 and ledger.audit(connection) == []


def test_the_audit_finds_what_does_not_add_up(database: Database) -> None:
    with database.writing() as connection:
        ledger.reserve(connection, reservation("r"))
        connection.execute(Account.__table__.update().values(spent=5))
        assert len(ledger.audit(connection)) == 2


def test_what_a_dead_gateway_left_is_settled_by_its_last_notes(database: Database) -> None:
    with database.writing() as connection:
        ledger.join(connection, "g")
        ledger.join(connection, "g")
        for id in ("noted", "unknown"):
            ledger.reserve(connection, reservation(id))
        ledger.note(connection, "noted", Tokens(miss=10, output=5))
    with database.writing() as connection:
        assert ledger.gateways(connection) == ["g"] and ledger.recover(connection, "g") == 2
        assert ledger.gateways(connection) == [] and ledger.recover(connection, "g") == 0
        assert ledger.purses(connection, ["a"])["a"] == Purse(None, PRICE.cost(Tokens(miss=10, output=5)), 0)
        assert ledger.audit(connection) == []
        check_pepper(connection, "00" * 32)


class Clients:
    """A thousand calls of all sorts, some at a time."""

    def __init__(self, front: Any, keys: list[str], seed: int) -> None:
        self.front, self.keys, self.dice = front, keys, random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.kept: list[tuple[str, dict[str, Any], str, bytes]] = []

    async def call(self, number: int) -> None:
        dice = self.dice
        key, kind = dice.choice(self.keys), dice.choice(["whole", "stream", "left", "failed", "bad", "kept", "again"])
        body: dict[str, Any] = {"max_tokens": dice.randint(4, 12), "text": "1 + 2 " * dice.randint(1, 9)}
        body["stream"] = kind in ("stream", "left") or (kind == "kept" and dice.random() < 0.5)
        match kind:
            case "left":
                answer = await self.front.ask(key, **body, leaves_after=dice.randint(0, 3))
                self.seen[kind] += 1
                return
            case "failed":
                answer = await self.front.ask(key, **body, seed=FAILS, headers={"idempotency-key": f"failed{number}"})
                assert answer.status == 500, answer
            case "bad":
                assert (await self.front.ask(key, max_tokens=99_999)).status == 400
            case "kept":
                name = {"idempotency-key": f"call{number}"}
                answer = await self.front.ask(key, **body, headers=name)
                assert answer.status == 200 and "idempotent-replayed" not in answer.headers
                self.kept.append((key, body, name["idempotency-key"], answer.body))
            case "again" if self.kept:
                key, body, id, first = dice.choice(self.kept)
                answer = await self.front.ask(key, **body, headers={"idempotency-key": id})
                assert (answer.status, answer.headers["idempotent-replayed"], answer.body) == (200, "true", first)
            case _:
                answer = await self.front.ask(key, **body)
                assert answer.status == 200 and answer.body
        self.seen[kind] += 1


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])  # of PostgreSQL, the first is shorter
def test_the_ledger_is_what_the_engine_counted(
    make_front: Callable[..., Any], make_key: Callable[..., str], database: Database, seed: int
) -> None:
    keys = [make_key("one"), make_key("two", budget=10**9), make_key("three")]
    calls = 250 if seed == 1 and database.path is None else 1000

    async def run() -> tuple[Any, Counter[str], int]:
        async with make_front() as front:
            clients, gate, interrupted = Clients(front, keys, seed), asyncio.Semaphore(16), set[Any]()

            async def one(number: int) -> None:
                async with gate:
                    await clients.call(number)
                    if number % 50 == 0:  # once for each request: twice without a token is given up
                        await front.until(lambda: interrupted.isdisjoint(front.service.requests))
                        interrupted.update(front.service.requests)
                        front.engine.die()

            await asyncio.gather(*(one(number) for number in range(calls)))
            await front.until(lambda: not front.service.requests)
            return front.engine, clients.seen, front.ended

    engine, seen, finished = asyncio.run(run())
    assert sum(seen.values()) == calls and min(seen.values()) > calls // 20, seen
    with database.reading() as connection:
        sums = [func.sum(each) for each in (Request.hit, Request.miss, Request.output)]
        assert tuple(map(int, connection.execute(select(*sums)).one())) == (engine.hit, engine.miss, engine.output)
        assert ledger.audit(connection) == []
        assert connection.execute(select(func.sum(Account.held))).scalar() == 0
        settled = connection.execute(select(func.count()).where(Entry.kind == "settle")).scalar()
        requests = connection.execute(select(func.count()).select_from(Request)).scalar()
        assert settled == requests == finished
        assert sum(each.requests for each in ledger.usage(connection)) == finished
