"""What a request set going: its answers, fed by the engine, kept alive over the engine's death, ended when nobody asks.

    job = Job(link, speech, [asked, ...])
    job.start()
    while deltas := await job.deltas(): ...           # raises Refusal; empty at the end
    job.close()                                       # at any time: slots and memory are free at once

When a worker dies, what it had written is known here: the next worker gets prompt, tokens so far and the same seed, and
in the reproducible mode the rest is what it would have been. That is tried as long as it gets on; a request over which
workers die without a new token ends with an error that says so, and so does one whose next worker has another model.
"""

import asyncio
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sputnik.engine.params import SamplingParams
from sputnik.serve import wire
from sputnik.serve.link import Link
from sputnik.serve.measures import Tally
from sputnik.serve.reading import Answer, Delta, Speech, merged
from sputnik.serve.refusals import Refusal

PATIENCE = 300.0
"""Seconds that a broken answer waits for another worker: one that drains has its time, and a large model loads long."""
UNREAD = 128
"""Pieces that wait for a client who does not read, before they are joined."""


@dataclass(frozen=True)
class Asked:
    """One prompt, ready for the engine."""

    prompt: tuple[int, ...]
    params: SamplingParams
    """With a seed: without one nothing could go on."""
    in_thought: bool | None
    """Where the answer begins; None: plain text."""
    tools: Collection[str] | None = None
    one_call: bool = False
    salt: bytes = b""
    priority: int = 0
    model: str = ""
    """As the caller named it, for its price."""


