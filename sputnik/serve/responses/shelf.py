"""Responses that are being written and those that are kept: events by number, bodies, turns to go on from.

    record = Record(id, owner, teller, spoken, ...)
    task = shelf.write(record, close)              # it is written, whoever reads; `close` is called at its end
    while events := await record.after(number): ...
    shelf.find(owner, id)                          # Refusal 404

Kept in memory, for the key that asked alone: `PER_KEY` responses and `KEY_BYTES` of each key, `BYTES` of all, for
`SECONDS`; the oldest go first. What is being written is not counted: keys have a limit of requests under way. Left out:
a disk. They are gone when the gateway ends.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from sputnik.serve.fields import ChatMessage
from sputnik.serve.refusals import Refusal
from sputnik.serve.responses.chat import renamed
from sputnik.serve.responses.telling import Event, ResponseTeller
from sputnik.serve.telling import Spoken

PER_KEY = 256
KEY_BYTES = 16 << 20
BYTES = 64 << 20
SECONDS = 3600.0


@dataclass(eq=False)
class Record:
    id: str
    owner: str
    turns: list[ChatMessage]
    """The conversation; once it is written, its answer too."""
    teller: ResponseTeller | None
    spoken: Spoken | None
    streamed: bool
    """Its events are kept."""
    kept: bool
    goes_on: bool
    """Even if nobody reads."""
    events: list[bytes] = field(default_factory=list)
    error: Refusal | None = None
    """It ended before anything was told."""
    final: bytes | None = None
    """The response once it has ended."""
    whole: bool = False
    """It has an answer to go on from."""
    ended: float = 0.0
    size: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def body(self) -> bytes:
        if self.final is not None:
            return self.final
        assert self.teller is not None
        return msgspec.json.encode(self.teller.response())

    def add(self, events: Sequence[Event]) -> None:
        if self.streamed:
            for event in events:
                data = msgspec.json.encode(event | {"sequence_number": len(self.events)})
                self.events.append(b"event: " + event["type"].encode() + b"\ndata: " + data + b"\n\n")
        self._wake()

    async def after(self, number: int) -> list[bytes]:
        """Events from that number on, waited for; none: it has ended."""
        while len(self.events) <= number and self.final is None:
            await self._news.wait()
        if self.error is not None:
            raise self.error
        return self.events[number:]

    async def until_ended(self) -> None:
        while self.final is None:
            await self._news.wait()

    def left(self) -> None:
        """Who asked for it has gone."""
        if not self.goes_on:
            self.stop()

    def stop(self) -> None:
        if self.spoken is not None:
            self.spoken.close()

    def end(self, events: Sequence[Event]) -> None:
        assert self.teller is not None
        self.final = self.body
        self.add(events)
        if self.whole:
            self.turns.append(self.teller.turn())
        self.teller = self.spoken = None
        self.ended = time.monotonic()
        said = sum(len(turn.content) for turn in self.turns if isinstance(turn.content, str))
        said += sum(len(call.function.arguments) for turn in self.turns for call in turn.tool_calls or ())
        self.size = len(self.final) + sum(map(len, self.events)) + said

    def abandon(self) -> None:
        """So that nobody waits for ever."""
        self.error, self.final = Refusal(500, "an error of ours; it is in the log", retry=False), b"{}"
        self.teller = self.spoken = None
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


class Shelf:
    def __init__(self) -> None:
        self._records: dict[tuple[str, str], Record] = {}
        self._writing: set[asyncio.Task[None]] = set()

    def find(self, owner: str, id: str, what: str = "response", param: str = "id") -> Record:
        """`what` and `param`: what a Refusal calls it."""
        self._trim()
        record = self._records.get((owner, id))
        if record is None:
            message = f"no response {id[:100]!r} is kept here for this key"
            raise Refusal(404, message, code=f"{what}_not_found", param=param)
        return record

    def turns(self, owner: str, id: str | None) -> list[ChatMessage]:
        """Of the response that the next one goes on from."""
        if id is None:
            return []
        record = self.find(owner, id, "previous_response", "previous_response_id")
        if not record.whole or record.final is None:
            message = "previous_response_id: that response has no answer to go on from"
            raise Refusal(400, message, param="previous_response_id")
        return record.turns

    def drop(self, record: Record) -> None:
        record.stop()
        record.kept = False
        self._records.pop((record.owner, record.id), None)

    def write(self, record: Record, close: Callable[[], None]) -> None:
        if record.kept:
            self._records[record.owner, record.id] = record
        task = asyncio.create_task(self._write(record, close))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, record: Record, close: Callable[[], None]) -> None:
        teller, spoken, begun = record.teller, record.spoken, False
        assert teller is not None and spoken is not None
        try:
            while deltas := await spoken.deltas():
                start = [] if begun else teller.begin("in_progress")
                record.add([*start, *teller.events(deltas)])
                begun = True
            record.whole = spoken.done
            record.end([*([] if begun else teller.begin("in_progress")), *teller.end()])
        except Refusal as error:
            refusal = renamed(error)
            if not begun and not record.events:
                record.error = refusal
                self.drop(record)
            record.end(teller.fail(refusal))
        finally:
            close()
            if record.final is None:  # by a fault of ours, which the log tells of
                self.drop(record)
                record.abandon()
            self._trim()

    def _trim(self) -> None:
        """Drop what is too old or too much: of a key, then of the one that has most."""
        oldest = time.monotonic() - SECONDS
        ended: dict[str, deque[Record]] = {}
        for record in [each for each in self._records.values() if each.final is not None]:
            if record.ended < oldest:
                self.drop(record)
            else:
                ended.setdefault(record.owner, deque()).append(record)
        sizes = {owner: sum(record.size for record in records) for owner, records in ended.items()}
        for owner in ended:
            while len(ended[owner]) > PER_KEY or sizes[owner] > KEY_BYTES:
                self._drop_first(ended, sizes, owner)
        while sum(sizes.values()) > BYTES:
            self._drop_first(ended, sizes, max(sizes, key=lambda owner: sizes[owner]))

    def _drop_first(self, ended: Mapping[str, deque[Record]], sizes: dict[str, int], owner: str) -> None:
        record = ended[owner].popleft()
        sizes[owner] -= record.size
        self.drop(record)
