"""A client that costs little, for many streams at once: HTTP/1.1 by hand over asyncio, times of every piece.

    asks = [Ask(port, key, tokens=64, seed=n) for n in range(64)]
    answers = await together(asks)                    # or `poisson(ask, rate, seconds)`: open loop
    answer.first, answer.times, answer.text, answer.status, answer.error

Open loop: requests come when they come, whether or not earlier ones have been answered; the clock of a request starts
when it was due, so that a client that lags flatters nobody. A raw connection a request, as strangers have. The bare
engine is asked by `BareEngine`, over the same socket that the gateway uses.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sputnik.engine.params import SamplingParams
from sputnik.serve import wire


@dataclass(frozen=True)
class Ask:
    port: int
    key: str = "sk-a"
    tokens: int = 32
    seed: int = 0
    prompt: str = "a b c"
    path: str = "/v1/completions"
    stream: bool = True
    more: dict[str, Any] = field(default_factory=dict)
    headers: tuple[tuple[str, str], ...] = ()
    host: str = "127.0.0.1"

    def head_and_body(self) -> bytes:
        asked = {"model": "paced", "prompt": self.prompt, "max_tokens": self.tokens, "seed": self.seed}
        body = json.dumps(asked | {"stream": self.stream} | self.more).encode()
        lines = [
            f"POST {self.path} HTTP/1.1", f"Host: {self.host}:{self.port}", f"Authorization: Bearer {self.key}",
            "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close",
            *(f"{name}: {value}" for name, value in self.headers),
        ]  # fmt: skip
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class Answer:
    ask: Ask
    due: float
    status: int = 0
    """0: no answer, not even a refusal."""
    headers: dict[str, str] = field(default_factory=dict)
    began: float | None = None
    """When the status line came; the first token has come with it, or it was refused."""
    first: float | None = None
    times: list[float] = field(default_factory=list)
    """Of each piece of text."""
    text: str = ""
    finish: str | None = None
    error: Any = None
    """What the server said instead of an answer, or in the middle of one."""
    done: bool = False
    """The stream said so."""
    ended: float = 0.0

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.due

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:])]


async def send(ask: Ask, due: float | None = None) -> Answer:
    """One request, to its end."""
    answer = Answer(ask, time.monotonic() if due is None else due)
    try:
        reader, writer = await asyncio.open_connection(ask.host, ask.port, limit=1 << 22)
        try:
            writer.write(ask.head_and_body())
            await _read(reader, answer)
        finally:
            writer.transport.abort()
    except (OSError, asyncio.IncompleteReadError) as error:
        answer.error = answer.error or error
    answer.ended = time.monotonic()
    return answer


async def _read(reader: asyncio.StreamReader, answer: Answer) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    answer.began = time.monotonic()
    status, *lines = head.split("\r\n")
    answer.status = int(status.split()[1])
    answer.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
    if answer.headers.get("transfer-encoding") != "chunked":
        body = json.loads(await reader.readexactly(int(answer.headers["content-length"])))
        if answer.status != 200:
            answer.error = body["error"]
            return
        answer.text, answer.done = _text(body["choices"][0]), True
        answer.first = time.monotonic()
        return
    rest = b""
    while (size := int(await reader.readuntil(b"\r\n"), 16)) > 0:
        rest += (await reader.readexactly(size + 2))[:-2]
        *events, rest = rest.split(b"\n\n")
        for event in events:
            _take(event, answer)


def _take(event: bytes, answer: Answer) -> None:
    if not event.startswith(b"data: "):
        return
    if event == b"data: [DONE]":
        answer.done = True
        return
    chunk = json.loads(event[6:])
    if "error" in chunk:
        answer.error = chunk["error"]
    for choice in chunk.get("choices", ()):
        text = _text(choice)
        if text:
            now = time.monotonic()
            answer.first = answer.first or now
            answer.times.append(now)
            answer.text += text
        answer.finish = choice.get("finish_reason") or answer.finish


def _text(choice: dict[str, Any]) -> str:
    said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
    return (said.get("reasoning_content") or "") + (said.get("content") or "")


async def together(asks: Sequence[Ask]) -> list[Answer]:
    return list(await asyncio.gather(*(send(ask) for ask in asks)))


async def poisson(
    make: Callable[[int], Ask], rate: float, seconds: float, dice: random.Random,
    each: Callable[[Ask, float], Awaitable[Answer]] = send,
) -> list[Answer]:  # fmt: skip
    """Requests at random moments, `rate` a second, for so long; the answers of all, in order of arrival."""
    tasks, due, end = [], time.monotonic(), time.monotonic() + seconds
    while (due := due + dice.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(each(make(len(tasks)), due)))
    return list(await asyncio.gather(*tasks))


class BareEngine:
    """The worker's socket, without a gateway."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._answers: dict[int, Answer] = {}
        self._ends: dict[int, asyncio.Future[None]] = {}

    async def __aenter__(self) -> "BareEngine":
        reader, writer = await asyncio.open_unix_connection(self._path)
        self._channel = wire.Channel[wire.FromWorker](reader, writer, wire.FromWorker)
        assert isinstance(await self._channel.receive(), wire.Hello)
        self._channel.send(wire.Join(wire.VERSION))
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(self._broke)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._channel.close()

    def _broke(self, reader: "asyncio.Task[None]") -> None:
        for end in self._ends.values():
            if not end.done():
                end.set_exception((None if reader.cancelled() else reader.exception()) or ConnectionResetError())

    async def send(self, ask: Ask, prompt: Sequence[int]) -> Answer:
        run = len(self._ends)
        answer = self._answers[run] = Answer(ask, time.monotonic())
        self._ends[run] = asyncio.get_running_loop().create_future()
        params = SamplingParams(max_tokens=ask.tokens, seed=ask.seed, ignore_eos=True)
        self._channel.send(wire.Start(run, list(prompt), params, False))
        await self._ends[run]
        return answer

    async def _read(self) -> None:
        while (message := await self._channel.receive()) is not None:
            now = time.monotonic()
            assert isinstance(message, wire.Step), message
            for token in message.tokens:
                answer = self._answers[token.run]
                answer.first = answer.first or now
                answer.times.append(now)
                if token.finish is not None:
                    answer.finish, answer.done, answer.ended = token.finish, True, now
                    self._ends[token.run].set_result(None)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
