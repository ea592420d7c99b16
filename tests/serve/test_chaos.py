"""Processes are killed and stopped at random moments; every history is checked against what must have been said.

The engine is one of fixed speed whose answer is known beforehand (benchmarks/serving/paced.py): a token that is lost,
doubled or another one shows at once, and a stream that could not go on must say so in a typed error.
"""

import asyncio
import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.serving.load import Answer, Ask, quantile, send
from benchmarks.serving.paced import answer
from benchmarks.serving.peer_servers import READY, PeerServer
from benchmarks.serving.scenarios import Target, fetch, until_idle

KEY = "sk-test"


def check(found: Answer) -> str:
    """Whole, or broken off with an error that says so; anything else fails."""
    wanted = answer(found.ask.seed, found.ask.tokens)
    if found.error is None:
        assert found.status == 200 and found.done and found.finish == "length", found
        assert found.text == wanted, f"seed {found.ask.seed}: {found.text!r} is not {wanted!r}"
        return "whole"
    assert isinstance(found.error, dict) and found.error["code"] == "engine_lost", found
    assert wanted.startswith(found.text), "what came before the error is a beginning of the answer"
    return "typed error"


async def until(target: Target, path: str, status: int, seconds: float) -> float:
    """Seconds until it answers so."""
    begun = time.monotonic()
    while True:
        with contextlib.suppress(OSError, IndexError, ValueError):
            if (await fetch(target.port, path, KEY))[0] == status:
                return time.monotonic() - begun
        assert time.monotonic() - begun < seconds, f"{path} did not become {status} within {seconds:.0f} s"
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def target(paced: Any) -> Target:
    return Target(paced.port, paced.operator_port, KEY, "sk-other")


def kill_workers(server: Any, target: Target, times: int, dice: random.Random) -> list[str]:
    """Four streams a round, a kill at a random moment of each; their fates."""
    gateway = server.child("gateway")
    fates, noticed = list[str](), list[float]()

    async def round(number: int) -> None:
        asks = [Ask(server.port, KEY, tokens=dice.randint(10, 40), seed=number * 10 + each) for each in range(4)]
        streams = asyncio.gather(*map(send, asks))
        await asyncio.sleep(dice.uniform(0, 1.5))
        server.child("worker").kill()
        noticed.append(await until(target, "/ready", 503, 10))
        fates.extend(check(each) for each in await asyncio.wait_for(streams, 120))
        back = await until(target, "/ready", 200, 120)
        print(f"kill {number + 1}: noticed in {noticed[-1]:.2f} s, {fates[-4:]}, back in {back:.1f} s", flush=True)

    for number in range(times):
        asyncio.run(round(number))
    assert server.child("gateway") == gateway
    assert quantile(noticed, 0.5) < 1, "where others have the processor, one may take longer"
    asyncio.run(until_idle(target))
    return fates


def test_streams_are_byte_identical_over_kills_at_random_tokens(paced: Any, target: Target) -> None:
    fates = kill_workers(paced, target, 2, random.Random(0))
    assert fates == ["whole"] * 8, "one death a stream is always survived"


@pytest.mark.slow
def test_streams_are_byte_identical_over_fifty_kills(paced: Any, target: Target) -> None:
    fates = kill_workers(paced, target, 50, random.Random(1))
    assert fates == ["whole"] * 200


@pytest.mark.slow
def test_a_stopped_worker_is_replaced_within_ten_seconds_and_no_letter_changes(paced: Any, target: Target) -> None:
    async def run() -> None:
        asks = [Ask(paced.port, KEY, tokens=60, seed=each) for each in range(4)]
        streams = asyncio.gather(*map(send, asks))
        await asyncio.sleep(1.0)
        worker = paced.child("worker")
        worker.suspend()
        begun = time.monotonic()
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - begun < 10 + 3, "noticed within 10 s"
            await asyncio.sleep(0.05)
        assert [check(each) for each in await asyncio.wait_for(streams, 120)] == ["whole"] * 4

    asyncio.run(run())
    asyncio.run(until_idle(target))


def test_a_worker_that_is_asked_to_go_is_replaced_and_nobody_notices(paced: Any, target: Target) -> None:
    """For another version of a model or of this program: what runs ends there, what comes waits for the next."""

    async def run() -> None:
        asks = [Ask(paced.port, KEY, tokens=40, seed=each) for each in range(4)]
        streams = asyncio.gather(*map(send, asks))
        await asyncio.sleep(0.5)
        paced.child("worker").terminate()
        late = await asyncio.gather(*(send(Ask(paced.port, KEY, tokens=10, seed=each)) for each in range(4, 7)))
        assert [check(each) for each in [*await streams, *late]] == ["whole"] * 7

    asyncio.run(run())
    asyncio.run(until_idle(target))


