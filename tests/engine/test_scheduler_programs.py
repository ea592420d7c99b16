"""Random programs: whatever is added, drafted, forked, aborted and preempted, no block leaks and every answer is right.

The pretended engine checks each step: every slot that is read holds what a model without cache would have there, and
no block that is written has a second holder, a second writer or is offered for reuse. After every rule here the books
are checked; at the end everybody who is left finishes within the bound and the pool is whole again.
"""

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

FORCES = 4
COMMON = [0, 1, 0, 0, 1, 1, 0, 1, 0]
PROMPTS = st.builds(
    lambda length, tail: COMMON[:length] + tail, st.integers(0, 9), st.lists(st.integers(0, 2), min_size=1, max_size=3)
)


class Programs(RuleBasedStateMachine):
    def __init__(self, pretend: Any) -> None:
        super().__init__()
        self.pretend = pretend

    @initialize(
        size=st.integers(1, 4),
        memory=st.integers(24, 60),
        chunk=st.integers(4, 9),
        max_running=st.integers(1, 6),
        spare=st.integers(0, 6),
        reserve=st.integers(0, 2),
        drafts=st.integers(0, 3),
        stride=st.integers(1, 5),
    )
    def start(self, size: int, memory: int, chunk: int, max_running: int, spare: int, reserve: int, **way: int) -> None:
        step = chunk + max_running + spare
        limits = {"max_tokens_per_step": step, "max_running": max_running, "chunk": chunk, "reserve": reserve}
        self.engine = self.pretend(memory // size, size, forces=FORCES, patience=3.0, **way, **limits)

    @rule(
        prompt=PROMPTS,
        answer=st.integers(1, 12),
        n=st.integers(1, 3),
        priority=st.integers(0, 2),
        patience=st.none() | st.integers(1, 9),
        salt=st.sampled_from([b"", b"account"]),
        reuse=st.integers(0, 4).map(bool),
    )
    def add(self, prompt: list[int], answer: int, n: int, patience: int | None, **options: Any) -> None:
        deadline = None if patience is None else self.engine.now + patience
        self.engine.add(prompt, answer, n, arrival=self.engine.now, deadline=deadline, **options)

    @rule(steps=st.integers(1, 4))
    def run_on(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            self.engine.now += 0.25

    @rule(victims=st.lists(st.integers(0, 40), max_size=3))
    def abort_during_a_step(self, victims: list[int]) -> None:
        self.engine.step(*victims)

    @rule(victim=st.integers(0, 40))
    def abort(self, victim: int) -> None:
        sequence = self.engine.scheduler.abort(victim)
        assert sequence is None or (sequence.state, sequence.blocks) == ("gone", [])

    @precondition(lambda self: self.engine.scheduler.figures.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.engine.scheduler.preempt(data.draw(st.sampled_from(self.running)))

    @rule()
    def forget(self) -> None:
        self.engine.scheduler.forget()
        self.engine.memory.clear()

    @property
    def running(self) -> list[Any]:
        return [s for s in self.engine.scheduler._sequences.values() if s.state == "running"]

    @invariant()
    def the_books_are_right(self) -> None:
        scheduler, pool = self.engine.scheduler, self.engine.pool
        live, running = list(scheduler._sequences.values()), self.running
        holders = Counter(block for sequence in running for block in sequence.blocks)
        assert [holders[block] for block in range(pool.blocks)] == [pool.holders(b) for b in range(pool.blocks)]
        assert pool.used == len(holders) and len(pool._empty) + len(pool._idle) + len(holders) == pool.blocks
        assert {block: digest for digest, block in pool._table.items()} == {
            block: digest for block, digest in enumerate(pool._digests) if digest is not None
        }
        assert scheduler._running == sorted(running, key=lambda s: s.rank)
        assert scheduler._queue == sorted((s for s in live if s.state == "waiting"), key=lambda s: s.rank)
        assert len(running) <= scheduler.limits.max_running
        assert all(pool.holders(copy) == 1 for copy in scheduler._tables._copies)
        for sequence in live:
            assert sequence.blocks or sequence.state == "waiting"
            assert sequence.computed <= len(sequence.blocks) * pool.size
            assert sequence.registered <= len(sequence.blocks)
            for block in sequence.blocks[sequence.settled // pool.size :]:
                assert pool.holders(block) == 1 and pool._digests[block] is None

    def teardown(self) -> None:
        self.engine.run()
        assert not self.engine.scheduler._deadlines and not self.engine.scheduler._tables._copies


def test_random_programs(pretend: Any) -> None:
    run_state_machine_as_test(
        lambda: Programs(pretend), settings=settings(max_examples=200, stateful_step_count=30, deadline=None)
    )
