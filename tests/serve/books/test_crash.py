"""kill -9 of the writer at random moments: what it has said to be written is there, and the rest does no harm."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from sqlalchemy import func, select, text

from sputnik.serve.books import ledger
from sputnik.serve.books.database import Database
from sputnik.serve.books.tables import Account, Key, Request


@pytest.fixture
def writer(url: str, database: Database) -> Iterator[subprocess.Popen[str]]:
    program = Path(__file__).with_name("writer_process.py")
    process = subprocess.Popen(
        [sys.executable, str(program), url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    yield process
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait(30)


def said(lines: IO[str], most: int) -> list[list[str]]:
    """All that one writer says; it is killed when so many acknowledgements have been read, and goes on meanwhile."""
    found = list[list[str]]()
    for line in lines:
        found.append(line.split())
        if len(found) == most + 1:
            os.kill(int(found[0][1]), signal.SIGKILL)
        if line == "ended\n":
            return found[1:-1]
    raise AssertionError("the process is gone")


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_what_was_acknowledged_is_there_after_each_kill(
    writer: subprocess.Popen[str], database: Database, open_books: Callable[[], Database], kills: int
) -> None:
    assert writer.stdin is not None and writer.stdout is not None and writer.stdout.readline() == "here\n"
    dice, acknowledged = random.Random(kills), list[list[str]]()
    for _ in range(kills):
        writer.stdin.write("go\n")
        acknowledged += said(writer.stdout, dice.randint(1, 100))
        other = open_books()
        with other.reading() as connection:
            ended = dict(map(tuple, connection.execute(select(Request.id, Request.ended))))  # type: ignore[arg-type]
            keys = set(connection.execute(select(Key.id)).scalars())
            for kind, id in acknowledged:
                assert id in (keys if kind == "key" else ended) and (kind != "settled" or ended[id] == "finished")
            assert ledger.audit(connection) == []
            if other.path is not None:
                assert connection.execute(text("PRAGMA integrity_check")).scalars().all() == ["ok"]
        other.close()
    kinds = {kind for kind, _ in acknowledged}
    assert kinds == {"key", "reserved", "settled"} and len(acknowledged) > 5 * kills
    with database.writing() as connection:
        dead = ledger.gateways(connection)
        assert len(dead) == kills
        for gateway in dead:
            ledger.recover(connection, gateway)
        assert ledger.audit(connection) == []
        assert connection.execute(select(func.sum(Account.held))).scalar() == 0
        assert connection.execute(select(func.count()).where(Request.ended.is_(None))).scalar() == 0
