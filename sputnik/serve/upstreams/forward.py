"""One request on its way through an upstream: the `Work` of a service that has no worker.

    forward = Forward(fleet, "/chat/completions", wish, seconds)
    forward.start()                                # its turn has come
    while frames := await forward.more(): ...      # chunks, or one reply, for the client; raises Refusal
    forward.usage                                  # as the upstream told it, or a guess that says so
    forward.close()                                # at any time: the upstream is let go at once

What fails before its first token is tried on another replica, once; what fails after it ends with an error that says
so. A replica that goes down gives back what has no token yet.
"""

import asyncio
import time
from typing import Any

import httpx2
import msgspec

from sputnik.serve.measures import Tally
from sputnik.serve.refusals import TYPES, Refusal
from sputnik.serve.upstreams.events import Events
from sputnik.serve.upstreams.fleet import BUSY, Fleet, Replica, read_object
from sputnik.serve.upstreams.plain import (
    Wish,
    brings_text,
    cached_tokens,
    choices,
    completed,
    count,
    says_something,
    thought_tokens,
    told,
)  # fmt: skip

BACKLOG = 256
"""Chunks that wait for a slow client before the upstream has to."""


class Failed(Exception):
    """A try that came to nothing; `sick`: it speaks against the replica."""

    def __init__(self, reason: str, refusal: Refusal | None = None, sick: bool = True) -> None:
        super().__init__(reason)
        self.sick = sick
        self.refusal = refusal or Refusal(503, f"the upstream failed: {reason}", code="upstream_failed", retry_after=5)


