"""The gateway without HTTP: who is let in, what runs for whom, and the figures of it.

    service = Service(settings)
    tasks = service.begin()                                    # the link to the worker, the clock of the queue
    ticket = service.knock(identity, size)                     # before the body is read
    job = service.open(name, ticket, asked)                    # it waits, then runs
    service.close(name)                                        # always, at the end

All refusals are `Refusal`s. One event loop, no threads but that of the books (`books/`), which write down what a
request may cost when it is opened and what it did cost when it is closed.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from sputnik.serve import wire
from sputnik.serve.admission import Admission, Full, Limits, Place, Ticket
from sputnik.serve.asking import Asking, Defaults
from sputnik.serve.board import Board
from sputnik.serve.books.books import Books, Tab
from sputnik.serve.generations import Asked, Job
from sputnik.serve.identity import Identity, Keyring
from sputnik.serve.link import Link
from sputnik.serve.measures import Measures, Tally
from sputnik.serve.reading import Speech
from sputnik.serve.refusals import Refusal
from sputnik.serve.settings import GatewaySettings
from sputnik.text.tokenizer import Tokenizer

TICK = 0.25
"""Seconds between looks at the deadlines of those who wait."""
PROBE_SECONDS = 5.0
GOODBYE = 2.0
"""Seconds for telling those whose time is up."""
PROBE_KEPT = 1.0
"""Seconds that a probe's result holds."""
TEXTS, TEXTS_PER_KEY = 4, 2
"""Texts that are counted at a time, beside requests, which admission bounds."""
Name = tuple[str, str]
"""Account and request id."""


class Engine(Protocol):
    """Where answers come from: the link to our worker, or other servers (`upstreams/`)."""

    @property
    def died(self) -> int:
        """Workers that were lost."""

    @property
    def up(self) -> bool: ...

    async def run(self) -> None:
        """For ever."""

    async def probe(self) -> float:
        """Seconds a real token took; ConnectionError or TimeoutError without one."""

    async def figures(self) -> dict[str, float]: ...


class Work(Protocol):
    """What runs for a request: a `Job`, or an answer of another server."""

    @property
    def produced(self) -> int:
        """Tokens so far."""

    def start(self) -> None:
        """Its turn has come."""

    def answer_now(self) -> None: ...

    def fail(self, error: Refusal) -> None: ...

    def close(self) -> None: ...

    def tally(self) -> Tally: ...


@dataclass
class Open:
    """A request that has been let in."""

    job: Work
    ticket: Ticket
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    tab: Tab | None = None
    booked: bool = True
    """What it may cost is written down, if that is asked for."""