class Job:
    """All answers to one request; several prompts are numbered through, n samples each."""

    def __init__(self, link: Link, speech: Speech, asked: Sequence[Asked], deadline: float | None = None) -> None:
        """`deadline`: a time of the monotonic clock, after which nobody wants the rest."""
        self.asked, self.deadline = asked, deadline
        self.arrived = time.monotonic()
        self.first: float | None = None
        """When the first token came."""
        self.held = False
        """No token leaves yet: what it may cost is not written down."""
        self.error: Refusal | None = None
        self._generations = [
            Generation(self, link, speech, each, sum(before.params.n for before in asked[:place]))
            for place, each in enumerate(asked)
        ]
        self.answers = [answer for each in self._generations for answer in each.answers]
        self.leaders = [each.answers[0] for each in self._generations]
        """The first answer to each prompt."""
        self._deltas: list[Delta] = []
        self._most = UNREAD
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def start(self) -> None:
        for each in self._generations:
            each.begin()

    async def deltas(self) -> list[Delta]:
        """What has come since the last call; waits for something. Empty: all have ended, or the job was closed."""
        while self.held or not self._deltas:
            if self.error is not None:
                raise self.error
            if self._closed or (self.done and not self.held):
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        found, self._deltas = self._deltas, []
        return found

    def release(self) -> None:
        self.held = False
        self._wake()

    @property
    def done(self) -> bool:
        return all(answer.finish is not None for answer in self.answers)

    @property
    def produced(self) -> int:
        """Tokens of all answers."""
        return sum(len(answer.ids) for answer in self.answers)

    def tally(self) -> Tally:
        return Tally(
            self.arrived, self.first, sum(len(each.prompt) for each in self.asked),
            sum(answer.cached for answer in self.leaders), self.produced,
            sum(answer.thought_tokens for answer in self.answers),
            tuple(answer.finish or "aborted" for answer in self.answers), self.asked[0].model,
        )  # fmt: skip

    def answer_now(self) -> None:
        """Close the thoughts: what comes next are the answers."""
        for each in self._generations:
            each.answer_now()

    def close(self) -> None:
        self._closed = True
        for each in self._generations:
            each.close()
        self._wake()

    def put(self, deltas: list[Delta]) -> None:
        if self.first is None:
            self.first = time.monotonic()
        if deltas:
            self._deltas += deltas
            if len(self._deltas) > self._most:
                self._deltas = merged(self._deltas)
                self._most = max(UNREAD, 2 * len(self._deltas))
            self._wake()
        elif self.done:
            self._wake()

    def fail(self, error: Refusal) -> None:
        """The whole request ends so, if it has not ended: a whole answer that is still being read stays one."""
        whole = self.done and not self.held and all(answer.finish != "failed" for answer in self.answers)
        if self.error is None and not self._closed and not whole:
            if self.produced:
                error.retry = False
            self.error = error
            for each in self._generations:
                each.close()
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Generation:
    """The samples of one prompt: one run, or after a worker's death one for each that is left."""

    def __init__(self, job: Job, link: Link, speech: Speech, asked: Asked, first: int) -> None:
        self._job, self._link, self._asked, self._first = job, link, asked, first
        self.answers = [
            Answer(speech, asked.params, asked.in_thought, asked.tools, first + place, asked.one_call)
            for place in range(asked.params.n)
        ]
        self._runs: dict[int, set[int]] = {}
        """Number -> samples that have not ended."""
        self._hurried = False
        self._fingerprint: str | None = None
        self._deaths = 0
        """Since the last new token."""
        self._had = 0
        self._recovery: asyncio.Task[None] | None = None

    def begin(self) -> None:
        if not self._begin():
            self._recover()

    def answer_now(self) -> None:
        self._hurried = True
        for run in self._runs:
            self._link.answer_now(run)

    def close(self) -> None:
        for run in list(self._runs):
            self._link.abort(run)
        self._runs.clear()
        if self._recovery is not None:
            self._recovery.cancel()

    # --- what the link tells ---

    def token(self, token: wire.Token) -> None:
        place = token.sample
        answer = self.answers[place]
        deltas = answer.feed(token)
        if answer.finish == "failed":
            message = "the answer failed: its logits are not finite, or its grammar leaves no way on"
            self._job.fail(Refusal(500, message, code="generation_failed"))
            return
        if answer.finish is not None:
            if token.finish is None:
                self._link.end(token.run, place)
            left = self._runs[token.run]
            left.discard(place)
            if not left:
                del self._runs[token.run]
                self._link.done(token.run)
        self._job.put(deltas)

    def refused(self, message: wire.Refused) -> None:
        known = self._runs.pop(message.run, None) is not None
        if not message.draining:
            self._job.fail(Refusal(400, message.reason))
        elif known and self._recovery is None:
            self._recover()

    def lost(self, run: int) -> None:
        if self._runs.pop(run, None) is not None and self._recovery is None:
            self._recover()

    # --- beginning, and beginning again ---

    @property
    def _written(self) -> int:
        return sum(len(answer.ids) for answer in self.answers)

    def _begin(self) -> bool:
        """Start what has not ended; False: there is no worker."""
        hello = self._link.hello
        if hello is None:
            return False
        if self._fingerprint not in (None, hello.fingerprint) and self._written:
            self._give_up("the engine was lost, and the one in its place has another model")
            return True
        self._fingerprint = hello.fingerprint
        left = {place for place, answer in enumerate(self.answers) if answer.finish is None}
        if not self._written:
            self._run(left, None, ())
        else:
            for place in sorted(left):
                self._run({place}, place, self.answers[place].ids)
        return True

    def _run(self, places: set[int], sample: int | None, written: Sequence[int]) -> None:
        asked, number, deadline = self._asked, self._link.number(), self._job.deadline
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        start = wire.Start(
            number, list(asked.prompt), asked.params, bool(asked.in_thought), asked.salt, asked.priority,
            seconds, sample, list(written),
        )  # fmt: skip
        self._runs[number] = places
        self._link.start(start, self)
        if self._hurried:
            self._link.answer_now(number)

    def _recover(self) -> None:
        self._recovery = asyncio.create_task(self._go_on())

    async def _go_on(self) -> None:
        """Wait for a worker and begin again; give up when that has led nowhere."""
        try:
            if self._fingerprint is not None:  # it had begun
                self._deaths = self._deaths + 1 if self._written == self._had else 1
                self._had = self._written
                if self._deaths > (3 if self._written else 1):
                    self._give_up("the engine died over this request more than once")
                    return
            left = math.inf if self._job.deadline is None else max(0.0, self._job.deadline - time.monotonic())
            try:
                async with asyncio.timeout(min(PATIENCE, left)):
                    while not self._begin():
                        await self._link.back.wait()
            except TimeoutError:
                self._give_up(f"the engine was lost and did not come back within {min(PATIENCE, left):.0f} s")
        finally:
            self._recovery = None

    def _give_up(self, reason: str) -> None:
        self._job.fail(Refusal(503, reason, code="engine_lost", retry_after=5))
