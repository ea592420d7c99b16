"""The engine's side of the wire: requests in, one step at a time, tokens out. One thread, the one that computes.

    desk = Desk(llm)
    desk.post(peer, start, desk.prepare(start))       # from any thread; so are `post(peer, message)` and `leave(peer)`
    desk.run()                                        # steps until `drain`

A peer is whoever asked: it gets its tokens by `peer.post(message)`, which must not wait. What goes wrong with one
request is told to its peer and to nobody else; an exception out of a step is ours, and ends the process. Left out:
sockets (`worker.py`) and text (`reading.py`).
"""

import queue
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.engine.sample import Event, Request, Sample
from sputnik.engine.sampling import sample_seed
from sputnik.engine.thinking import Finish
from sputnik.errors import SputnikError
from sputnik.serve import wire
from sputnik.text.chat import Prompt

PROBE = SamplingParams(max_tokens=1, temperature=0)


class Peer(Protocol):
    def post(self, message: wire.Message) -> None:
        """From the engine's thread, without waiting."""


@dataclass(eq=False)
class _Run:
    peer: Peer
    id: int
    first: int
    """What the peer calls the first sample."""
    samples: list[Sample]
    seq: int = 0
    told: dict[int, int] = field(default_factory=dict)
    """Sample -> tokens told; gone when its end is told."""


@dataclass(eq=False)
class _Trial:
    """A probe under way."""

    peer: Peer
    number: int
    begun: float


@dataclass(frozen=True)
class _Left:
    peer: Peer


@dataclass(frozen=True)
class _Drain:
    until: float


_Job = tuple[Peer, wire.FromGateway, Request | None] | _Left | _Drain


