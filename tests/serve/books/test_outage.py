"""A database that is locked, full or gone: new requests are refused with a reason, streams go on and are paid."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sputnik.serve.app import make_operator_app
from sputnik.serve.books import ledger
from sputnik.serve.books.database import open_database, upgrade


async def outage(front: Any, key: str, status: int, code: str, begin: Any, end: Any) -> None:
    """A stream that was there before outlives it; others are told, and after it nobody need do anything."""
    assert (await front.ask(key)).status == 200
    front.engine.paused = True
    running: Any = type(front).Answer()
    stream = asyncio.create_task(front.ask(key, stream=True, max_tokens=30, answer=running))
    await front.until(lambda: any(request.booked for request in front.service.requests.values()))
    await begin()
    refused = asyncio.create_task(front.ask(key))  # finds out, if nobody has yet
    front.engine.paused = False
    refused = await refused
    assert refused.status == status and refused.json["error"]["code"] == code, refused.body
    assert int(refused.headers["retry-after"]) >= 1
    await stream
    assert running.status == 200 and running.body.endswith(b"data: [DONE]\n\n") and b'"error"' not in running.body
    assert (await front.ask(key)).status == status, "at the door"
    assert b"sputnik:books_up 0.0" in await metrics(front)
    assert (await front.post("/v1/models", {}, key, method="GET")).status == 200, "what costs nothing goes on"
    await end()
    await front.until(lambda: front.books.ready)
    assert b"sputnik:books_up 1.0" in await metrics(front)
    assert (await front.ask(key)).status == 200


async def metrics(front: Any) -> bytes:
    """The operator's page."""
    found = b""

    async def send(message: Any) -> None:
        nonlocal found
        found += message.get("body", b"")

    await make_operator_app(front.service)({"type": "http", "path": "/metrics"}, send, send)
    return found


def made(url: str) -> None:
    database = open_database(url)
    upgrade(database)
    database.close()


def check(url: str, requests: int) -> None:
    """All that was answered is in the ledger."""
    database = open_database(url)
    with database.reading() as connection:
        assert sum(used.requests for used in ledger.usage(connection)) == requests
        assert ledger.audit(connection) == []
    database.close()


def test_another_program_holds_the_lock(checkpoint: Path, tmp_path: Path, front_of: Callable[..., Any]) -> None:
    url = str(tmp_path / "books.db")
    made(url)

    async def run() -> None:
        async with front_of(url, ["sk-given"]) as front:
            holder = open_database(url)
            lock = holder.writing()

            async def begin() -> None:
                lock.__enter__()

            async def end() -> None:
                lock.__exit__(None, None, None)
                holder.close()

            await outage(front, "sk-given", 503, "books_unavailable", begin, end)

    asyncio.run(run())
    check(url, 3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a disk of limited size is mounted by root")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "sputnik", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_the_disk_is_full(small_disk: Path, front_of: Callable[..., Any]) -> None:
    url = str(small_disk / "books.db")
    made(url)

    async def run() -> None:
        async with front_of(url, ["sk-given"]) as front:

            async def begin() -> None:
                with (small_disk / "ballast").open("wb", buffering=0) as file:
                    try:
                        while file.write(b"x" * 4096):
                            pass
                    except OSError:
                        return

            async def end() -> None:
                (small_disk / "ballast").unlink()

            await outage(front, "sk-given", 507, "disk_full", begin, end)

    asyncio.run(run())
    check(url, 3)


def test_postgresql_is_stopped_and_started(postgres: Any, front_of: Callable[..., Any]) -> None:
    url = postgres.new()
    made(url)

    async def run() -> None:
        async with front_of(url, ["sk-given"]) as front:

            async def begin() -> None:
                await asyncio.to_thread(postgres.stop)

            async def end() -> None:
                await asyncio.to_thread(postgres.start)

            await outage(front, "sk-given", 503, "books_unavailable", begin, end)

    asyncio.run(run())
    check(url, 3)
