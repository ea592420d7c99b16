"""The status page: `/status` for people, `/status.json` for programs, from real probes of this very server.

    task = asyncio.create_task(watch(service, board, "127.0.0.1", 8000, every))
    html, headers = page(report);  shown = Fresh(lambda: page(report))

The API is probed over its own socket, the engine by a real token. The page has no script, and a policy that would let
none run. What has never worked yet is still being started; while the server drains, nothing is said of the engine. What
probes found is kept in a file of the user's state, one for each port, for the next process there.
"""

import asyncio
import base64
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from sputnik.files import write_whole
from sputnik.serve.board import Board, Past
from sputnik.serve.books.key import state_directory
from sputnik.serve.service import Service

LOG = logging.getLogger("sputnik")
API_SECONDS = 5.0
STARTING = 1.0
"""Seconds between probes before the first good one."""
BARS = 96
KEPT = 1.0
"""Seconds for which a page is sent as it was made."""
T = TypeVar("T")


class Fresh(Generic[T]):
    """What is made at most once a second, however many ask: they need no key."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: tuple[float, T] | None = None

    def __call__(self) -> T:
        now = time.monotonic()
        if self._made is None or now - self._made[0] >= KEPT:
            self._made = now, self._make()
        return self._made[1]


async def watch(service: Service, board: Board, host: str, port: int, every: float) -> None:
    """Probe for ever."""
    met: set[str] = set()
    path = None if service.settings.beats is None else state_directory() / f"status-{port}.json"
    if path is not None:
        go_on(board, path, time.time())
    while True:
        found = {"API": await _answers(host, port)}
        if service.state != "draining":
            why = "the engine is not there" if not service.engine.up else "no token came in time"
            found["engine"] = (await service.ready(), why)
        for name, (up, why) in found.items():
            if up or name in met:
                met.add(name)
                board.note(name, up, why, time.time())
        if path is not None and met:
            path = await asyncio.to_thread(_keep, msgspec.json.encode(board.past()), path)
        await asyncio.sleep(every if met else min(every, STARTING))


def go_on(board: Board, path: Path, now: float) -> None:
    """From what the process before has kept there."""
    try:
        board.go_on(msgspec.json.decode(path.read_bytes(), type=Past), now)
    except FileNotFoundError:
        return
    except (OSError, msgspec.DecodeError) as error:
        LOG.warning("the status page begins anew", extra={"fields": {"file": str(path), "reason": str(error)}})


def _keep(past: bytes, path: Path) -> Path | None:
    """None: it cannot be, and is not tried again."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, past)
    except OSError as error:
        LOG.warning("the status page is not kept", extra={"fields": {"file": str(path), "reason": str(error)}})
        return None
    return path


async def _answers(host: str, port: int) -> tuple[bool, str]:
    """Whether the API's own socket says that it is well."""
    at = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        async with asyncio.timeout(API_SECONDS):
            reader, writer = await asyncio.open_connection(at, port)
            try:
                writer.write(f"GET /health HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n\r\n".encode())
                status = await reader.readline()
            finally:
                writer.close()
    except TimeoutError:
        return False, "no answer in time"
    except OSError as error:
        return False, error.strerror or "no connection"
    return b" 200 " in status, f"it answered {status[:40].decode('latin-1').strip()}"


def report(service: Service, board: Board) -> dict[str, Any]:
    """What programs get."""
    admission, found = service.admission, board.report(time.time())
    found["wait"] = {"requests": admission.waiting, "seconds": admission.wait}
    states = {each["state"] for each in found["components"].values()}
    found["state"] = "draining" if service.state == "draining" else next(
        state for state in ("down", "unknown", "up") if state in states
    )  # fmt: skip
    return found


@cache
def _template() -> tuple[Any, str]:
    """The page, and the policy that goes with its style."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    style = (folder / "status.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    environment.globals.update(style=style, at=_at, bars=bars, share=_share)
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return environment.get_template("status.html"), policy


def page(found: dict[str, Any], name: str) -> tuple[str, dict[str, str]]:
    template, policy = _template()
    headers = {
        "content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }  # fmt: skip
    return template.render(found=found, name=name, now=time.time()), headers


def bars(day: Sequence[float | None]) -> list[str]:
    """The day in pieces: up, part, down or unknown, the worst of each."""
    size = len(day) // BARS
    found = []
    for start in range(0, size * BARS, size):
        known = [share for share in day[start : start + size] if share is not None]
        worst = min(known, default=None)
        found.append("unknown" if worst is None else "up" if worst == 1 else "part" if worst > 0 else "down")
    return found


def _share(share: float | None) -> str:
    """Never rounded up to a hundred."""
    return "not known yet" if share is None else "100 %" if share == 1 else f"{int(share * 10_000) / 100:.2f} %"


def _at(when: float | None) -> str:
    return "never" if when is None else datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M:%S")
