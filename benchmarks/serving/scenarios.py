"""What a service goes through: overload, two tenants, clients that go, clients that dawdle. Each gives its figures.

    found = await overload(Target(port, operator_port), rate=30, seconds=60, seed=0)
    found["refused_ms_p99"]

Used by the tests in short forms and by `benchmarks/service.py` in long ones; the engine behind is one of fixed speed
(`paced.py`), so that what is measured is the service. Times are the client's own.
"""

import asyncio
import contextlib
import json
import random
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.serving.load import Answer, Ask, poisson, quantile, send

Figures = dict[str, float]


@dataclass(frozen=True)
class Target:
    """A server to be loaded."""

    port: int
    operator_port: int
    key: str = "sk-a"
    other_key: str = "sk-b"

    def ask(self, seed: int = 0, **changes: Any) -> Ask:
        return replace(Ask(self.port, self.key, seed=seed), **changes)


async def fetch(port: int, path: str, key: str = "") -> tuple[int, bytes]:
    """GET; status and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        line = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n"
        )
        writer.write(line.encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return int(head.split()[1]), body
    finally:
        writer.transport.abort()


async def metrics(target: Target) -> Figures:
    _, page = await fetch(target.operator_port, "/metrics")
    found = re.findall(r"^sputnik:(\w+) (\S+)$", page.decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


async def until_idle(target: Target, seconds: float = 30.0) -> float:
    """Seconds until every slot, block and place in the queue is free."""
    begun = time.monotonic()
    names = ("num_requests_running", "num_requests_waiting", "queued_prompt_tokens", "engine_runs", "engine_cache_use")
    while True:
        found = await metrics(target)
        if not any(found.get(name, 1.0) for name in names):
            return time.monotonic() - begun
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"not idle after {seconds:.0f} s: {found}")
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def watched(target: Target, name: str, every: float = 0.1) -> AsyncIterator[list[float]]:
    """Values of a gauge while something else goes on."""
    values: list[float] = []

    async def watch() -> None:
        while True:
            values.append((await metrics(target))[name])
            await asyncio.sleep(every)

    task = asyncio.create_task(watch())
    try:
        yield values
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


# --- L1 ---


async def overload(target: Target, rate: float, seconds: float, seed: int = 0, both: bool = False) -> Figures:
    """Open loop at `rate` requests a second: what is refused, what is admitted, whether it waited as it was told.

    `both`: of two keys in turn; else of one. Answers of 20 tokens."""
    stated: dict[int, float] = {}

    def make(number: int) -> Ask:
        key = target.other_key if both and number % 2 else target.key
        return target.ask(number, tokens=20, key=key, headers=(("x-request-id", f"load-{seed}-{number}"),))

    async def one(ask: Ask, due: float) -> Answer:
        answer = asyncio.create_task(send(ask, due))
        await asyncio.wait([answer], timeout=0.1)
        if not answer.done():
            status, body = await fetch(target.port, f"/v1/requests/load-{seed}-{ask.seed}", ask.key)
            found = json.loads(body)
            if status == 200 and found.get("wait_seconds") is not None:
                stated[ask.seed] = found["wait_seconds"] + time.monotonic() - due
        return await answer

    begun = time.monotonic()
    async with watched(target, "num_requests_waiting") as waiting:
        answers = await poisson(make, rate, seconds, random.Random(seed), one)
    took = time.monotonic() - begun
    admitted = [each for each in answers if each.status == 200]
    refused = [each for each in answers if each.status in (429, 503)]
    late = [each.ttft / stated[each.ask.seed] for each in admitted if each.ttft and stated.get(each.ask.seed, 0) > 0.3]
    proper = all(each.error and each.error["type"] and int(each.headers["retry-after"]) > 0 for each in refused)
    return {
        "sent": len(answers), "admitted": len(admitted), "refused": len(refused),
        "broken": len(answers) - len(refused) - sum(each.done for each in admitted), "proper": float(proper),
        "queue_most": max(waiting, default=0.0),
        "refused_ms_p99": 1e3 * quantile([each.ended - each.due for each in refused], 0.99),
        "refused_ms_p50": 1e3 * quantile([each.ended - each.due for each in refused], 0.5),
        "ttft_p99": quantile([each.ttft for each in admitted if each.ttft], 0.99),
        "stated_p99": quantile(list(stated.values()), 0.99),
        "each_over_stated_p50": quantile(late, 0.5), "each_over_stated_p99": quantile(late, 0.99),
        "tokens_per_s": sum(len(each.text) for each in admitted if each.done) / took,
    }  # fmt: skip


async def recovery(target: Target, normal: float, seconds: float = 20.0) -> float:
    """Seconds until a request's first token comes within `normal` seconds again."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        sent = time.monotonic()
        answer = await send(target.ask(tokens=1))
        if answer.status == 200 and answer.ttft is not None and answer.ttft <= normal:
            return sent - begun
        await asyncio.sleep(0.05)
    return float("inf")


# --- L2 ---


async def first_tokens(target: Target, count: int, pause: float, dice: random.Random, prompt: int) -> list[float]:
    """TTFT of one client that asks now and then, prompts of so many tokens."""
    found = []
    for number in range(count):
        await asyncio.sleep(dice.uniform(0, 2 * pause))
        text = "".join(dice.choices("abcdefgh ", k=prompt))  # in no cache
        answer = await send(target.ask(number, tokens=4, prompt=text))
        found.append(answer.ttft if answer.ttft is not None else float("inf"))
    return found


