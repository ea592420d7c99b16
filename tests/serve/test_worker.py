"""The engine process over its real socket: hello, tokens, beats, gateways that go, drains, and wrong models."""

import asyncio
import contextlib
import signal
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.serve import wire
from sputnik.serve.wire import Channel, FromWorker, Hello, Start, Step

PARAMS = SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
PROMPT = [5, 270, 271]


@pytest.fixture(scope="module")
def worker(start_worker: Callable[..., Any]) -> Any:
    worker = start_worker()
    worker.wait(lambda beat: beat.state == "ready")
    return worker


@contextlib.asynccontextmanager
async def joined(path: str) -> AsyncIterator[Channel[FromWorker]]:
    """A gateway that has said hello."""
    channel = Channel[FromWorker](*await asyncio.open_unix_connection(path), FromWorker)
    hello = await channel.receive()
    assert isinstance(hello, Hello) and (hello.name, hello.context, hello.slots) == ("babbler", 2048, 8)
    channel.send(wire.Join(wire.VERSION))
    try:
        yield channel
    finally:
        await channel.finish()


def within(seconds: float, run: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(run, seconds))


async def tokens(channel: Channel[FromWorker], run: int) -> list[wire.Token]:
    """Of one run, to its end."""
    found: list[wire.Token] = []
    while not found or found[-1].finish is None:
        message = await channel.receive()
        assert isinstance(message, Step), message
        found += [token for token in message.tokens if token.run == run]
    return found


async def figures(channel: Channel[FromWorker]) -> dict[str, float]:
    channel.send(wire.Ask(1))
    while True:
        message = await channel.receive()
        if isinstance(message, wire.Figures):
            return message.values


def test_tokens_over_the_socket_are_those_of_the_engine_in_this_process(worker: Any, llm: LLM) -> None:
    async def run() -> list[wire.Token]:
        async with joined(worker.path) as channel:
            channel.send(Start(1, PROMPT, PARAMS, False))
            return await tokens(channel, 1)

    found = within(60, run())
    assert [token.id for token in found] == llm.generate([PROMPT], PARAMS)[0].outputs[0].ids
    assert stat.S_IMODE(Path(worker.path).stat().st_mode) == 0o600
    assert psutil.Process(worker.process.pid).cmdline()[0].startswith("sputnik worker")


def test_a_gateway_that_goes_takes_its_runs_with_it(worker: Any) -> None:
    async def run() -> None:
        async with joined(worker.path) as other:
            async with joined(worker.path) as channel:
                for number in range(6):
                    channel.send(Start(number, PROMPT, SamplingParams(max_tokens=1900, ignore_eos=True), False))
                await channel.receive()
                assert (await figures(other))["runs"] == 6
            while (found := await figures(other))["runs"]:
                await asyncio.sleep(0.01)
            assert found["cache_use"] == 0
            other.send(Start(9, PROMPT, PARAMS, False))
            assert len(await tokens(other, 9)) == 30

    within(60, run())


def test_a_peer_that_talks_nonsense_is_cut_off_alone(worker: Any) -> None:
    async def run() -> None:
        async with joined(worker.path) as channel:
            for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\3abc", wire.packed(wire.Join(wire.VERSION + 1))):
                reader, writer = await asyncio.open_unix_connection(worker.path)
                writer.write(junk)
                with contextlib.suppress(ConnectionResetError):
                    await reader.read()
                writer.close()
                with contextlib.suppress(ConnectionResetError):
                    await writer.wait_closed()
            channel.send(Start(9, PROMPT, PARAMS, False))
            assert len(await tokens(channel, 9)) == 30

    within(60, run())


def test_a_wrong_grammar_is_refused_and_a_right_one_answers(worker: Any) -> None:
    pytest.importorskip("llguidance")

    async def run() -> None:
        async with joined(worker.path) as channel:
            channel.send(Start(1, PROMPT, SamplingParams(regex="[ab]{3}", max_tokens=20), False))
            channel.send(Start(2, PROMPT, SamplingParams(schema='{"type": "nothing"}'), False))
            channel.send(Start(3, PROMPT, SamplingParams(regex="c+", max_tokens=20), False))
            channel.send(wire.Abort(3))
            ended = set()
            while len(ended) < 2:
                message = await channel.receive()
                if isinstance(message, wire.Refused):
                    assert message.run == 2 and "schema" in message.reason
                    ended.add(2)
                elif isinstance(message, Step):
                    assert {token.run for token in message.tokens} <= {1}
                    ended |= {token.run for token in message.tokens if token.finish}
            assert ended == {1, 2} and (await figures(channel))["runs"] == 0

    within(60, run())


def test_a_thought_is_closed_on_request_while_the_grammar_of_its_answer_is_made(worker: Any, llm: LLM) -> None:
    pytest.importorskip("llguidance")
    prompt = llm.render([{"role": "user", "content": "What?"}])
    params = SamplingParams(max_tokens=40, seed=1, regex="[ab]{30}", logit_bias={llm.tok.end_think_id: -100})

    async def run() -> list[wire.Token]:
        async with joined(worker.path) as channel:
            channel.send(Start(1, list(prompt.ids), params, True))
            channel.send(wire.AnswerNow(1))
            return await tokens(channel, 1)

    found = within(60, run())
    assert found[-1].closed_by == "request" and llm.tok.end_think_id in [token.id for token in found]


def test_beats_count_steps_and_sigterm_finishes_what_runs(start_worker: Callable[..., Any]) -> None:
    worker = start_worker()
    assert worker.wait(lambda beat: beat.state == "ready").busy == 0

    async def run() -> list[wire.Token]:
        async with joined(worker.path) as channel:
            channel.send(Start(1, PROMPT, SamplingParams(max_tokens=400, ignore_eos=True), False))
            first = await channel.receive()
            assert isinstance(first, Step)
            worker.signal(signal.SIGTERM)
            found = [*first.tokens, *await tokens(channel, 1)]
            assert await channel.receive() is None
            return found

    found = within(60, run())
    assert [token.seq for token in found] == list(range(400)) and worker.end() == "" and worker.process.returncode == 0
    with pytest.raises(AssertionError, match="exit code 0"):
        worker.wait(lambda beat: False)
    assert {beat.state for beat in worker.beats} >= {"loading", "ready"}


def test_a_socket_that_cannot_be_is_one_line_and_exit_code_2(start_worker: Callable[..., Any], tmp_path: Path) -> None:
    """A path may have 107 bytes; a worker that nobody can reach must not seem to load for ever."""
    worker = start_worker(socket=str(tmp_path / ("long" * 30)))
    errors = worker.end()
    assert worker.process.returncode == 2 and errors.startswith("error: cannot listen") and errors.count("\n") == 1


@pytest.mark.slow
def test_a_worker_without_a_supervisor_ends_itself(start_worker: Callable[..., Any]) -> None:
    worker = start_worker()
    worker.wait(lambda beat: beat.state == "ready")
    worker.forget()
    worker.end()
    assert worker.process.returncode == 0


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_line_and_exit_code_2(start_worker: Callable[..., Any]) -> None:
    worker = start_worker(model="no/such/model")
    errors = worker.end()
    assert worker.process.returncode == 2 and errors.startswith("error: no/such/model") and errors.count("\n") == 1
    assert not Path(worker.path).exists()
