"""A gateway that was killed is found by the next one, and by those that live; a living one is left alone."""

import asyncio
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection

from sputnik.serve.books import access, ledger
from sputnik.serve.books.alive import Alive
from sputnik.serve.books.books import Books
from sputnik.serve.books.clerk import Clerk
from sputnik.serve.books.database import Database, Down

HOLDER = """
import sys, time
from sputnik.serve.books.alive import Alive
from sputnik.serve.books.database import open_database
alive = Alive(open_database(sys.argv[1]), "theirs")
alive.hold()
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_ends_with_its_process(url: str, database: Database) -> None:
    alive = Alive(database, "ours")
    alive.hold()
    alive.hold()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        with holder.stdout as lines:
            assert lines.readline() == "held\n"
        assert alive.dead(["ours", "theirs", "never"]) == ["never"]
    finally:
        holder.kill()
        holder.wait(30)
    end = time.monotonic() + 30
    while not alive.dead(["theirs"]):  # PostgreSQL notices a client's death a moment later
        assert time.monotonic() < end
        time.sleep(0.02)
    alive.let_go()
    if database.path is not None:
        assert not list(database.path.parent.glob("*.alive"))


def test_a_new_gateway_settles_what_a_dead_one_left_and_not_what_a_living_one_has(
    make_front: Callable[..., Any], make_key: Callable[..., str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make_key("one")
    monkeypatch.setattr("sputnik.serve.books.books.SURE", 0.1)

    async def run() -> None:
        with database.writing() as connection:
            ledger.join(connection, "dead")
            price = ledger.Price(140_000, 550_000, 2_190_000)
            ledger.reserve(connection, ledger.Reservation("left", key[3:23], "m", "dead", int(time.time()), price, 99))
            ledger.note(connection, "left", ledger.Tokens(miss=10, output=20))
        async with make_front() as front:
            front.engine.paused = True
            running = asyncio.create_task(front.ask(key))
            await front.until(lambda: any(request.booked for request in front.service.requests.values()))
            async with make_front() as other:
                await other.until(lambda: other.books.ready)
                await other.until(lambda: len(listed(database)) == 2)
                with database.reading() as connection:
                    (used,) = ledger.usage(connection)
                    assert (used.requests, used.tokens) == (1, ledger.Tokens(miss=10, output=20))
            front.engine.paused = False
            assert (await running).status == 200

    asyncio.run(run())
    with database.reading() as connection:
        assert sum(used.requests for used in ledger.usage(connection)) == 2 and ledger.gateways(connection) == []
        assert ledger.audit(connection) == []


def listed(database: Database) -> list[str]:
    with database.reading() as connection:
        return ledger.gateways(connection)


def test_who_has_no_lock_for_a_moment_alone_is_not_taken_for_dead(url: str, database: Database) -> None:
    if database.path is not None:
        pytest.skip("SQLite's lock is a file's, which nobody loses")
    with database.writing() as connection:
        ledger.join(connection, "theirs")
    books, theirs = Books(url, "5a" * 32), Alive(database, "theirs")
    books._sweep()
    assert theirs.hold()
    books._sweep()
    assert listed(database) == ["theirs"]
    theirs.let_go()
    books._sweep()
    assert listed(database) == ["theirs"]
    books._sweep()
    assert listed(database) == []
    assert asyncio.run(books.finish(60))


def test_a_gateway_that_lost_its_lock_is_there_again_and_takes_no_other_for_dead(
    make_front: Callable[..., Any], database: Database
) -> None:
    if database.path is not None:
        pytest.skip("SQLite's lock is a file's, which nobody loses")

    async def run() -> None:
        async with make_front() as front:
            swept = front.books._swept
            with database.writing() as connection:  # as a sweep does that comes in between
                connection.exec_driver_sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
                ledger.recover(connection, front.books.id)

            await front.until(lambda: listed(database) == [front.books.id])
            await front.until(lambda: front.books._swept > swept)
            assert Alive(database, "other").dead([front.books.id]) == []

    asyncio.run(run())


def test_a_look_that_has_begun_ends_before_the_books_are_closed(
    make_front: Callable[..., Any], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would take the lock again, for ever, and give its connection back to a pool that is no more."""
    looks, go, changes, pools = threading.Event(), threading.Event(), access.changes, []

    async def run() -> None:
        async with make_front() as front:
            reader = front.books.database.reader

            def slowly(*arguments: Any) -> Any:
                pools.append(reader.pool)
                looks.set()
                assert go.wait(60)
                pools.append(reader.pool)
                return changes(*arguments)

            monkeypatch.setattr(access, "changes", slowly)
            await asyncio.to_thread(looks.wait, 60)
            threading.Timer(0.3, go.set).start()
        assert pools[0] is pools[1] is not reader.pool
        assert Alive(database, "other").dead([front.books.id]) == [front.books.id]

    asyncio.run(run())


