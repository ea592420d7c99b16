"""The service around the engine: what the gateway costs, what overload, dawdlers and crowds do. A JSON line a row.

    python -m benchmarks.service [--cases overhead refusals ...] [--rounds 5] [--seconds 60] [--json]
    python -m benchmarks.service --cases peers --environments .peers [--rates 0.5 1 1.5]

An engine of fixed speed stands behind the real worker, wire, gateway and supervisor. What is compared is measured in
turn in one run, and a ratio is the median of the pairs, with its range: the machine does other things too. `peers` has
a real model: ours, llama.cpp's server and vLLM's under the same load (serving/peer_servers.py).
"""

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving import scenarios
from benchmarks.serving.load import Ask, BareEngine, quantile, send, together
from benchmarks.serving.peer_servers import beside
from benchmarks.serving.running import Running, cpu
from benchmarks.serving.scenarios import Target
from sputnik.serve.admission import RESERVE

Row = dict[str, Any]
PROMPT = [5, 6, 7]


def row(case: str, ours: float, other: float | None, goal: str, met: bool, **more: Any) -> Row:
    """`other`: the idle or bare figure beside it."""
    ratio = None if not other else round(ours / other, 3)
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in more.items()}
    shown = None if other is None else round(other, 3)
    return {"case": case, "ours": round(ours, 3), "idle": shown, "ratio": ratio, "goal": goal, "met": met} | rounded


def finite(value: Any) -> Any:
    """With null for what never came (inf) or was never measured (nan): JSON has neither."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def overhead(model: Path, args: argparse.Namespace) -> Iterator[Row]:
    """The same engine asked over its socket and over HTTP, in turn."""
    with Running(model, "--steps", "500", "--slots", "4") as server:
        pairs = [asyncio.run(_first_tokens(server, 40)) for _ in range(args.rounds)]
        more = [1e3 * (quantile(gateway, 0.5) - quantile(bare, 0.5)) for bare, gateway in pairs]
        bare, ours = (1e3 * statistics.median(quantile(each[side], 0.5) for each in pairs) for side in (0, 1))
        middle = statistics.median(more)
        yield row(
            "gateway TTFT p50, ms", ours, bare, "<= 3 ms more", middle <= 3, more=middle, range=[min(more), max(more)]
        )
    with Running(model, "--steps", "20", "--slots", "64") as server:
        ratios, costs, rates = [], [], []
        for _ in range(args.rounds):
            alone, ours, cost = asyncio.run(_together(server, 64, 160))
            ratios.append(ours / alone)
            costs.append(cost)
            rates.append((ours, alone))
        ours, alone = (statistics.median(each[side] for each in rates) for side in (0, 1))
        middle = statistics.median(ratios)
        yield row(
            "64 streams, tok/s", ours, alone, ">= 0.95", middle >= 0.95, ratio_median=middle,
            range=[round(min(ratios), 3), round(max(ratios), 3)], gateway_cpu_us_per_token=statistics.median(costs),
        )  # fmt: skip


async def _first_tokens(server: Running, count: int) -> tuple[list[float], list[float]]:
    """Of the bare engine and over the gateway, one at a time, in turn."""
    bare, gateway = list[float](), list[float]()
    async with BareEngine(server.socket) as engine:
        for seed in range(count):
            one = await engine.send(Ask(0, tokens=2, seed=seed), PROMPT)
            (two,) = await together([server.target.ask(seed, tokens=2)])
            assert one.ttft is not None and two.ttft is not None, two
            bare.append(one.ttft)
            gateway.append(two.ttft)
    return bare, gateway


async def _together(server: Running, streams: int, tokens: int) -> tuple[float, float, float]:
    """Tokens a second of the bare engine and over the gateway, and the gateway's processor time per token, in us."""
    async with BareEngine(server.socket) as engine:
        asks = [server.target.ask(seed, tokens=tokens) for seed in range(streams)]
        found = await asyncio.gather(*(engine.send(ask, PROMPT) for ask in asks))
        alone = streams * tokens / (max(each.ended for each in found) - min(each.due for each in found))
    gateway = server.child("gateway")
    before = cpu(gateway)
    answers = await together(asks)
    assert all(each.done for each in answers)
    ours = streams * tokens / (max(each.ended for each in answers) - min(each.due for each in answers))
    return alone, ours, 1e6 * (cpu(gateway) - before) / (streams * tokens)