def test_a_killed_gateway_is_back_and_has_left_nothing_running(paced: Any, target: Target) -> None:
    """Its clients see their connections end without [DONE], which is how they know; nothing is said wrongly."""

    async def run() -> None:
        asks = [Ask(paced.port, KEY, tokens=60, seed=each) for each in range(10)]
        streams = asyncio.gather(*map(send, asks))
        await asyncio.sleep(1.0)
        worker = paced.child("worker")
        paced.child("gateway").kill()
        begun = time.monotonic()
        for each in await asyncio.wait_for(streams, 60):
            assert not each.done and each.error is not None
            assert answer(each.ask.seed, 60).startswith(each.text)
        await until(target, "/ready", 200, 60)
        took = time.monotonic() - begun
        assert took < 30, f"back after {took:.1f} s"
        assert paced.child("worker") == worker
        assert check(await send(Ask(paced.port, KEY, tokens=10, seed=3))) == "whole"

    asyncio.run(run())
    asyncio.run(until_idle(target))


@pytest.mark.slow
def test_a_whole_server_that_was_stopped_goes_on_where_it_was(paced: Any, target: Target) -> None:
    """A machine that is paused, say: nobody is taken for dead by those who were stopped too."""

    async def run(processes: list[psutil.Process]) -> None:
        asks = [Ask(paced.port, KEY, tokens=40, seed=each) for each in range(12)]
        streams = asyncio.gather(*map(send, asks[:8]))
        await asyncio.sleep(0.5)
        for each in processes:
            each.suspend()
        await asyncio.sleep(12)
        for each in processes:
            each.resume()
        late = await asyncio.gather(*map(send, asks[8:]))
        assert [check(each) for each in [*await streams, *late]] == ["whole"] * 12

    processes = [psutil.Process(paced.process.pid), paced.child("gateway"), paced.child("worker")]
    for each in (processes, processes[::-1]):
        asyncio.run(run(each))
        assert [paced.child("gateway"), paced.child("worker")] == processes[1:]
    asyncio.run(until_idle(target))


def test_a_server_stopped_as_soon_as_it_is_taken_for_ready_answers_at_once_when_it_goes_on(paced: Any) -> None:
    """As the benchmark of servers side by side does with ours: its gateway is alive long before a model is loaded."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.serving.paced", paced.model, "--port", str(port)]
    server = PeerServer("ours", command, port, {"SPUTNIK_API_KEY": KEY}, READY)
    try:
        server.wait()
        server.go(False)
        time.sleep(1)
        server.go(True)
        assert check(asyncio.run(send(Ask(server.port, KEY, tokens=5, seed=1)))) == "whole"
    finally:
        server.end()


@pytest.mark.slow
def test_a_hundred_dead_gateways_leave_nothing_behind(paced: Any, target: Target) -> None:
    dice, worker = random.Random(2), paced.child("worker")

    async def run(number: int) -> None:
        asks = [Ask(paced.port, KEY, tokens=40, seed=each) for each in range(10)]
        streams = asyncio.gather(*map(send, asks))
        await asyncio.sleep(dice.uniform(0, 1.0))
        paced.child("gateway").kill()
        for each in await asyncio.wait_for(streams, 60):
            assert answer(each.ask.seed, 40).startswith(each.text) and each.done == (len(each.text) == 40)
        await until(target, "/ready", 200, 60)

    for number in range(100):
        asyncio.run(run(number))
    asyncio.run(until_idle(target))
    assert paced.child("worker") == worker
    assert worker.num_fds() < 40, "no connection of a dead gateway is held"


@pytest.mark.slow
def test_a_worker_that_never_comes_up_again_ends_the_server(start_paced: Callable[..., Any]) -> None:
    """Its model's files are gone: exit code, not a loop for ever."""
    server = start_paced("--steps", "20")
    server.wait("serving")
    model = Path(server.model)
    hidden = model.rename(model.with_name("hidden"))
    try:
        server.child("worker").kill()
        assert server.process.wait(120) in (1, 2), "".join(server.said)
    finally:
        hidden.rename(model)


def test_two_servers_cannot_have_one_port(paced: Any) -> None:
    command = [sys.executable, "-m", "sputnik", "serve", "no/such/model", "--port", str(paced.port)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2 and f"cannot listen on 127.0.0.1:{paced.port}" in found.stderr


def test_a_gateway_whose_port_is_taken_says_so_and_gives_up(paced: Any, tmp_path: Path) -> None:
    """Two that looked at the same moment: only one can have the port, and the other must not share it."""
    import msgspec

    from sputnik.serve.settings import GatewaySettings

    settings = GatewaySettings(str(tmp_path / "none.sock"), "127.0.0.1", paced.port, paced.operator_port, "m", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "sputnik.serve.gateway"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        _, said = process.communicate(msgspec.json.encode(settings), timeout=60)
        assert process.returncode not in (0, -signal.SIGKILL) and b"in use" in said.lower(), said
    finally:
        process.kill()