def test_a_lock_that_a_lost_connection_still_has_is_taken_when_that_ends(database: Database) -> None:
    if database.path is not None:
        pytest.skip("SQLite's lock is a file's")
    lost, found = Alive(database, "ours"), Alive(database, "ours")
    assert lost.hold() and not lost.hold()
    assert not found.hold(), "PostgreSQL does not know yet"
    lost.let_go()
    assert found.hold() and not found.hold()
    assert Alive(database, "other").dead(["ours"]) == []
    found.let_go()


def test_gateways_that_wait_for_each_other_both_get_on(database: Database) -> None:
    if database.path is not None:
        pytest.skip("SQLite lets one write at a time")
    take = "UPDATE accounts SET held = held + 1 WHERE id = '{}'"
    with database.writing() as connection:
        for account in "ab":
            ledger.open_account(connection, account, None)
        connection.exec_driver_sql(f"ALTER DATABASE {database.engine.url.database} SET deadlock_timeout = '20ms'")
    database.engine.dispose()  # so that the clerk's connection is a new one, and the one that notices
    clerk, go = Clerk(database), threading.Event()
    other = database.reader.connect()
    other.exec_driver_sql("SET deadlock_timeout = '60s'")
    clerk.write(lambda connection: go.wait(60))
    works = [functools.partial(Connection.exec_driver_sql, statement=take.format(account)) for account in "ab"]
    both = [clerk.write(work) for work in works]
    other.exec_driver_sql("BEGIN")
    other.exec_driver_sql(take.format("b"))
    go.set()
    while not other.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar():
        time.sleep(0.005)
    other.exec_driver_sql(take.format("a"))
    other.exec_driver_sql("COMMIT")
    for future in both:
        future.result(60)
    assert clerk.down is None and clerk.finish(30)
    assert ledger.purses(other, ["a", "b"])["b"].held == 2
    other.close()


def test_how_far_a_request_is_gets_noted(
    make_front: Callable[..., Any], make_key: Callable[..., str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sputnik.serve.books.books.NOTE", 0.2)
    key = make_key("one")

    async def run() -> None:
        async with make_front() as front:
            front.engine.rest = 0.005
            running = asyncio.create_task(front.ask(key, max_tokens=1000))
            end = time.monotonic() + 60
            while True:
                with database.reading() as connection:
                    rows = connection.exec_driver_sql("SELECT output FROM requests WHERE ended IS NULL").all()
                if rows and rows[0][0] > 10:
                    break
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())


def test_what_comes_in_while_one_commit_is_under_way_shares_the_next(database: Database) -> None:
    clerk = Clerk(database)
    before = clerk.commits
    with database.writing():
        works = [functools.partial(ledger.join, gateway=f"g{number}") for number in range(200)]
        futures = [clerk.write(work) for work in works]
    for future in futures:
        future.result(60)
    assert clerk.commits - before <= 3 and clerk.finish(30)


def test_what_is_to_be_kept_waits_and_the_rest_is_told(database: Database) -> None:
    if database.path is None:
        pytest.skip("a lock on the whole database is SQLite's")
    clerk = Clerk(database)
    with database.writing():
        kept = clerk.write(functools.partial(ledger.join, gateway="kept"), keep=True)
        lost = clerk.write(functools.partial(ledger.join, gateway="lost"))
        with pytest.raises(Down, match="locked"):
            lost.result(60)
        assert not kept.done() and clerk.down is not None
    kept.result(60)
    with database.reading() as connection:
        assert ledger.gateways(connection) == ["kept"]
    assert clerk.finish(30) and clerk.down is None


def test_a_wrong_write_hurts_no_other(database: Database) -> None:
    clerk = Clerk(database)
    with database.writing():  # so that all three are one batch
        good = clerk.write(functools.partial(ledger.join, gateway="good"))
        bad = clerk.write(lambda connection: connection.exec_driver_sql("INSERT INTO facts (name) VALUES (NULL)"))
        also = clerk.write(functools.partial(ledger.join, gateway="also"))
    assert bad.exception(60) is not None
    good.result(60)
    also.result(60)
    with database.reading() as connection:
        assert set(ledger.gateways(connection)) == {"good", "also"}
    assert clerk.finish(30)