class Forward:
    def __init__(
        self, fleet: Fleet, path: str, wish: Wish, seconds: float | None, trace: dict[str, str] | None = None
    ) -> None:
        """`trace`: headers by which the upstream joins our trace."""
        self._fleet, self._path, self._wish = fleet, path, wish
        self._headers = trace or {}  # and no x-request-id: some take none but UUIDs
        self.arrived = time.monotonic()
        self._end = None if seconds is None else self.arrived + seconds
        self.first: float | None = None
        self.error: Refusal | None = None
        self.worker = ""
        """The replica that answered."""
        self._ready: list[dict[str, Any]] = []
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._over = False
        self._task: asyncio.Task[None] | None = None
        self._scope: asyncio.Timeout | None = None
        self._usage: dict[str, Any] = {}
        self._chunks = 0
        self._roles: dict[int, str] = {}
        self._ends: dict[int, str] = {}

    # --- work ---

    @property
    def produced(self) -> int:
        return count(self._usage, "completion_tokens") or self._chunks

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def answer_now(self) -> None:
        raise Refusal(400, "an upstream answers: its thoughts cannot be closed from here", code="not_offered")

    def fail(self, error: Refusal) -> None:
        if self.error is None and not self._over:
            if self.first is not None:
                error.retry = False
            self.error = error
            self.close()

    def close(self) -> None:
        self._over = True
        if self._task is not None:
            self._task.cancel()
        self._news.set()

    def tally(self) -> Tally:
        ends = [self._ends.get(sample, "aborted") for sample in range(self._wish.samples)]
        prompt = count(self._usage, "prompt_tokens") or (self._wish.prompt if self.produced else 0)
        thought = thought_tokens(self._usage)
        return Tally(
            self.arrived, self.first, prompt, cached_tokens(self._usage), self.produced, thought, tuple(ends),
            self._wish.model, self.worker,
        )  # fmt: skip

    async def more(self) -> list[dict[str, Any]]:
        """What has come since the last call, waited for; empty at the end."""
        while not self._ready:
            if self.error is not None:
                raise self.error
            if self._over:
                return []
            self._news.clear()
            await self._news.wait()
        found, self._ready = self._ready, []
        self._room.set()
        return found

    @property
    def usage(self) -> dict[str, Any]:
        prompt, written = self._wish.prompt, self._chunks
        guess = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
        return completed(self._usage or guess | {"estimated": True})

    # --- tries ---

    async def _run(self) -> None:
        tried: list[Replica] = []
        try:
            while True:
                replica = self._fleet.choose(self._wish.model, self._wish.prefix, tried)
                tried.append(replica)
                self.worker = replica.name
                try:
                    with replica.carrying(self, self._wish.answer):
                        await self._try(replica)
                    self._fleet.worked(replica, "answer")
                    break
                except Failed as failed:
                    if failed.sick:
                        self._fleet.failed(replica, "answer", str(failed))
                    self._check_again(failed, tried)
        except Refusal as refusal:
            self.fail(refusal)
        finally:
            self._over = True
            self._news.set()

    def _check_again(self, failed: Failed, tried: list[Replica]) -> None:
        """Refusal unless another replica may try."""
        if self.first is not None:
            text = f"the upstream was lost in the middle of its answer: {failed}"
            raise Refusal(503, text, code="upstream_lost", retry=False)
        if len(tried) > 1:
            raise failed.refusal
        try:
            self._fleet.trusted(self._wish.model, tried)
        except Refusal:
            raise failed.refusal from None

    def fallen(self) -> None:
        if self.first is None and self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    def _patience(self, seconds: float) -> float:
        """Until when, on the loop's clock; no longer than the request's own deadline."""
        left = seconds if self._end is None else min(seconds, self._end - time.monotonic())
        return asyncio.get_running_loop().time() + left

    async def _try(self, replica: Replica) -> None:
        wish, settings = self._wish, self._fleet.settings
        body = msgspec.json.encode(wish.fields | {"model": self._fleet.own_name(replica, wish.model)})
        try:
            async with (
                asyncio.timeout_at(self._patience(settings.first if wish.stream else settings.whole)) as self._scope,
                self._fleet.ask(replica, self._path, body, self._headers) as response,
            ):
                if response.status_code != 200:
                    await _refused(response)
                elif wish.stream:
                    await self._stream(response)
                else:
                    await self._whole(response)
        except TimeoutError:
            if self._end is not None and time.monotonic() >= self._end:
                raise Refusal(503, "its deadline passed", code="deadline") from None
            raise Failed("it fell silent") from None
        except httpx2.HTTPError as error:  # whose text may quote what came
            raise Failed(type(error).__name__) from None
        except ValueError as error:
            raise Failed(str(error)) from None
        finally:
            self._scope = None

    async def _whole(self, response: httpx2.Response) -> None:
        frame = await read_object(response)
        if not choices(frame):
            raise ValueError("its reply has no choices")
        self._note(frame)
        self._fleet.stepped(self.produced)
        self._ready.append(told(frame, self._wish))

    async def _stream(self, response: httpx2.Response) -> None:
        events = Events()
        async for piece in response.aiter_bytes():
            for data in events.feed(piece):
                if data.strip() == b"[DONE]":
                    await self._last()
                    return
                await self._chunk(_frame(data))
            assert self._scope is not None
            if self.first is not None:
                self._scope.reschedule(self._patience(self._fleet.settings.stall))
        await self._last()

    async def _chunk(self, frame: dict[str, Any]) -> None:
        if frame.get("error"):
            refused = Refusal(503, f"the upstream failed: {_message(frame)}", code="upstream_failed", retry_after=5)
            raise Failed("it sent an error", refused)
        self._note(frame)
        found = choices(frame)
        for choice in found:
            self._hold_role(choice)
        said = [choice for choice in found if says_something(choice)]
        if not said:
            return  # a role alone, or usage: that comes last
        if self.first is None:
            self.first = time.monotonic()
        tokens = sum(brings_text(choice) for choice in said)
        self._chunks += tokens
        self._fleet.stepped(tokens)
        frame = {name: value for name, value in frame.items() if name != "usage"}
        await self._put(told(frame | {"choices": said}, self._wish))

    def _note(self, frame: dict[str, Any]) -> None:
        self._frame = {name: frame.get(name) for name in ("id", "object", "created")}
        if isinstance(frame.get("usage"), dict):
            self._usage = frame["usage"]
        for place, choice in enumerate(choices(frame)):
            if choice.get("finish_reason") is not None:
                self._ends[count(choice, "index") if "index" in choice else place] = str(choice["finish_reason"])

    def _hold_role(self, choice: dict[str, Any]) -> None:
        """The first chunk that goes out brings a token, and the role with it."""
        delta, index = choice.get("delta"), count(choice, "index")
        if not isinstance(delta, dict):
            return
        if isinstance(delta.get("role"), str):
            self._roles.setdefault(index, delta["role"])
        if says_something(choice) and self._roles.get(index):
            delta["role"], self._roles[index] = self._roles[index], ""

    async def _last(self) -> None:
        """The usage, if it is asked for. ValueError: there was no end, whatever the stream says."""
        if len(self._ends) < self._wish.samples:
            raise ValueError("its stream ended before the answer")
        if self._wish.usage:
            await self._put(self._frame | {"model": self._wish.model, "choices": [], "usage": self.usage})

    async def _put(self, frame: dict[str, Any]) -> None:
        self._ready.append(frame)
        self._news.set()
        while len(self._ready) > BACKLOG:
            self._room.clear()
            await self._room.wait()


def _frame(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError("a chunk that is no JSON object") from None


def _message(frame: dict[str, Any]) -> str:
    error = frame.get("error")
    found = error.get("message") if isinstance(error, dict) else error
    return str(found or frame.get("message") or frame.get("detail") or "no reason given")[:500]


async def _refused(response: httpx2.Response) -> None:
    """Raises: the client's own mistake as it is, all else as ours."""
    status = response.status_code
    try:
        frame = await read_object(response)
    except ValueError:
        frame = {}
    if status in BUSY:
        after = response.headers.get("retry-after", "")
        wait = float(after) if after.isdigit() else 5.0
        busy = Refusal(503, "the upstream is busy", code="overloaded", retry_after=min(wait, 600))
        raise Failed("it is busy", busy, sick=False)
    if status in (401, 402, 403):
        text = "the upstream refuses this gateway's key: its operator has to mend that"
        refused = Refusal(503, text, code="upstream_key", retry_after=60)
        raise Failed(f"it refuses our key with status {status}", refused)
    if 400 <= status < 500:
        error = frame.get("error")
        param = error.get("param") if isinstance(error, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        raise Refusal(
            status if status in TYPES else 400, _message(frame), code=code if isinstance(code, str) else None,
            param=param if isinstance(param, str) else None,
        )  # fmt: skip
    raise Failed(f"it answered with status {status}")
