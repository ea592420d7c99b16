"""The drill: `deploy/backup.sh` keeps what a server under way has written, and brings it back, on both databases."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from sputnik.serve.books import access, ledger
from sputnik.serve.books.access import Grant, create
from sputnik.serve.books.database import Database, open_database, upgrade
from sputnik.serve.books.key import id_of
from sputnik.serve.books.tables import Account, Base, Key, Request

PEPPER = "5a" * 32
ROOT = Path(__file__).parents[3]


def backup(*arguments: object, code: int = 0) -> str:
    """What it says."""
    command = [ROOT / "deploy" / "backup.sh", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextmanager
def opened(url: str) -> Iterator[Database]:
    """As another process would have it: nothing of it is open afterwards."""
    database = open_database(url)
    yield database
    database.close()


def rows(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """All that is written down, and the usage that is made of it."""
    with opened(url) as database, database.reading() as connection:
        found = {
            table.name: sorted(map(tuple, connection.execute(select(table))), key=repr)
            for table in Base.metadata.sorted_tables
            if table.name != "gateways"
        }
        assert ledger.audit(connection) == []
        return found | {"usage": [(each,) for each in ledger.usage(connection)]}


def make_key(url: str, name: str, **grant: Any) -> str:
    with opened(url) as database, database.writing() as connection:
        return create(connection, PEPPER, Grant(name, **grant))


@pytest.fixture(autouse=True)
def no_sqlite_left_out(url: str) -> None:
    """The program of SQLite is not Python's."""
    if url.startswith("sqlite") and not any((Path(place) / "sqlite3").exists() for place in os.get_exec_path()):
        pytest.skip("the program sqlite3 is not here")


def test_what_was_kept_comes_back_to_the_millionth(url: str, front_of: Callable[..., Any], tmp_path: Path) -> None:
    asyncio.run(drill(url, lambda: running(front_of, url), tmp_path / "kept"))


@asynccontextmanager
async def running(front_of: Callable[..., Any], url: str) -> AsyncIterator[Any]:
    async with front_of(url, []) as front:
        yield front
    front.books.database.close()  # what the end of its process does


async def drill(url: str, gateway: Callable[[], Any], file: Path) -> None:
    with opened(url) as database:
        upgrade(database)
    ada, bob = make_key(url, "ada", budget=5_000_000), make_key(url, "bob")
    async with gateway() as front:
        for key in (ada, bob, ada):
            assert (await front.ask(key)).status == 200
    kept = rows(url)  # all three are settled
    async with gateway() as front:
        balance = (await front.post("/user/balance", None, ada, method="GET")).json
        assert 4 < float(balance["balance_infos"][0]["total_balance"]) < 5 and len(kept["requests"]) == 3
        assert backup("keep", url, file) == f"backup: {file}\n"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert "is there already" in backup("keep", url, file, code=1)
        assert "stop the server first" in backup("restore", url, file, code=1)
        assert (await front.ask(bob)).status == 200
        cleo = make_key(url, "cleo")
        await front.until(lambda: front.service.keyring.find(f"Bearer {cleo}") is not None)
        with opened(url) as database, database.writing() as connection:
            access.revoke(connection, "bob")
    assert rows(url) != kept
    said = backup("restore", url, file)
    assert "a key revoked since then is valid again" in said and "in nobody's bill" in said
    assert without_use(rows(url)) == without_use(kept)
    async with gateway() as front:
        assert (await front.post("/user/balance", None, ada, method="GET")).json == balance
        for key, status in ((ada, 200), (bob, 200), (cleo, 401)):
            assert (await front.ask(key)).status == status, "what the page says of keys is so"


def without_use(found: dict[str, Any]) -> dict[str, Any]:
    """When a key was last used is written some seconds late."""
    used = [column.name for column in Key.__table__.columns].index("used")
    return found | {"keys": [row[:used] + row[used + 1 :] for row in found["keys"]]}


def test_a_copy_made_while_a_server_writes_is_whole(url: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with opened(url) as database:
        upgrade(database)
    program = Path(__file__).with_name("writer_process.py")
    writer = subprocess.Popen(
        [sys.executable, program, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert writer.stdin is not None and writer.stdout is not None
    assert writer.stdout.readline() == "here\n"
    writer.stdin.write("go\n")
    pid = int(writer.stdout.readline().split()[1])
    before = [writer.stdout.readline().split() for _ in range(200)]
    backup("keep", url, tmp_path / "kept")
    os.kill(pid, signal.SIGKILL)
    writer.stdin.close()
    after = [line.split() for line in writer.stdout if line != "ended\n"]
    writer.stdout.close()
    assert writer.wait(60) == 0
    assert len(after) > 10, "it wrote all the while"
    target = f"sqlite:///{tmp_path / 'fresh.db'}"
    if url.startswith("postgresql"):
        target = request.getfixturevalue("postgres").new()
    backup("restore", target, tmp_path / "kept")
    check_whole(target, before)


def check_whole(url: str, written: list[list[str]]) -> None:
    """What had been acknowledged before is there, and the rest adds up; so it does when it is settled."""
    with opened(url) as database, database.writing() as connection:
        ended = dict(map(tuple, connection.execute(select(Request.id, Request.ended))))  # type: ignore[arg-type]
        keys = set(connection.execute(select(Key.id)).scalars())
        for kind, id in written:
            assert id in (keys if kind == "key" else ended) and (kind != "settled" or ended[id] == "finished")
        assert ledger.audit(connection) == []
        for gateway in ledger.gateways(connection):
            ledger.recover(connection, gateway)
        assert ledger.audit(connection) == []
        assert not sum(connection.execute(select(Account.held)).scalars())


def test_what_is_no_copy_is_not_put_in_place(url: str, tmp_path: Path) -> None:
    with opened(url) as database:
        upgrade(database)
    key = make_key(url, "ada")
    kept = rows(url)
    (tmp_path / "torn").write_bytes(b"SQLite format 3\0" + bytes(500))
    for file in ("torn", "none"):
        backup("restore", url, tmp_path / file, code=1)
    assert rows(url) == kept and kept["keys"][0][0] == id_of(key)
    assert "there is no" in backup("restore", url, tmp_path / "none", code=1)
    assert "keep DATABASE FILE" in backup("lose", url, code=2)
