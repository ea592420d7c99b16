"""How answers leave: as a stream of server-sent events, or as one JSON. ASGI responses, ended by either side.

Headers wait for the first token, so that what fails before has its own status and clients try again by themselves; only
after `QUIET` seconds of silence does a stream begin without one, with a comment, and then there is one at least every
`QUIET` seconds. The first chunk brings the first token: no empty chunk flatters the time to it. A client that goes
frees what it held at once, and so does one that does not read for `SLOW` seconds. What is said is the teller's.
"""

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.responses import Response

from sputnik.serve.guard import Receive, Send
from sputnik.serve.reading import Delta
from sputnik.serve.refusals import Refusal
from sputnik.serve.telling import Flow, Teller

QUIET = 10.0
SLOW = 12.0


class Reply(Response):
    def __init__(self, id: str, left: Callable[[], None], close: Callable[[], None]) -> None:
        """`left` is called when the client goes, `close` once, whatever happens."""
        self._id, self._left, self._close = id, left, close
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnected(receive))
        gone.add_done_callback(lambda task: None if task.cancelled() else self._left())
        try:
            await self.answer(send, gone)
        finally:
            gone.cancel()
            self._close()

    async def answer(self, send: Send, gone: "asyncio.Task[None]") -> None:
        raise NotImplementedError

    async def start(self, send: Send, kind: bytes, *more: tuple[bytes, bytes]) -> None:
        id = self._id.encode()
        headers = [(b"content-type", kind), (b"x-request-id", id), (b"request-id", id), *more]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


class WholeReply(Reply):
    """One JSON, once it is there."""

    async def whole(self) -> bytes:
        raise NotImplementedError

    async def answer(self, send: Send, gone: "asyncio.Task[None]") -> None:
        body = await self.whole()
        if gone.done():
            return
        await self.start(send, b"application/json", (b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.body", "body": body})


class StreamReply(Reply):
    """Events as they come."""

    _begun = False

    async def more(self) -> bytes:
        """What comes next, waited for; empty at the end. A Refusal is the end, too."""
        raise NotImplementedError

    def silence(self) -> bytes:
        raise NotImplementedError

    def failed(self, refusal: Refusal) -> bytes:
        raise NotImplementedError

    async def answer(self, send: Send, gone: "asyncio.Task[None]") -> None:
        try:
            while True:
                try:
                    async with asyncio.timeout(QUIET):
                        data = await self.more()
                except TimeoutError:
                    data = self.silence()
                if not data:
                    break
                await self._write(send, data)
            if not gone.done():
                await self._write(send, b"", more=False)
        except Refusal as refusal:
            if not self._begun:
                raise
            await self._write(send, self.failed(refusal), more=False)
        except TimeoutError:  # it does not read
            self._left()

    async def _write(self, send: Send, data: bytes, more: bool = True) -> None:
        async with asyncio.timeout(SLOW):
            if not self._begun:
                self._begun = True
                still = (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")
                await self.start(send, b"text/event-stream; charset=utf-8", *still)
            await send({"type": "http.response.body", "body": data, "more_body": more})


class Whole(WholeReply):
    def __init__(self, job: Flow, teller: Teller, id: str, close: Callable[[], None]) -> None:
        super().__init__(id, job.close, close)
        self._job, self._teller = job, teller

    async def whole(self) -> bytes:
        deltas: list[Delta] = []
        while found := await self._job.deltas():
            deltas += found
        return self._teller.reply(deltas) if self._job.done else b""


class EventStream(StreamReply):
    """`waiting` is what is said before the first token."""

    def __init__(
        self, job: Flow, teller: Teller, id: str, close: Callable[[], None], waiting: Callable[[], str]
    ) -> None:
        super().__init__(id, job.close, close)
        self._job, self._teller, self._waiting = job, teller, waiting
        self._ended = False

    async def more(self) -> bytes:
        if self._ended:
            return b""
        if deltas := await self._job.deltas():
            return self._teller.events(deltas)
        self._ended = True
        return self._teller.end() if self._job.done else b""

    def silence(self) -> bytes:
        return self._teller.silence(self._waiting())

    def failed(self, refusal: Refusal) -> bytes:
        return self._teller.failed(refusal)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