async def two_tenants(target: Target, parallel: int, count: int, prompt: int, pause: float = 0.2) -> Figures:
    """One key keeps `parallel` requests open; how long another's first tokens take then, and took before."""
    other = replace(target, key=target.other_key)
    alone = await first_tokens(other, count, pause, random.Random(1), prompt)
    stop = asyncio.Event()

    async def greedy(number: int) -> None:
        while not stop.is_set():
            await send(target.ask(number, tokens=20))

    crowd = [asyncio.create_task(greedy(number)) for number in range(parallel)]
    while (await metrics(target))["num_requests_waiting"] < parallel / 2:
        await asyncio.sleep(0.05)
    beside = await first_tokens(other, count, pause, random.Random(2), prompt)
    stop.set()
    await asyncio.gather(*crowd)
    return {
        "alone_p50": quantile(alone, 0.5), "alone_p95": quantile(alone, 0.95), "beside_p50": quantile(beside, 0.5),
        "beside_p95": quantile(beside, 0.95),
    }  # fmt: skip


# --- F4 ---


async def disconnects(target: Target, count: int, at_once: int, longest: float, seed: int = 0) -> Figures:
    """Clients that go at a random moment before, during or after their first token; then, how long till all is free."""
    dice, gate, seen = random.Random(seed), asyncio.Semaphore(at_once), [0, 0]

    async def one(number: int) -> None:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
            try:
                asked = target.ask(number, tokens=200, stream=bool(number % 4)).head_and_body()
                writer.write(asked[: dice.randrange(len(asked))] if number % 10 == 9 else asked)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(dice.uniform(0, longest)):
                        while data := await reader.read(1 << 16):
                            seen[0] += data.startswith(b"HTTP/1.1 200")
            finally:
                writer.transport.abort()
            seen[1] += 1

    await asyncio.gather(*(one(number) for number in range(count)))
    return {"gone": float(seen[1]), "had_begun": float(seen[0]), "free_after_s": await until_idle(target)}


# --- F10 ---


async def dawdlers(target: Target, headers: int, bodies: int, seconds: float, good: int) -> Figures:
    """Connections that send half a head, or half a body, a byte a second; and good requests beside them."""
    loop, closed, opened = asyncio.get_running_loop(), list[float](), time.monotonic()
    whole = target.ask(0).head_and_body()
    end_of_head = whole.index(b"\r\n\r\n") + 4

    async def slow(part: bytes, rest: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        writer.write(part)
        begun = time.monotonic()
        try:
            for byte in rest:
                writer.write(bytes([byte]))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        if not await reader.read(1 << 12) or reader.at_eof():
                            break
                if time.monotonic() - begun > seconds:
                    return
            closed.append(time.monotonic() - begun)
        except ConnectionError:
            closed.append(time.monotonic() - begun)
        finally:
            writer.transport.abort()

    slow_ones = [loop.create_task(slow(whole[:40], whole[40:end_of_head])) for _ in range(headers)]
    slow_ones += [loop.create_task(slow(whole[: end_of_head + 5], whole[end_of_head + 5 :])) for _ in range(bodies)]
    await asyncio.sleep(1.0)
    other, times = replace(target, key=target.other_key), list[float]()
    for number in range(good):
        answer = await send(other.ask(number, tokens=1))
        times.append(answer.ended - answer.due if answer.done else float("inf"))
    await asyncio.gather(*slow_ones)
    return {
        "slow": float(headers + bodies), "closed": float(len(closed)), "closed_s_max": max(closed, default=0.0),
        "good_p50_ms": 1e3 * quantile(times, 0.5), "good_p99_ms": 1e3 * quantile(times, 0.99),
        "took": time.monotonic() - opened,
    }  # fmt: skip


async def unread(target: Target, readers: int, tokens: int, seconds: float, memory: Callable[[], int]) -> Figures:
    """Clients that ask for much and read nothing; `memory` is the gateway's, in bytes."""
    before, socks = memory(), list[socket.socket]()
    loop = asyncio.get_running_loop()
    for number in range(readers):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", target.port))
        await loop.sock_sendall(sock, target.ask(number, tokens=tokens).head_and_body())
        socks.append(sock)
    most, begun, freed = before, time.monotonic(), float("inf")
    while time.monotonic() - begun < seconds:
        await asyncio.sleep(0.2)
        most = max(most, memory())
        if (found := await metrics(target))["num_requests_running"] + found["num_requests_waiting"] == 0:
            freed = time.monotonic() - begun
            break
    for sock in socks:
        sock.close()
    return {"readers": float(readers), "free_after_s": freed, "kb_per_reader": (most - before) / 1024 / readers}


# --- refusals ---


async def refused_per_second(port: int, request: bytes, connections: int, seconds: float) -> Figures:
    """Keep-alive connections that ask again as soon as they have been refused; `request` is one that always is."""
    statuses, times, end = dict[int, int](), list[float](), time.monotonic() + seconds

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while (begun := time.monotonic()) < end:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                assert found is not None, head
                await reader.readexactly(int(found[1]))
                status = int(head[9:12])
                statuses[status] = statuses.get(status, 0) + 1
                times.append(time.monotonic() - begun)
        finally:
            writer.transport.abort()

    await asyncio.gather(*(one() for _ in range(connections)))
    refused = sum(count for status, count in statuses.items() if status in (401, 429, 503))
    assert refused == sum(statuses.values()), statuses
    return {"per_s": refused / seconds, "ms_p50": 1e3 * quantile(times, 0.5), "ms_p99": 1e3 * quantile(times, 0.99)}