def refusals(model: Path, args: argparse.Namespace) -> Iterator[Row]:
    """A flood that is turned away, while 8 streams write; for each reason of refusing."""
    with Running(model, "--steps", "20", "--slots", "8", "--queue", "256") as server:
        target = server.target
        full = target.ask(key=target.other_key).head_and_body().replace(b"Connection: close\r\n", b"")
        reasons = {"unknown key": full.replace(b"sk-b", b"sk-x"), "queue full": full}
        for reason, request in reasons.items():
            idle, busy, rates = list[float](), list[float](), list[scenarios.Figures]()
            for _ in range(args.rounds):
                idle += asyncio.run(_gaps(target, 60))
                gaps, flood = asyncio.run(_flooded(target, request, 200))
                busy += gaps
                rates.append(flood)
            per_second = [each["per_s"] for each in rates]
            middle, p99 = statistics.median(per_second), 1e3 * quantile(busy, 0.99)
            before = 1e3 * quantile(idle, 0.99)
            kept = p99 <= max(120.0, 2 * before)
            yield row(
                f"refusals/s, {reason}", middle, None, ">= 2,000 while streams keep pace", middle >= 2000 and kept,
                range=[min(per_second), max(per_second)], gap_p99_ms=p99, idle_gap_p99_ms=before,
                refused_ms_p99=max(each["ms_p99"] for each in rates),
            )  # fmt: skip


async def _gaps(target: Target, tokens: int) -> list[float]:
    answers = await together([target.ask(seed, key=target.other_key, tokens=tokens) for seed in range(8)])
    assert all(each.done for each in answers), answers[0]
    return [gap for each in answers for gap in each.gaps]


async def _flooded(target: Target, request: bytes, tokens: int) -> tuple[list[float], scenarios.Figures]:
    """Gaps of 8 streams, with a full queue of 256 behind them, under a flood that gets nowhere."""
    streams = asyncio.create_task(_gaps(target, tokens))
    await asyncio.sleep(0.2)
    places = 256 - 256 // RESERVE  # the last ones are for keys with fewer there
    line = [asyncio.create_task(send(target.ask(seed, key=target.other_key))) for seed in range(places)]
    async with asyncio.timeout(60):
        while (await scenarios.metrics(target))["num_requests_waiting"] < places:
            await asyncio.sleep(0.02)
    flood = await scenarios.refused_per_second(target.port, request, 16, 3.0)
    for each in line:
        each.cancel()
    await asyncio.gather(*line, return_exceptions=True)
    gaps = await streams
    await scenarios.until_idle(target)
    return gaps, flood


def overload(model: Path, args: argparse.Namespace) -> Iterator[Row]:
    """L1: once what it can do, then four times as much."""
    with Running(model, "--steps", "20", "--slots", "8", "--queue", "32") as server:
        target = server.target
        asyncio.run(scenarios.overload(target, 7.0, 10, seed=9))  # it learns how long answers are
        idle = asyncio.run(scenarios.first_tokens(target, 20, 0.05, random.Random(0), 5))
        once = asyncio.run(scenarios.overload(target, 7.0, args.seconds / 2, seed=1))
        asyncio.run(scenarios.until_idle(target))
        found = asyncio.run(scenarios.overload(target, 28.0, args.seconds, seed=2))
        back = asyncio.run(scenarios.recovery(target, 1.5 * quantile(idle, 0.99)))
        asyncio.run(scenarios.until_idle(target))
        two = asyncio.run(scenarios.overload(target, 28.0, args.seconds, seed=3, both=True))
    yield row("L1 queue at most", found["queue_most"], None, "<= 32", found["queue_most"] <= 32)
    right = found["refused_ms_p99"] <= 50 and found["proper"] == 1 and not found["broken"]
    yield row("L1 refused p99, ms", found["refused_ms_p99"], None, "<= 50, as JSON, Retry-After", right, **found)
    for keys, each in (("one key", found), ("two keys", two)):
        first, stated = each["ttft_p99"], each["stated_p99"]
        more = {name: value for name, value in each.items() if name.startswith("each_")}
        yield row(
            f"L1 TTFT p99, {keys}, s; idle: the stated wait's", first, stated, "<= 1.2x", first <= 1.2 * stated, **more
        )
    good = found["tokens_per_s"] / once["tokens_per_s"]
    yield row("L1 goodput, tok/s", found["tokens_per_s"], once["tokens_per_s"], ">= 0.9 of 1x", good >= 0.9)
    yield row("L1 normal again, s", back, None, "<= 5", back <= 5)