class Service:
    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.books: Books | None = None
        if settings.books is not None:
            prices = settings.books.prices
            self.books = Books(settings.books.url, settings.books.pepper, None if prices is None else Path(prices))
        self.keyring = Keyring.of(settings.keys, None if self.books is None else self.books.issued)
        self.admission = Admission(
            Limits(settings.queue, settings.queue_tokens, settings.per_key, settings.max_wait)
        )  # fmt: skip
        self.link = Link(settings.socket, self._joined, self.stepped)
        self.engine: Engine = self.link
        self.measures = Measures()
        self.board = Board(time.time())
        self.asking: Asking | None = None
        """There once a worker has been."""
        self.fingerprint = ""
        self.requests: dict[Name, Open] = {}
        self._by_ticket: dict[Ticket, Open] = {}
        self._texts: Counter[str] = Counter()
        """Being counted, by account."""
        self._probed: tuple[float, bool] = (0.0, False)
        self._probing: asyncio.Task[bool] | None = None
        self.closed: list[Callable[[Open, Tally], None]] = []
        """Who is told of each request that has ended."""
        self.turns = 0
        """Of the loop: while they go on, it is alive."""

    def begin(self) -> list["asyncio.Task[None]"]:
        tasks = [asyncio.create_task(self.engine.run()), asyncio.create_task(self._tick())]
        return tasks if self.books is None else [*tasks, asyncio.create_task(self.books.run(self._revoked))]

    # --- requests ---

    def check(self, identity: Identity, repeats: bool) -> None:
        """Whether it can be paid for; `repeats`: it may have been already."""
        if self.books is not None:
            self.books.check(identity, repeats)

    def knock(self, identity: Identity, size: int) -> Ticket:
        if self.asking is None and not (self.engine.up and self.engine is not self.link):
            what = "the model is being loaded" if self.engine is self.link else "no upstream answers now"
            self.measures.refused["loading"] += 1
            raise Refusal(503, what, code="loading", retry_after=5)
        try:
            return self.admission.knock(identity, size, time.monotonic())
        except Full as full:
            raise self._refusal(full) from None

    def open(self, name: Name, ticket: Ticket, asked: Sequence[Asked], seconds: float | None = None) -> Job:
        """Queue it; it runs when its turn comes."""
        assert self.asking is not None
        prompt = sum(len(each.prompt) for each in asked)
        answer = sum(each.params.max_tokens * each.params.n for each in asked)
        samples = sum(each.params.n for each in asked)
        job = Job(self.link, self.asking.speech, asked, None if seconds is None else time.monotonic() + seconds)
        self.enter(name, ticket, job, prompt, answer, samples, seconds, asked[0].model)
        return job

    def enter(
        self, name: Name, ticket: Ticket, work: Work, prompt: int, answer: int, samples: int, seconds: float | None,
        model: str = "",
    ) -> None:  # fmt: skip
        """The same for work of any kind, of so many tokens of prompt and at most of answer."""
        if name in self.requests:
            raise Refusal(400, f"request id {name[1]} is in use: send another x-request-id, or none")
        now = time.monotonic()
        request = Open(work, ticket, now)
        try:
            self.admission.enter(ticket, prompt, answer, samples, now, None if seconds is None else now + seconds)
            if self.books is not None:
                self._book(request, self.books, model or self.settings.name, prompt, answer)
        except (Full, Refusal) as error:
            self.admission.leave(ticket, now)  # at once: whoever is taken from the queue must have a request
            raise self._refusal(error) if isinstance(error, Full) else error from None
        self.requests[name] = self._by_ticket[ticket] = request
        self.pump()

    def _book(self, request: Open, books: Books, model: str, prompt: int, answer: int) -> None:
        """Our engine begins at once and is held back until the books have it; others begin only then."""
        identity, work = request.ticket.identity, request.job
        request.tab = books.open(identity, model, prompt, answer, work, lambda: self._booked(request))
        request.booked = False
        if isinstance(work, Job):
            work.held = True

    def _booked(self, request: Open) -> None:
        request.booked = True
        if isinstance(request.job, Job):
            request.job.release()
        elif request.started is not None and request.ticket in self._by_ticket:
            request.job.start()

    def close(self, name: Name) -> None:
        """It has ended, or nobody waits for it any more: what it held is free."""
        request = self.requests.pop(name, None)
        if request is None:
            return
        del self._by_ticket[request.ticket]
        request.job.close()
        tally = request.job.tally()
        self.measures.ended(tally, time.monotonic())
        request.ticket.whole = not {"aborted", "failed"}.intersection(tally.ends)
        if self.books is not None and request.tab is not None:
            self.books.close(request.tab)
        self.admission.leave(request.ticket, time.monotonic(), request.job.produced)
        for tell in self.closed:
            tell(request, tally)
        self.pump()

    def leave(self, ticket: Ticket) -> None:
        """It went no further than the door; one that was opened is ended by `close`."""
        if ticket not in self._by_ticket:
            self.admission.leave(ticket, time.monotonic())

    def place(self, name: Name) -> Place | None:
        """In the line; None once it runs."""
        request = self.requests[name]
        if request.ticket.state != "waiting":
            return None
        return self.admission.place(request.ticket, time.monotonic())

    def pump(self) -> None:
        """Start whose turn it is."""
        now = time.monotonic()
        for ticket in self.admission.take(now):
            request = self._by_ticket[ticket]
            request.started = now
            self.measures.queue.add(now - request.arrived)
            if request.booked or isinstance(request.job, Job):
                request.job.start()

    @contextmanager
    def counting(self, identity: Identity) -> Iterator[None]:
        """While the tokenizer works for somebody who wants nothing of the engine. Refusal 429 or 503: too many do."""
        if self._texts[identity.id] >= TEXTS_PER_KEY:
            raise self._refusal(Full("key", f"this key has {TEXTS_PER_KEY} long texts counted, its limit", 1.0))
        if self._texts.total() >= TEXTS:
            raise self._refusal(Full("server", f"{TEXTS} long texts are being counted", 1.0))
        self._texts[identity.id] += 1
        try:
            yield
        finally:
            self._texts[identity.id] -= 1
            self._texts += Counter()  # without those that have none

    # --- health ---

    async def ready(self) -> bool:
        """Whether a token comes out of the engine; asked by many, it is tried once a second."""
        if self.admission.closed is not None or not self.engine.up:
            return False
        at, found = self._probed
        if time.monotonic() - at < PROBE_KEPT:
            return found
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe())
        return await asyncio.shield(self._probing)

    async def _probe(self) -> bool:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self.engine.probe()
            found = True
        except (TimeoutError, ConnectionError):
            found = False
        self._probed = time.monotonic(), found
        return found

    async def drain(self, seconds: float) -> bool:
        """Let nobody in, and wait for those who are; True if all have ended."""
        self.admission.closed = "the server is shutting down"
        end = time.monotonic() + seconds
        while (self.requests or self.admission.door) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        late = list(self.requests.values())
        for request in late:
            request.job.fail(Refusal(503, "the server is shutting down", code="shutting_down", retry_after=5))
        end = time.monotonic() + GOODBYE
        while self.requests and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return not late

    @property
    def state(self) -> Literal["loading", "ready", "draining"]:
        if self.admission.closed is not None:
            return "draining"
        return "ready" if self.engine.up else "loading"

    def _revoked(self, account: str) -> None:
        for (owner, _), request in list(self.requests.items()):
            if owner == account:
                request.job.fail(Refusal(401, "this key has been revoked", code="invalid_api_key", retry=False))

    # --- what the link tells ---

    def _joined(self, hello: wire.Hello) -> None:
        if self.asking is None or self.fingerprint != hello.fingerprint:
            speech = Speech(Tokenizer.load(Path(hello.path)), hello.template, hello.context)
            defaults = Defaults(self.settings.temperature, self.settings.top_p, self.settings.max_tokens)
            self.asking = Asking(speech, defaults, self.settings.name)
            self.fingerprint = hello.fingerprint
        self.resized(hello.slots, hello.spare)

    def resized(self, slots: int, spare: int = 0) -> None:
        """So many answers can be written at once now."""
        self.admission.slots, self.admission.spare = slots, spare
        self.pump()

    def stepped(self, tokens: int) -> None:
        self.measures.tokens += tokens
        self.admission.produced(tokens, time.monotonic())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self.turns += 1
            if not self.engine.up:
                self.admission.slots = self.admission.spare = 0
            for ticket in self.admission.expire(time.monotonic()):
                late = Refusal(503, "its deadline passed while it waited", code="deadline", retry_after=5)
                self._by_ticket[ticket].job.fail(late)

    def _refusal(self, full: Full) -> Refusal:
        closed = self.admission.closed is not None
        code = "shutting_down" if closed else "rate_limit_exceeded" if full.whose == "key" else "overloaded"
        self.measures.refused[code] += 1
        return Refusal(429 if code == "rate_limit_exceeded" else 503, full.reason, code=code, retry_after=full.wait)
