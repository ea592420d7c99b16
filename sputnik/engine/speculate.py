"""Speculative decoding with the model's own multi-token prediction modules (report section 2.2).

After each step the modules guess the next tokens of every sequence that writes; the following step computes the guesses
together with the last token. Acceptance is exact: a guess stays if it is the very token the sampler draws at that place
(sampling.py: a draw is a function of logits, seed and position), so text with and without guesses is the same text.

Guesses cost time and pay only where they are accepted and the step has room to spare. `Pays` measures tokens per second
both ways, for each size of batch, and switches. A module's cache entry of a position needs the token after it; where
guessing was off, entries are missing and the first guesses afterwards are worse. Text never is.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sputnik.engine.flat import FlatBatch, Runner
from sputnik.engine.sequence import Sequence as Tracked
from sputnik.engine.sequence import Work

TRIAL, REST, LONGEST_REST = 6, 200, 6400
"""Steps a way is tried for, and steps between trials of the slower way: twice as many after each that confirms it."""
MARGIN = 1.03


class Pays:
    """Whether guessing is worth it: tokens per second with and without, by powers of two of the batch size."""

    def __init__(self) -> None:
        self._rates: dict[int, dict[bool, float]] = {}
        self._phase: dict[int, tuple[bool, int, bool]] = {}
        """Bucket -> guess?, steps left, whether this is the way found better rather than a trial."""
        self._found: dict[int, tuple[bool, int]] = {}
        """Bucket -> the way found better last, and the steps it was then given."""

    def now(self, rows: int, steps: int = 1) -> bool:
        """Whether the next step of so many sequences should guess; `steps` were taken since it was asked last."""
        bucket = rows.bit_length()
        on, left, settled = self._phase.get(bucket, (True, TRIAL, False))
        if left <= 0:
            rates = self._rates.get(bucket, {})
            if settled or len(rates) < 2:
                on, left, settled = not on, TRIAL, False
            else:
                on, settled = rates[True] > MARGIN * rates[False], True
                before, rest = self._found.get(bucket, (not on, 0))
                left = min(LONGEST_REST, 2 * rest) if before == on else REST
                self._found[bucket] = on, left
        self._phase[bucket] = (on, left - steps, settled)
        return on

    def learn(self, rows: int, guessed: bool, tokens: int, seconds: float) -> None:
        rates = self._rates.setdefault(rows.bit_length(), {})
        rate = tokens / max(seconds, 1e-9)
        rates[guessed] = rate if guessed not in rates else 0.8 * rates[guessed] + 0.2 * rate


class Speculation:
    def __init__(self, runner: Runner, modules: int, most: int, adaptive: bool = True) -> None:
        """`most` guesses per sequence and step; `adaptive` False guesses always."""
        self.runner, self.modules, self.most = runner, modules, most
        self.pays = Pays() if adaptive else None
        self.guessing = True
        """Whether the sequences that decode are given guesses at present."""
        self._last: float | None = None
        self.drafted, self.accepted = [0] * most, [0] * most
        """By position of the guess."""

    def judge(self, guesses: int, accepted: int) -> None:
        self.judged(1, [int(place < accepted) for place in range(guesses)])

    def judged(self, rows: int, accepted: Sequence[int]) -> None:
        """Of so many rows' guesses, how many were right at each position."""
        for place, right in enumerate(accepted):
            self.drafted[place] += rows
            self.accepted[place] += right

    def decide(self, rows: int, drawn: int, now: float, steps: int = 1) -> bool:
        """Whether to guess next, after `steps` that only decoded `rows` sequences and brought `drawn` tokens."""
        if self.pays is not None:
            if self._last is not None:
                self.pays.learn(rows, self.guessing, drawn, now - self._last)
            guessed, self.guessing = self.guessing, self.pays.now(rows, steps)
            # The step that begins to guess checks nothing yet, and tells nothing.
            self._last = now if guessed or not self.guessing else None
        return self.guessing

    def interrupted(self) -> None:
        """A step had prompts in it: its time says nothing of guessing."""
        self._last, self.guessing = None, True

    def propose(self, batch: FlatBatch, works: Sequence[Work], wanting: Sequence[bool]) -> list[list[int]]:
        """Guesses for each work that is `wanting` (others: none); fills the modules' cache for all of them.

        Called after the tokens drawn in this step were appended: each sequence's last token is not computed yet."""
        starts = batch.starts.tolist()
        following = np.zeros(len(batch.ids), dtype=np.int64)
        rows, chosen = [], []
        for index, (work, wants) in enumerate(zip(works, wanting, strict=True)):
            known = work.sequence.tokens[work.start + 1 : work.start + work.count + 1]
            following[starts[index] : starts[index] + len(known)] = known
            if wants:
                chosen.append(index)
                rows.append(starts[index] + len(work.sequence.tokens) - 2 - work.start)
        batch = replace(batch, wanted=torch.tensor(rows, dtype=torch.long))
        out: list[list[int]] = [[] for _ in works]
        if not chosen:
            self.runner.ahead(batch, torch.from_numpy(following))
            return out
        reach = torch.tensor([self._reach(works[index].sequence) for index in chosen])
        tables, positions = batch.tables[chosen], batch.positions[batch.wanted]
        guesses = self.guess(batch, torch.from_numpy(following), tables, positions, reach)
        for index, own in zip(chosen, guesses.tolist(), strict=True):
            out[index] = own
        return out

    def guess(
        self, batch: FlatBatch, following: Tensor, tables: Tensor, positions: Tensor, reach: Tensor | None = None
    ) -> Tensor:
        """Guesses (R, G) for the wanted rows, which stand at `positions` (R,) of `tables` (R, blocks); `following` (N,)
        are the tokens after the batch's. Fewer where a guess's own entry would lie beyond `reach` (R,)."""
        hidden = self.runner.ahead(batch, following)
        guesses = [self.runner.head(hidden, keep=False).argmax(dim=-1)]
        for depth in range(1, self.most):
            if reach is not None and int((positions + depth - reach).max()) >= 0:
                break
            hidden = self._further(hidden, guesses[-1], tables, positions + depth, depth)
            guesses.append(self.runner.head(hidden, keep=False).argmax(dim=-1))
        return torch.stack(guesses, dim=1)

    def _reach(self, sequence: Tracked) -> int:
        """Positions its blocks hold."""
        return len(sequence.blocks) * self.runner.caches[0].shape[1]

    def _further(self, hidden: Tensor, guesses: Tensor, tables: Tensor, positions: Tensor, depth: int) -> Tensor:
        """One token more for each sequence: the next module if there is one, else the last again."""
        count = len(guesses)
        lone = FlatBatch(guesses, positions, torch.arange(count + 1), tables.contiguous(), torch.arange(count))
        return self.runner.ahead(lone, guesses, min(depth, self.modules - 1), hidden)