class Desk:
    def __init__(self, llm: LLM) -> None:
        self.llm, self._engine = llm, llm.engine
        self.steps = 0
        """Of the scheduler, for the heart-beat."""
        self._inbox: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._runs: dict[int, _Run] = {}
        self._numbers: dict[tuple[Peer, int], int] = {}
        self._trials: dict[int, _Trial] = {}
        self._until: float | None = None
        self._probe = llm.request("a", PROBE)

    @property
    def busy(self) -> int:
        """Runs under way."""
        return len(self._runs) + len(self._trials)

    @property
    def draining(self) -> bool:
        return self._until is not None

    # --- from other threads ---

    def prepare(self, start: wire.Start) -> Request:
        """The engine's request: the dear part of a start, grammars. Call it from one thread, not the engine's."""
        params = start.params
        if start.sample is not None and params.seed is not None:
            params = replace(params, n=1, seed=sample_seed(params.seed, start.sample))
        request = self.llm.request(Prompt(tuple(start.prompt), start.in_thought), params)
        deadline = None if start.seconds is None else self._engine.clock() + start.seconds
        return replace(
            request, priority=start.priority, deadline=deadline, salt=start.salt, written=tuple(start.written)
        )

    def post(self, peer: Peer, message: wire.FromGateway, request: Request | None = None) -> None:
        """Hand a message to the engine's thread; a `Start` with what `prepare` made of it."""
        self._inbox.put((peer, message, request))

    def leave(self, peer: Peer) -> None:
        """The peer has gone: what runs for it is ended."""
        self._inbox.put(_Left(peer))

    def drain(self, seconds: float) -> None:
        """Begin nothing more; `run` returns when all is done or the time is up. A signal handler may call it."""
        self._inbox.put(_Drain(time.monotonic() + seconds))

    # --- the engine's thread ---

    def run(self) -> None:
        while not self._over():
            self._take()
            self._tell(self._engine.step())
            self.steps += 1

    def _over(self) -> bool:
        if self._until is None:
            return False
        return not self.busy or time.monotonic() > self._until

    def _take(self) -> None:
        """All that has come in; waits for something if there is nothing to compute."""
        wait = not self._engine.busy
        try:
            while True:
                job = self._inbox.get(block=wait, timeout=0.5 if self.draining else None)
                wait = False
                if isinstance(job, _Drain):
                    self._until = job.until
                elif isinstance(job, _Left):
                    for peer, run in [key for key in self._numbers if key[0] is job.peer]:
                        self._abort(peer, run)
                else:
                    self._do(*job)
        except queue.Empty:
            return

    def _do(self, peer: Peer, message: wire.FromGateway, request: Request | None) -> None:
        match message:
            case wire.Start():
                assert request is not None
                self._start(peer, message, request)
            case wire.Abort():
                self._abort(peer, message.run)
            case wire.End():
                self._end(peer, message)
            case wire.AnswerNow():
                self._engine.answer_now(self._numbers.get((peer, message.run), -1))
            case wire.Probe():
                number = self._engine.add(replace(self._probe, priority=-1))
                self._trials[number] = _Trial(peer, message.number, time.monotonic())
            case wire.Ask():
                values = self._engine.metrics.read() | {"runs": float(len(self._runs))}
                peer.post(wire.Figures(message.number, values))
            case wire.Join():
                pass

    def _start(self, peer: Peer, start: wire.Start, request: Request) -> None:
        if self.draining or (peer, start.run) in self._numbers:
            reason = "the server is shutting down" if self.draining else f"run {start.run} is under way"
            peer.post(wire.Refused(start.run, reason, draining=self.draining))
            return
        try:
            number = self._engine.add(request)
        except SputnikError as error:
            peer.post(wire.Refused(start.run, " ".join(str(error).split())))
            return
        samples = self._engine.samples(number)
        told = dict.fromkeys(range(len(samples)), 0)
        self._runs[number] = _Run(peer, start.run, start.sample or 0, samples, told=told)
        self._numbers[peer, start.run] = number

    def _abort(self, peer: Peer, run: int) -> None:
        number = self._numbers.pop((peer, run), None)
        if number is not None:
            del self._runs[number]
            self._engine.abort(number)

    def _end(self, peer: Peer, end: wire.End) -> None:
        number = self._numbers.get((peer, end.run))
        if number is None:
            return
        run = self._runs[number]
        place = end.sample - run.first
        if run.told.pop(place, None) is not None:
            self._engine.end(run.samples[place], "stop")
        self._forget(number, run)

    def _tell(self, events: Iterable[Event]) -> None:
        told: dict[Peer, list[wire.Token]] = {}
        for event in events:
            run = self._runs.get(event.request)
            if run is not None:
                if event.sample in run.told:
                    told.setdefault(run.peer, []).extend(_tokens(run, event))
                if event.finish is not None:
                    told.setdefault(run.peer, []).extend(_silent(run))
                    self._forget(event.request, run)
            elif (trial := self._trials.pop(event.request, None)) is not None:
                trial.peer.post(wire.Probed(trial.number, time.monotonic() - trial.begun))
        for peer, tokens in told.items():
            peer.post(wire.Step(self.steps, tokens))

    def _forget(self, number: int, run: _Run) -> None:
        if not run.told:
            del self._runs[number], self._numbers[run.peer, run.id]


def _tokens(run: _Run, event: Event) -> Iterable[wire.Token]:
    """Those of an event, the last with its end; an end without a token is one as well."""
    sample, last = event.of, len(event.ids) - 1
    scored = sample.params.logprobs is not None
    for at, id in enumerate(event.ids or [None]):
        place, finish = run.told[event.sample], event.finish if at >= last else None
        top = sample.top[place] if id is not None and len(sample.top) > place else None
        closed_by = sample.control.closed_by if finish and sample.control else None
        logprob = sample.logprobs[place] if scored and id is not None else None
        yield wire.Token(
            run.id, run.seq, run.first + event.sample, id, finish, 0 if place else sample.sequence.cached, closed_by,
            logprob, top,
        )  # fmt: skip
        run.seq += 1
        if finish is None:
            run.told[event.sample] = place + 1
        else:
            del run.told[event.sample]


def _silent(run: _Run) -> Iterable[wire.Token]:
    """Samples that ended with another one and cause no event of their own: they never began."""
    for place in [each for each in run.told if run.samples[each].finish is not None and not run.samples[each].written]:
        finish: Finish | None = run.samples[place].finish
        del run.told[place]
        yield wire.Token(run.id, run.seq, run.first + place, None, finish)
        run.seq += 1
