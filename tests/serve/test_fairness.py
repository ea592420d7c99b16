"""One key's many calls beside another's few, on a clock of our own: admission and scheduler are the real ones.

Steps cost as those of the engine of fixed speed do (benchmarks/serving/paced_engine.py); the gateway costs nothing.
"""

import heapq
import random
from typing import Any

import pytest

from benchmarks.serving.load import quantile
from benchmarks.serving.paced_engine import PROMPT_TOKEN
from sputnik.engine.blocks import BlockPool
from sputnik.engine.scheduler import Scheduler
from sputnik.engine.sequence import Limits as Room
from sputnik.engine.sequence import Sequence
from sputnik.serve.admission import Admission, Limits, Ticket
from sputnik.serve.identity import Identity
from sputnik.serve.worker import CHUNK

STEP, SLOTS, SPARE = 0.05, 8, 2
GREEDY, OTHER = Identity("greedy"), Identity("other")


class Server:
    """`parallel` calls of one key at any time; one after the other of another key, prompts of so many tokens."""

    def __init__(self, parallel: int, prompt: int) -> None:
        self.dice, self.prompt, self.now = random.Random(1), prompt, 0.0
        self.queue = Admission(Limits(per_key=1000))
        self.queue.slots, self.queue.spare = SLOTS, SPARE
        self.scheduler = Scheduler(BlockPool(4000, 16), Room(2048, SLOTS + SPARE + 1, CHUNK))
        self.due: list[tuple[float, int, Identity]] = [(0.0, each, GREEDY) for each in range(parallel)]
        heapq.heappush(self.due, (3.0, parallel, OTHER))
        self.runs: dict[int, tuple[Ticket, float]] = {}
        self.last: dict[int, float] = {}
        self.first, self.gaps = list[float](), list[float]()
        self._came: dict[Ticket, float] = {}
        self._numbers = iter(range(10**9))

    def run(self, answers: int) -> "Server":
        """Until the other key has had so many first tokens."""
        while len(self.first) < answers:
            while self.due and self.due[0][0] <= self.now:
                self._come(*heapq.heappop(self.due)[::2])
            for ticket in self.queue.take(self.now):
                self._start(ticket)
            if self.scheduler.busy:
                self._step()
            else:
                self.now = self.due[0][0]
        return self

    def _come(self, due: float, who: Identity) -> None:
        ticket = self.queue.knock(who, 100, self.now)
        prompt, answer = (self.prompt, 4) if who is OTHER else (5, 20)
        self.queue.enter(ticket, prompt, answer, 1, self.now)
        self._came[ticket] = due

    def _start(self, ticket: Ticket) -> None:
        tokens = self.dice.choices(range(1000), k=ticket.prompt)  # in no cache
        sequence = Sequence(next(self._numbers), tokens, ticket.prompt + ticket.answer, arrival=self.now)
        self.scheduler.add(sequence)
        self.runs[sequence.id] = ticket, self._came.pop(ticket)

    def _step(self) -> None:
        works = self.scheduler.schedule(self.now).works
        written = [work.sequence for work in works if work.complete]
        self.now += STEP * (1 + PROMPT_TOKEN * (sum(work.count for work in works) - len(written)))
        for work in works:
            self.scheduler.done(work)
        self.queue.produced(len(written), self.now)
        for sequence in written:
            self.scheduler.append(sequence, 0)
            self._told(sequence, *self.runs[sequence.id])

    def _told(self, sequence: Any, ticket: Ticket, due: float) -> None:
        who, told = ticket.identity, len(sequence.tokens) - ticket.prompt
        if who is GREEDY and told > 1:
            self.gaps.append(self.now - self.last[sequence.id])
        elif who is OTHER and told == 1:
            self.first.append(self.now - due)
        self.last[sequence.id] = self.now
        if told == ticket.answer:
            self.scheduler.finish(sequence)
            self.queue.leave(ticket, self.now, told)
            del self.runs[sequence.id]
            pause = self.dice.uniform(0, 0.4) if who is OTHER else 0.001
            heapq.heappush(self.due, (self.now + pause, sequence.id, who))


@pytest.mark.parametrize("prompt", [500, 1000, 2000])
def test_two_hundred_calls_of_one_key_hardly_delay_the_first_token_of_another(prompt: int) -> None:
    alone, beside = Server(0, prompt).run(60), Server(200, prompt).run(60)
    ratio = quantile(beside.first, 0.95) / quantile(alone.first, 0.95)
    assert 1 < ratio < 1.35
    assert quantile(beside.gaps, 0.99) < 6 * STEP, "and the others' tokens come on"