def tenants(model: Path, args: argparse.Namespace) -> Iterator[Row]:
    """L2."""
    with Running(model, "--steps", "20", "--slots", "8") as server:
        found = asyncio.run(scenarios.two_tenants(server.target, 200, 20, 2000))
    ours, alone = 1e3 * found["beside_p95"], 1e3 * found["alone_p95"]
    yield row("L2 TTFT p95 beside 200 calls, ms", ours, alone, "<= 1.5x", ours <= 1.5 * alone)


def disconnects(model: Path, args: argparse.Namespace) -> Iterator[Row]:
    """F4."""
    with Running(model, "--steps", "50", "--slots", "16") as server:
        found = asyncio.run(scenarios.disconnects(server.target, 1000, 24, 0.4))
    yield row("F4 free after 1,000 disconnects, s", found["free_after_s"], None, "<= 0.5", found["free_after_s"] <= 0.5)


def dawdlers(model: Path, args: argparse.Namespace) -> Iterator[Row]:
    """F10."""
    with Running(model, "--steps", "50", "--slots", "16", "--queue", "512") as server:
        target = server.target
        alone = asyncio.run(scenarios.dawdlers(target, 0, 0, 1, 60))
        found = asyncio.run(scenarios.dawdlers(target, 500, 200, 20, 100))
        good, closed = found["good_p99_ms"], found["closed_s_max"]
        yield row("F10 good request p99, ms", good, alone["good_p99_ms"], "<= 300", good <= 300)
        all_closed = closed <= 15 and found["closed"] == found["slow"]
        yield row("F10 slow ones closed after, s", closed, None, "<= 15, all", all_closed, closed=found["closed"])
    with Running(model, "--steps", "0", "--slots", "8", "--queue", "512") as server:
        unread = asyncio.run(scenarios.unread(server.target, 200, 100, 60, server.memory))
        each = unread["kb_per_reader"]
        yield row("F10 memory per slow reader, kB", each, None, "<= 256", each <= 256, **unread)


def peers(model: Path, args: argparse.Namespace) -> Iterator[Row]:
    yield from beside(args.environments, args.rates, args.rounds, args.peer_seconds, args.threads)


CASES: dict[str, Callable[[Path, argparse.Namespace], Iterator[Row]]] = {
    "overhead": overhead, "refusals": refusals, "overload": overload, "tenants": tenants,
    "disconnects": disconnects, "dawdlers": dawdlers, "peers": peers,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=[each for each in CASES if each != "peers"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--environments", type=Path, default=Path(os.environ.get("PEERS", ".peers")))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 1.5], help="requests a second, of peers")
    parser.add_argument("--peer-seconds", type=float, default=25.0, help="of each run of each peer")
    parser.add_argument("--threads", type=int, default=2, help="of each peer")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON lines, no progress on stderr")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: at least 1")
    from benchmarks.serving.paced_engine import make_model

    with tempfile.TemporaryDirectory(prefix="service-") as directory:
        model = make_model(Path(directory) / "model")
        for name in args.cases:
            if not args.json:
                print(name, file=sys.stderr, flush=True)
            for each in CASES[name](model, args):
                print(json.dumps(finite(each), allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
