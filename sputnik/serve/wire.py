"""What gateway and engine worker say to each other: msgpack frames over a Unix socket, every message a typed struct.

    frame = 4 bytes of length, big-endian | msgpack of one message
    worker -> gateway:  Hello first, then Step (tokens of one scheduler step), Refused, Probed, Figures
    gateway -> worker:  Join first, then Start, Abort, End, AnswerNow, Probe, Ask

    channel = Channel(reader, writer, To)              # of asyncio; decodes `To`, encodes anything above
    message = await channel.receive()                  # None at the end; WireError for what is no message of ours
    channel.send(message)

Token ids only: text is the gateway's. A run is the gateway's number for what the engine calls a request. Nothing is
pickled, sizes are bounded before memory is taken, and a peer of another version is turned away with both numbers. Left
out: encryption and passwords (the socket lies in a directory of mode 0700) and several workers.
"""

import asyncio
import contextlib
from typing import Any, Generic, TypeVar

import msgspec

from sputnik.engine.params import SamplingParams
from sputnik.engine.thinking import ClosedBy, Finish

VERSION = 1
"""Raised whenever a message changes."""
MAX_FRAME = 32 << 20
"""Bytes of a message: a prompt of a million tokens is 5 MB."""
MAX_UNSENT = 64 << 20
"""Bytes a peer may leave unread before it is given up."""


class WireError(Exception):
    """The peer speaks another language or version; the connection is of no use."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


# --- gateway -> worker ---


class Join(Message, frozen=True):
    version: int


class Start(Message, frozen=True):
    """Answer `prompt`. With `sample`, only that one of its samples, which goes on after `written`."""

    run: int
    prompt: list[int]
    params: SamplingParams
    in_thought: bool
    salt: bytes = b""
    priority: int = 0
    seconds: float | None = None
    """Until the answer is worth nothing any more."""
    sample: int | None = None
    written: list[int] = []


class Abort(Message, frozen=True):
    run: int


class End(Message, frozen=True):
    """Enough of one sample: a stop string was found in its text."""

    run: int
    sample: int


class AnswerNow(Message, frozen=True):
    run: int


class Probe(Message, frozen=True):
    """Generate one token, whatever else runs; answered by `Probed`."""

    number: int


class Ask(Message, frozen=True):
    """Answered by `Figures`."""

    number: int


# --- worker -> gateway ---


class Hello(Message, frozen=True):
    version: int
    path: str
    """Of the model's files, where the gateway finds the tokenizer."""
    name: str
    template: str
    context: int
    """Tokens that prompt and answer may have together."""
    slots: int
    """Samples that run at once."""
    spare: int
    """Beyond those, for keys that have less than their share."""
    cache_tokens: int
    exact: bool
    fingerprint: str
    """Of weights and settings: equal ones go on where another worker stopped."""


class Token(msgspec.Struct, frozen=True, array_like=True, gc=False):
    run: int
    seq: int
    """0, 1, 2, ... of this run, without a gap."""
    sample: int
    id: int | None
    """None: the end, without a token."""
    finish: Finish | None = None
    cached: int = 0
    """Prompt tokens that needed no computing."""
    closed_by: ClosedBy | None = None
    """Who ended the thought, told with the finish."""
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class Step(Message, frozen=True):
    number: int
    tokens: list[Token]


class Refused(Message, frozen=True):
    """A `Start` that can never be answered."""

    run: int
    reason: str
    draining: bool = False


class Probed(Message, frozen=True):
    number: int
    seconds: float


class Figures(Message, frozen=True):
    number: int
    values: dict[str, float]


FromGateway = Join | Start | Abort | End | AnswerNow | Probe | Ask
FromWorker = Hello | Step | Refused | Probed | Figures
M = TypeVar("M")


def packed(message: Message) -> bytes:
    """The frame of a message."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME:
        raise WireError(f"a {type(message).__name__} of {len(body)} bytes exceeds the {MAX_FRAME} of a frame")
    return len(body).to_bytes(4, "big") + body


def check_version(version: int) -> None:
    if version != VERSION:
        raise WireError(f"the peer speaks version {version}, this is version {VERSION}: restart the whole server")


class Channel(Generic[M]):
    """One end of a connection; `kind` is the union of what may arrive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: Any) -> None:
        self._reader, self._writer = reader, writer
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(kind)

    async def receive(self) -> M | None:
        """The next message; None when the peer has gone, even in the middle of one."""
        try:
            length = int.from_bytes(await self._reader.readexactly(4), "big")
            if length > MAX_FRAME:
                raise WireError(f"a frame of {length} bytes exceeds the {MAX_FRAME} that are allowed")
            body = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError) as error:
            raise WireError(f"not a message of ours: {error}") from None

    def send(self, message: Message) -> None:
        """Queue a message. A peer that reads nothing for too long is cut off."""
        if self._writer.is_closing():
            return
        self._writer.write(packed(message))
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT:
            self.close()

    def close(self) -> None:
        """At once; what is queued is dropped."""
        self._writer.transport.abort()

    async def finish(self) -> None:
        """Close once all that is queued has been sent."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
