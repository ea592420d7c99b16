"""Frames between gateway and worker: what goes in comes out, and nothing else gets through."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sputnik.engine.params import SamplingParams
from sputnik.serve import wire
from sputnik.serve.wire import Channel, FromGateway, FromWorker, Hello, Join, Start, Step, Token, WireError, packed

PARAMS = SamplingParams(max_tokens=7, stop=("a", "b"), logit_bias={3: -1.5}, schema={"type": "object"}, seed=-9, n=2)
HELLO = Hello(1, "models/a", "a", "chat", 512, 4, 1, 2048, True, "f00d")
TOKENS = [Token(3, 0, 1, 55, logprob=-0.5, top=[(55, -0.5), (2, -3.0)]), Token(3, 1, 0, None, "length", 32, "budget")]


def decoded(frame: bytes, kind: Any) -> Any:
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    return msgspec.msgpack.decode(frame[4:], type=kind)


@contextlib.asynccontextmanager
async def pair(mine: Any = FromWorker, theirs: Any = FromGateway) -> AsyncIterator[tuple[Channel[Any], Channel[Any]]]:
    """Two ends of one connection."""
    ends = []
    for end, kind in zip(socket.socketpair(), (mine, theirs)):
        ends.append(Channel[Any](*await asyncio.open_connection(sock=end), kind))
    try:
        yield ends[0], ends[1]
    finally:
        for each in ends:
            each.close()


@pytest.mark.parametrize(
    "message",
    [
        Start(1, [5, 6], PARAMS, True, b"salt", -1, 2.5, 1, [9, 8]),
        Join(1), HELLO, Step(9, TOKENS), wire.Refused(4, "too long", draining=True), wire.Figures(1, {"queue": 2.0}),
    ],
)  # fmt: skip
def test_a_message_comes_back_as_it_was(message: wire.Message) -> None:
    kind = FromGateway if type(message) in get_args(FromGateway) else FromWorker
    assert decoded(packed(message), kind) == message


def test_messages_keep_their_order_through_a_socket() -> None:
    async def run() -> None:
        async with pair() as (gateway, worker):
            for run in range(50):
                gateway.send(Start(run, list(range(run * 100)), PARAMS, False))
                worker.send(Step(run, TOKENS))
            for run in range(50):
                received = await worker.receive()
                assert (received.run, len(received.prompt)) == (run, run * 100)
                assert (await gateway.receive()) == Step(run, TOKENS)

    asyncio.run(run())


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_message_are_an_error_of_the_wire_and_nothing_else(body: bytes) -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        channel = Channel[Any](*await asyncio.open_connection(sock=ours), FromGateway)
        theirs.sendall(len(body).to_bytes(4, "big") + body)
        theirs.close()
        with contextlib.suppress(WireError):
            message = await channel.receive()
            assert message is None or isinstance(message, get_args(FromGateway))
        channel.close()

    asyncio.run(run())


@pytest.mark.parametrize("sent", [b"", b"\0\0", packed(HELLO)[:-1], b"\0\0\0\5abc"])
def test_a_peer_that_goes_in_the_middle_of_a_message_is_the_end_and_no_error(sent: bytes) -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        channel = Channel[Any](*await asyncio.open_connection(sock=ours), FromWorker)
        theirs.sendall(sent)
        theirs.close()
        assert await channel.receive() is None
        channel.close()

    asyncio.run(run())


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        channel = Channel[Any](*await asyncio.open_connection(sock=ours), FromWorker)
        theirs.sendall((wire.MAX_FRAME + 1).to_bytes(4, "big"))
        with pytest.raises(WireError, match="exceeds"):
            await channel.receive()
        channel.close()
        theirs.close()

    asyncio.run(run())
    with pytest.raises(WireError, match="exceeds"):
        packed(Start(1, [2**31] * (wire.MAX_FRAME // 4), PARAMS, False))


def test_a_peer_that_reads_nothing_is_cut_off() -> None:
    async def run() -> None:
        async with pair() as (gateway, worker):
            large = Start(1, [1] * 1_000_000, PARAMS, False)
            sent = 0
            while not gateway._writer.is_closing():
                gateway.send(large)
                sent += 1
                assert sent <= 2 + wire.MAX_UNSENT // 1_000_000
            gateway.send(large)
            worker.close()

    asyncio.run(run())


def test_another_version_is_turned_away_with_both_numbers() -> None:
    wire.check_version(wire.VERSION)
    with pytest.raises(WireError, match=f"version {wire.VERSION + 1}.*version {wire.VERSION}"):
        wire.check_version(wire.VERSION + 1)


def test_params_that_break_their_own_rules_do_not_come_through() -> None:
    body = msgspec.to_builtins(Start(1, [2], PARAMS, False))
    body[3]["temperature"] = -1
    with pytest.raises(msgspec.ValidationError, match="temperature"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(body), type=FromGateway)
