"""Which tokens are computed next: continuous batching over paged blocks. Numbers only, no tensors.

    scheduler = Scheduler(BlockPool(1024, 16), Limits())
    scheduler.add(Sequence(id=1, tokens=prompt, max_length=len(prompt) + 256))
    while scheduler.busy:
        plan = scheduler.schedule(now)          # the runner copies plan.copies, then computes plan.works
        for work in plan.works:
            scheduler.done(work)
            if work.complete:                   # its last logits draw the next token
                scheduler.append(work.sequence, token)      # or scheduler.finish(work.sequence)

A step first decodes every running sequence that has a token to compute, then prefills prompts in chunks. All calls
come from one thread, between steps. Speculation: `draft` after `append`, and `rollback` after `done` of that work.
Several samples: `fork` after `done` of the leader's prompt. A prompt that another one's chunk is just computing waits
for that step and then hits.

Order: a sequence's rank is arrival + priority * patience, so one level of priority is worth `patience` seconds of
waiting. Ranks never change, hence nobody is overtaken for ever: only by those who arrive within that time. When
blocks run out, the running sequence of the last rank gives its blocks back and is recomputed later; the first is
never touched for memory and every step brings it forward, so every sequence ends. A deadline ends it at any stage.

Left out: moving blocks to slower memory instead of recomputing, and several pools.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence as Tokens

from sputnik.engine.blocks import BlockPool
from sputnik.engine.sequence import Figures, Limits, Plan, Sequence, Work
from sputnik.engine.tables import BlockTables
from sputnik.errors import ConfigError, DataError


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank


class Scheduler:
    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        if limits.chunk < pool.size:
            raise ConfigError(f"engine: chunk {limits.chunk} must hold at least one block of {pool.size} tokens")
        self.pool, self.limits = pool, limits
        self._tables = BlockTables(pool)
        self._sequences: dict[int, Sequence] = {}
        self._queue: list[Sequence] = []  # both by rank
        self._running: list[Sequence] = []
        self._deadlines: list[tuple[float, int]] = []
        self._prompt_tokens = self._hit_tokens = self._preemptions = 0

    # What the engine tells

    def add(self, sequence: Sequence) -> None:
        self._enter(sequence)
        self._wait(sequence)

    def fork(self, leader: Sequence, follower: Sequence) -> bool:
        """Start another sample of a prompt that `leader` has just computed, without computing it again.

        True: the follower stands where the leader stood after the prompt, and the caller draws its first token from
        the leader's logits and appends it. False: no room at once; the follower waits and computes what is left.
        """
        length = len(follower.tokens)
        if follower.tokens != leader.tokens[:length] or follower.salt != leader.salt:
            raise RuntimeError(f"sequence {follower.id} does not continue a prompt of sequence {leader.id}")
        room = len(self._running) < self.limits.max_running and self._spare >= 1
        if leader.state != "running" or leader.settled < length or not room:
            self.add(follower)
            return False
        self._enter(follower)
        self._tables.fork(leader, follower)
        follower.cached = length
        follower.decoding = True
        self._run(follower)
        return True

    def append(self, sequence: Sequence, token: int) -> None:
        """A token that was drawn or forced; several in a row are computed together."""
        if sequence.drafts or not sequence.decoding or len(sequence.tokens) >= sequence.max_length:
            raise RuntimeError(f"sequence {sequence.id} takes no token: not computed, unsettled drafts or full length")
        sequence.tokens.append(token)

    def draft(self, sequence: Sequence, tokens: Tokens[int]) -> None:
        """Guesses of the tokens to come, to be checked in the next step. Under pressure the last ones are dropped:
        `sequence.drafts` says how many were computed. They are not offered for reuse before `rollback` settles them.
        """
        if not sequence.decoding:
            raise RuntimeError(f"sequence {sequence.id} is not decoding")
        room = sequence.max_length - len(sequence.tokens)
        sequence.tokens.extend(tokens[:room])
        sequence.drafts += min(len(tokens), room)

    def rollback(self, sequence: Sequence, rejected: int) -> None:
        """Settle the drafts: the last `rejected` tokens were wrong and go, the others stay."""
        if not 0 <= rejected <= sequence.drafts:
            raise RuntimeError(f"sequence {sequence.id} has {sequence.drafts} drafts, {rejected} cannot be rejected")
        if rejected:
            del sequence.tokens[-rejected:]
            sequence.computed = min(sequence.computed, len(sequence.tokens))
        sequence.drafts = 0
        if sequence.computed >= (sequence.registered + 1) * self.pool.size:
            self._tables.register(sequence)

    def done(self, work: Work) -> None:
        """The runner has computed `work`. Ignored when the sequence has been aborted meanwhile."""
        sequence = work.sequence
        if sequence.state != "running":
            return
        if work.start != sequence.computed:
            raise RuntimeError(f"sequence {sequence.id} stands at {sequence.computed}, not at {work.start}")
        sequence.computed = computed = work.start + work.count
        if computed == len(sequence.tokens):
            sequence.decoding = True
        if computed >= (sequence.registered + 1) * self.pool.size:
            self._tables.register(sequence)

    def reserve(self, works: Tokens[Work], tokens: int) -> bool:
        """Blocks for so many tokens of each sequence that decodes, if nobody has to give any back for it; they may be
        computed before `strode`."""
        ends = [min(work.start + tokens, work.sequence.max_length) for work in works]
        missing = [self._tables.needed(end) - len(work.sequence.blocks) for work, end in zip(works, ends, strict=True)]
        if sum(count for count in missing if count > 0) > self._spare:
            return False
        for work, count in zip(works, missing, strict=True):
            if count > 0:
                self._tables.extend(work.sequence, count)
        return True

    def strode(self, work: Work, tokens: Tokens[int]) -> None:
        """The runner has computed `work` and, of the `tokens` drawn one after another behind it, all but the last.
        Drafts are settled: those that were right are among the tokens."""
        sequence = work.sequence
        self._drop_drafts(sequence, sequence.drafts)
        if work.start + 1 != len(sequence.tokens) or len(sequence.tokens) + len(tokens) > sequence.max_length:
            raise RuntimeError(f"sequence {sequence.id} takes no {len(tokens)} tokens after {work.start}")
        sequence.tokens.extend(tokens)
        sequence.computed = work.start + len(tokens)
        if sequence.computed >= (sequence.registered + 1) * self.pool.size:
            self._tables.register(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Its blocks are free at once; their contents stay reusable until the memory is needed."""
        if sequence.state == "waiting":
            self._remove(self._queue, sequence)
        elif sequence.state == "running":
            self._remove(self._running, sequence)
            self._tables.close(sequence)
        else:
            raise RuntimeError(f"sequence {sequence.id} is {sequence.state}")
        del self._sequences[sequence.id]
        if sequence.deadline is not None:
            del self._deadlines[bisect_left(self._deadlines, (sequence.deadline, sequence.id))]
        sequence.state, sequence.decoding = "gone", False

    def abort(self, id: int) -> Sequence | None:
        """End a sequence in any state; None when there is none of this id (any more)."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self.finish(sequence)
        return sequence

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue without its blocks; tokens are kept and recomputed, unsettled drafts are dropped."""
        self._drop_drafts(sequence, sequence.drafts)
        self._remove(self._running, sequence)
        self._tables.close(sequence)
        sequence.decoding = False
        sequence.preemptions += 1
        self._preemptions += 1
        self._wait(sequence)

    def forget(self) -> None:
        """The weights have changed: nothing in the cache is valid, whoever runs is recomputed."""
        while self._running:
            self.preempt(self._running[-1])
        self.pool.clear()

    # What it says

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    @property
    def figures(self) -> Figures:
        return Figures(
            queue=len(self._queue),
            running=len(self._running),
            used_blocks=self.pool.used,
            blocks=self.pool.blocks,
            prompt_tokens=self._prompt_tokens,
            hit_tokens=self._hit_tokens,
            preemptions=self._preemptions,
        )

    def schedule(self, now: float = 0.0) -> Plan:
        plan = Plan()
        self._expire(now, plan)
        self._make_room(plan)
        used = self._plan_decodes(plan)
        self._plan_prefills(plan, used)
        plan.copies.extend(self._tables.take_copies())
        return plan

    # One step

    def _expire(self, now: float, plan: Plan) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = self._sequences[self._deadlines[0][1]]
            self.finish(sequence)
            plan.expired.append(sequence)

    def _make_room(self, plan: Plan) -> None:
        """The first in the queue takes the place of running sequences of lower priority and later rank."""
        while self._queue and self._running:
            head, last = self._queue[0], self._running[-1]
            if last.priority <= head.priority or last.rank <= head.rank or self._fits(head):
                return
            self.preempt(last)
            plan.preempted.append(last)

    def _plan_decodes(self, plan: Plan) -> int:
        """Every sequence that has a token to compute; returns the number of tokens."""
        works, size, used = plan.works, self.pool.size, 0
        extra = self._extra_tokens()
        for sequence in self._running:  # `_grow` may cut off its tail while we walk
            if not sequence.decoding:
                continue
            start = sequence.computed
            count = len(sequence.tokens) - start
            if count > 1:
                count = self._trim(sequence, count, 1 + extra)
                extra -= count - 1
            if start + count > len(sequence.blocks) * size:
                count = self._grow(sequence, count, plan)
            if count:
                works.append(Work(sequence, start, count))
                used += count
        return used

    def _plan_prefills(self, plan: Plan, used: int) -> None:
        left = self.limits.max_tokens_per_step - used
        if used:
            left = min(left, self.limits.chunk)
        promised: set[bytes] = set()  # digests of blocks that this step fills
        for sequence in self._running:
            if left and not sequence.decoding:
                left -= self._prefill(sequence, left, promised, plan)
        while left and self._queue and self._fits(self._queue[0]):
            count = self._prefill(self._admit(), left, promised, plan)
            if not count:
                break
            left -= count

    def _prefill(self, sequence: Sequence, left: int, promised: set[bytes], plan: Plan) -> int:
        """Plan the next chunk, at most `left` tokens and, unless it is the last, up to the end of a block.

        Nothing is planned while this very step computes at least half of it for another sequence: the next hits it.
        """
        size = self.pool.size
        start = sequence.computed
        self._tables.adopt(sequence)
        self._count_hits(sequence, sequence.computed - start)
        start, end = sequence.computed, min(sequence.computed + left, len(sequence.tokens))
        if end < len(sequence.tokens):
            end -= end % size
        if end <= start:
            return 0
        if sequence.reuse:
            digests = self._tables.digests(sequence, end // size)[start // size :]
            ahead = next((i for i, digest in enumerate(digests) if digest not in promised), len(digests))
            if 2 * ahead * size >= end - start:
                return 0
            promised.update(digests)
        plan.works.append(Work(sequence, start, end - start))
        return end - start

    # Pieces

    @property
    def _spare(self) -> int:
        """Free blocks beyond those kept for the growth of whoever runs."""
        return self.pool.free - self.limits.reserve * len(self._running)

    def _extra_tokens(self) -> int:
        """Tokens beyond one per sequence that decoding may take, so that prefill keeps its chunk."""
        prefilling = self._queue or not all(sequence.decoding for sequence in self._running)
        return self.limits.max_tokens_per_step - len(self._running) - (self.limits.chunk if prefilling else 0)

    def _trim(self, sequence: Sequence, count: int, limit: int) -> int:
        """At most `limit` of `count` tokens: drafts are dropped, then forced tokens put off to the next step."""
        if count > limit:
            self._drop_drafts(sequence, min(sequence.drafts, count - limit))
        return min(count, limit)

    def _grow(self, sequence: Sequence, count: int, plan: Plan) -> int:
        """Blocks for the next `count` tokens, from the last in rank if need be; 0 if that is the sequence itself.

        Drafts are no reason to preempt anybody: they are dropped where a block for everyone else would not be left.
        """
        size, held = self.pool.size, len(sequence.blocks)
        if sequence.drafts:
            room = (held + max(0, self.pool.free - len(self._running))) * size - sequence.computed
            count = self._trim(sequence, count, max(room, count - sequence.drafts))
        missing = self._tables.needed(sequence.computed + count) - held
        while missing > self.pool.free:
            last = self._running[-1]
            self.preempt(last)
            plan.preempted.append(last)
            if last is sequence:
                return 0
        self._tables.extend(sequence, missing)
        return count

    def _fits(self, sequence: Sequence) -> bool:
        """Whether it can start now. All its present tokens get their blocks at once, so that no prefill gets stuck."""
        if not self._running:
            return True
        if len(self._running) >= self.limits.max_running:
            return False
        return self._tables.demand(sequence) <= self._spare

    def _admit(self) -> Sequence:
        sequence = self._queue.pop(0)
        self._tables.open(sequence)
        if not sequence.preemptions:
            self._prompt_tokens += len(sequence.tokens)
        self._count_hits(sequence, sequence.computed)
        self._run(sequence)
        return sequence

    def _count_hits(self, sequence: Sequence, tokens: int) -> None:
        """Of its first start only: what a preempted sequence finds again is no saving for its owner."""
        if not sequence.preemptions:
            sequence.cached += tokens
            self._hit_tokens += tokens

    def _drop_drafts(self, sequence: Sequence, count: int) -> None:
        if count:
            del sequence.tokens[-count:]
            sequence.drafts -= count

    def _enter(self, sequence: Sequence) -> None:
        room = self.pool.blocks * self.pool.size
        if sequence.max_length > room:
            raise DataError(
                f"{sequence.max_length} tokens (prompt {sequence.prompt_length}) do not fit the cache of {room}: "
                "shorten the prompt, lower max_tokens or give the engine more cache"
            )
        if sequence.state != "new" or sequence.id in self._sequences:
            raise RuntimeError(f"sequence {sequence.id} is here already")
        sequence.rank = (sequence.arrival + sequence.priority * self.limits.patience, sequence.id)
        self._sequences[sequence.id] = sequence
        if sequence.deadline is not None:
            insort(self._deadlines, (sequence.deadline, sequence.id))

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = "waiting"
        insort(self._queue, sequence, key=_rank)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = "running"
        insort(self._running, sequence, key=_rank)

    def _remove(self, ranked: list[Sequence], sequence: Sequence) -> None:
        del ranked[bisect_left(ranked, sequence.rank, key=_rank)]
