"""A pretended engine for the tests of the scheduler: it writes, copies and reads every cache slot and trusts nothing.

A slot holds the hash of all tokens up to its own (and of the salt), so a block that was shared wrongly, written twice,
copied late or kept after its drafts were rejected shows as a wrong history on the next read.
"""

import random
from collections.abc import Sequence as Tokens
from zlib import crc32

import pytest

from sputnik.engine.blocks import BlockPool
from sputnik.engine.scheduler import Scheduler
from sputnik.engine.sequence import Limits, Plan, Sequence, Work

VOCABULARY = 5


def histories(salt: bytes, tokens: Tokens[int]) -> list[int]:
    """What the cache slot of each token must hold."""
    result, history = [], crc32(salt)
    for token in tokens:
        history = hash((history, token))
        result.append(history)
    return result


class PretendEngine:
    """Runs plans on a dictionary, checks each read and write, and generates to `max_length`."""

    def __init__(
        self, blocks: int = 16, size: int = 4, drafts: int = 0, forces: int = -1, stride: int = 1, **limits: float
    ) -> None:
        defaults: dict[str, float] = {"max_tokens_per_step": 24, "max_running": 8, "chunk": 8, "reserve": 0}
        self.pool = BlockPool(blocks, size, key=b"test")
        self.scheduler = Scheduler(self.pool, Limits(**(defaults | limits)))  # type: ignore[arg-type]
        self.memory: dict[int, int] = {}
        self.drafts, self.forces, self.stride = drafts, forces, stride
        self.now, self.computed = 0.0, 0
        self.random = random.Random(0)
        self.followers: dict[int, list[Sequence]] = {}
        self.finished: list[Sequence] = []
        self.ids = iter(range(10**9))

    def add(self, prompt: Tokens[int], answer: int = 3, n: int = 1, **options: object) -> Sequence:
        make = [
            Sequence(next(self.ids), list(prompt), len(prompt) + answer, **options)  # type: ignore[arg-type]
            for _ in range(n)
        ]
        self.scheduler.add(make[0])
        self.followers[make[0].id] = make[1:]
        return make[0]

    def following(self, last: int, history: int, sample: int) -> int:
        """The "model": a function of the history and the sample's number. After the token `forces`, 3 is forced."""
        return 3 if last == self.forces else hash((history, sample)) % VOCABULARY

    def cold(self, prompt: Tokens[int], max_length: int, sample: int, salt: bytes) -> list[int]:
        """The answer of the model without any cache."""
        tokens, history = list(prompt), histories(salt, prompt)[-1]
        while len(tokens) < max_length:
            tokens.append(self.following(tokens[-1], history, sample))
            history = hash((history, tokens[-1]))
        return tokens

    def slot(self, sequence: Sequence, index: int) -> int:
        return sequence.blocks[index // self.pool.size] * self.pool.size + index % self.pool.size

    def step(self, *aborted_meanwhile: int) -> Plan:
        plan = self.scheduler.schedule(self.now)
        assert sum(work.count for work in plan.works) <= self.scheduler.limits.max_tokens_per_step
        assert len({work.sequence.id for work in plan.works}) == len(plan.works)
        assert all(s.deadline is not None and s.deadline <= self.now and not s.blocks for s in plan.expired)
        self.copy(plan.copies)
        if self.strides(plan.works):
            for id in aborted_meanwhile:
                self.scheduler.abort(id)
            return plan
        written: dict[int, int] = {}
        for work in plan.works:
            self.compute(work, written)
        for id in aborted_meanwhile:
            self.scheduler.abort(id)
        for work in plan.works:
            self.advance(work)
        return plan

    def strides(self, works: list[Work]) -> bool:
        """Several tokens at once, where the scheduler has blocks for them; false: an ordinary step is due."""
        plain = works and all(work.count == 1 and work.complete and work.sequence.decoding for work in works)
        wanted = plain and self.stride > 1 and not self.drafts
        steps = self.stride if wanted and self.scheduler.reserve(works, self.stride) else 1
        written: dict[int, int] = {}
        for work in works if steps > 1 else ():
            sequence, drawn = work.sequence, list[int]()
            for place in range(work.start, min(work.start + self.random.randint(1, steps), sequence.max_length - 1)):
                block = sequence.blocks[place // self.pool.size]
                assert self.pool.holders(block) == 1 and self.pool._digests[block] is None
                assert written.setdefault(block, sequence.id) == sequence.id
                before = histories(sequence.salt, [*sequence.tokens, *drawn][: place + 1])
                for index in range(place):
                    assert self.memory[self.slot(sequence, index)] == before[index]
                self.memory[self.slot(sequence, place)] = before[-1]
                drawn.append(self.following([*sequence.tokens, *drawn][place], before[-1], sequence.id))
            self.scheduler.strode(work, drawn)
            if len(sequence.tokens) == sequence.max_length:
                self.scheduler.finish(sequence)
                self.finished.append(sequence)
        return steps > 1

    def copy(self, copies: list[tuple[int, int]]) -> None:
        """One after the other; all reads before all writes must give the same."""
        size = self.pool.size
        cells = [(a * size + i, b * size + i) for a, b in copies for i in range(size)]
        at_once = self.memory | {b: self.memory.get(a, 0) for a, b in cells}
        for source, copy in cells:
            self.memory[copy] = self.memory.get(source, 0)
        assert self.memory == at_once

    def compute(self, work: Work, written: dict[int, int]) -> None:
        sequence, end = work.sequence, work.start + work.count
        assert work.count > 0 and sequence.state == "running"
        expected = histories(sequence.salt, sequence.tokens[:end])
        for index in range(work.start):
            assert self.memory[self.slot(sequence, index)] == expected[index], f"token {index} of {sequence.id}"
        for index in range(work.start, end):
            block = sequence.blocks[index // self.pool.size]
            assert self.pool.holders(block) == 1, "a shared block is never written"
            assert self.pool._digests[block] is None, "nor one that is offered for reuse"
            assert written.setdefault(block, sequence.id) == sequence.id, "no block has two writers"
            self.memory[self.slot(sequence, index)] = expected[index]
        self.computed += work.count

    def advance(self, work: Work) -> None:
        """What the real engine does with the logits: check drafts, draw, fork, draft, finish."""
        sequence, complete = work.sequence, work.complete
        self.scheduler.done(work)
        if not complete or sequence.state == "gone":
            return
        tokens, history = sequence.tokens, histories(sequence.salt, sequence.tokens)
        if sequence.drafts:
            first = len(tokens) - sequence.drafts
            right = first
            while right < len(tokens) and tokens[right] == self.following(
                tokens[right - 1], history[right - 1], sequence.id
            ):
                right += 1
            self.scheduler.rollback(sequence, len(tokens) - right)
        for follower in self.followers.pop(sequence.id, []):
            if self.scheduler.fork(sequence, follower):
                self.go_on(follower, history)
        self.go_on(sequence, history)

    def go_on(self, sequence: Sequence, history: list[int]) -> None:
        tokens = sequence.tokens
        if len(tokens) < sequence.max_length:
            self.scheduler.append(sequence, self.following(tokens[-1], history[len(tokens) - 1], sequence.id))
        while tokens[-1] == self.forces and len(tokens) < sequence.max_length:
            self.scheduler.append(sequence, 3)
        if len(tokens) == sequence.max_length:
            self.scheduler.finish(sequence)
            self.finished.append(sequence)
        elif self.drafts:
            right = self.cold(tokens, len(tokens) + self.drafts, sequence.id, sequence.salt)[len(tokens) :]
            self.scheduler.draft(sequence, [t if self.random.random() < 0.7 else (t + 1) % VOCABULARY for t in right])

    def run(self) -> list[Sequence]:
        """To the end, within the bound of the docstring of `Scheduler`; every answer is the one of a model without
        cache, and every block is back."""
        live = self.scheduler._sequences.values()
        bound = sum(2 * (s.max_length + 1) * (1 + len(self.followers.get(s.id, []))) for s in live)
        for _ in range(bound):
            if not self.scheduler.busy:
                break
            self.step()
        assert not self.scheduler.busy, f"{self.scheduler.figures} after {bound} steps"
        assert self.pool.used == 0 and self.pool.free == self.pool.blocks
        assert len(set(self.pool._empty) | set(self.pool._idle)) == self.pool.blocks
        for sequence in self.finished:
            prompt = sequence.tokens[: sequence.prompt_length]
            assert sequence.tokens == self.cold(prompt, sequence.max_length, sequence.id, sequence.salt)
        return self.finished


@pytest.fixture(scope="session")
def pretend() -> type[PretendEngine]:
    """The class: `pretend(blocks=16)` is an engine."""
    return PretendEngine
