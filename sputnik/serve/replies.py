"""How a job's deltas leave: as a stream of server-sent events, or as one JSON. ASGI responses, ended by either side.

Headers wait for the first token, so that what fails before has its own status and clients try again by themselves; only
after `QUIET` seconds of silence does a stream begin without one, with a comment, and then there is one at least every
`QUIET` seconds. The first chunk brings the first token: no empty chunk flatters the time to it. A client that goes
frees what it held at once, and so does one that does not read for `SLOW` seconds.
"""

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.responses import Response

from sputnik.serve.generations import Job
from sputnik.serve.guard import Receive, Send
from sputnik.serve.reading import Delta
from sputnik.serve.refusals import Refusal
from sputnik.serve.telling import Teller

QUIET = 10.0
SLOW = 15.0


class _Reply(Response):
    def __init__(self, job: Job, teller: Teller, id: str, close: Callable[[], None]) -> None:
        """`close` is called once, whatever happens."""
        self._job, self._teller, self._id, self._close = job, teller, id, close
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnected(receive))
        gone.add_done_callback(lambda task: None if task.cancelled() else self._job.close())
        try:
            await self._answer(send, gone)
        finally:
            gone.cancel()
            self._close()

    async def _answer(self, send: Send, gone: "asyncio.Task[None]") -> None:
        raise NotImplementedError

    async def _start(self, send: Send, kind: bytes, *more: tuple[bytes, bytes]) -> None:
        headers = [(b"content-type", kind), (b"x-request-id", self._id.encode()), *more]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


class Whole(_Reply):
    """One JSON at the end."""

    async def _answer(self, send: Send, gone: "asyncio.Task[None]") -> None:
        deltas: list[Delta] = []
        while found := await self._job.deltas():
            deltas += found
        if gone.done():
            return
        body = self._teller.reply(deltas)
        await self._start(send, b"application/json", (b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.body", "body": body})


class EventStream(_Reply):
    """Chunks as they come, `[DONE]` at the end; `waiting` is what a comment says before the first token."""

    def __init__(
        self, job: Job, teller: Teller, id: str, close: Callable[[], None], waiting: Callable[[], str], usage: bool
    ) -> None:
        super().__init__(job, teller, id, close)
        self._waiting, self._usage, self._begun = waiting, usage, False

    async def _answer(self, send: Send, gone: "asyncio.Task[None]") -> None:
        try:
            while True:
                try:
                    async with asyncio.timeout(QUIET):
                        deltas = await self._job.deltas()
                except TimeoutError:
                    await self._write(send, f": {self._waiting()}\n\n".encode())
                    continue
                if not deltas:
                    break
                await self._write(send, b"".join(map(_event, self._teller.chunks(deltas))))
            if gone.done():
                return
            last = _event(self._teller.usage_chunk()) if self._usage else b""
            await self._write(send, last + b"data: [DONE]\n\n", more=False)
        except Refusal as refusal:
            if not self._begun:
                raise
            await self._write(send, _event(refusal.body()), more=False)
        except TimeoutError:  # it does not read
            self._job.close()

    async def _write(self, send: Send, data: bytes, more: bool = True) -> None:
        async with asyncio.timeout(SLOW):
            if not self._begun:
                self._begun = True
                still = (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")
                await self._start(send, b"text/event-stream; charset=utf-8", *still)
            await send({"type": "http.response.body", "body": data, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
