"""Several decoding steps between two looks at the scheduler: what a step costs in Python, paid once.

Who waits for whole answers (rollouts, evaluation) does not miss a token that comes a few steps later. A stride, which
`Engine.step(most)` takes where it may, draws up to `most` tokens of every sequence as tensors alone, with nothing to be
decided in between but whether a row has ended; guesses of the prediction modules are made and checked on the way. Ended
rows stay, computing their last tokens over and over, until they are too many. Controls of thoughts look at what was
drawn afterwards, and what follows a change of theirs is drawn anew: text with and without strides is the same text, as
with guesses, since a draw is a function of logits, seed and place. The slow twin is the engine's ordinary step.

R rows, one sequence each; G guesses a row; T = 1 + G tokens of a row in a step; E ids that end a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sputnik.engine.flat import FlatBatch, Runner
from sputnik.engine.runner import NativeRunner
from sputnik.engine.sample import Sample
from sputnik.engine.sampling import SamplingBatch, sample
from sputnik.engine.sequence import Work
from sputnik.engine.speculate import Speculation

STRIDE = 32
"""Tokens of a sequence at once, for those who wait for its end."""
IDLE = 16
"""A stride ends when more than one in so many rows has ended: they are computed for nothing."""


@dataclass(frozen=True)
class Strode:
    """What was drawn: of each row its tokens up to its end, with their log-probabilities (none: greedy, none asked)."""

    steps: int
    context: int
    """Cached tokens attended to, over all rows and steps."""
    tokens: list[list[int]]
    logprobs: list[list[float]] | None
    failed: list[bool]
    """Rows whose logits were not finite: the last of their tokens is none."""
    guesses: list[list[int]]
    """Of what follows; none for rows that are over."""
    routes: "list[np.ndarray[Any, np.dtype[np.int16]]] | None"
    """Experts (tokens, expert layers, K) of what each row computed, if recorded: one place before its `tokens`."""


def may_stride(works: Sequence[Work], samples: Sequence[Sample], guesses: int) -> bool:
    """Whether all only decode, `guesses` each, and no draw depends on the one before other than through the model."""
    return all(
        work.count == 1 + guesses
        and work.complete
        and work.sequence.decoding
        and work.sequence.drafts == guesses
        and each.guessable
        and not each.params.logprobs
        and each.forced() is None
        and each.free >= guesses
        for work, each in zip(works, samples, strict=True)
    )


class Stride:
    """`batch` is the first step's; `draws` has T rows for each of `samples`; `record`: with the experts."""

    def __init__(
        self,
        runner: Runner,
        batch: FlatBatch,
        draws: SamplingBatch,
        samples: Sequence[Sample],
        speculation: Speculation | None = None,
        record: bool = False,
    ) -> None:
        rows = len(samples)
        self.runner, self.batch, self.draws, self.speculation, self.record = runner, batch, draws, speculation, record
        self.ids, self.positions = batch.ids.view(rows, -1), batch.positions.view(rows, -1)
        self.place = torch.arange(self.ids.shape[1])
        self.first = torch.arange(0, self.ids.numel(), len(self.place))
        self.written = torch.tensor([len(each.written) for each in samples])
        self.most = self.written + torch.tensor([each.free for each in samples])
        self.ends = _padded([each.ends for each in samples])
        self.going = torch.ones(rows, dtype=torch.bool)
        self.context = 0

    def run(self, steps: int) -> Strode:
        """At most so many steps; the sequences have blocks for all that they may bring."""
        native = self.draws.native
        if native is not None and isinstance(self.runner, NativeRunner):
            drawn = self._natively(self.runner, native, steps)
        else:
            drawn = self._step_by_step(steps)
        kept = drawn.kept
        counts = kept.sum(dim=1).tolist()
        return Strode(
            kept.shape[1] // len(self.place),
            self.context,
            _parted(drawn.tokens[kept].tolist(), counts),
            None if drawn.logprobs is None else _parted(drawn.logprobs[kept].tolist(), counts),
            (kept & ~drawn.sound).any(dim=1).tolist(),
            [own if going else [] for own, going in zip(self.ids[:, 1:].tolist(), self.going.tolist(), strict=True)],
            None if drawn.routes is None else _parted(drawn.routes[kept].numpy(), counts),
        )

    def _natively(self, runner: NativeRunner, draws: Sequence[Tensor], steps: int) -> "_Drawn":
        """All of it in one call; `_step_by_step` is its twin."""
        tokens, values, kept, self.ids, self.going, figures, routes = runner.stride(
            replace(self.batch, ids=self.ids, positions=self.positions),
            (self.written, self.most, self.ends), draws, self.draws.scored, self.record, steps, IDLE,
        )  # fmt: skip
        self.context, judged, *accepted = figures.tolist()
        if self.speculation is not None:
            self.speculation.judged(judged, accepted)
        by_row = None
        if routes.numel():  # (steps, layers, R * T, K)
            by_row = (
                routes.to(torch.int16).permute(0, 2, 1, 3).unflatten(1, self.ids.shape).transpose(0, 1).flatten(1, 2)
            )
        return _Drawn(tokens, values.log() if self.draws.scored else None, values.isfinite(), kept, by_row)

    def _step_by_step(self, steps: int) -> "_Drawn":
        made = list[_Drawn]()
        while len(made) < steps:
            made.append(self._step())
            if IDLE * int(self.going.sum()) < (IDLE - 1) * len(self.going):
                break
        tokens, logprobs, sound, kept, routes = (
            None
            if any(part is None for part in parts)
            else torch.cat([part for part in parts if part is not None], dim=1)
            for parts in zip(*made, strict=True)
        )
        assert tokens is not None and sound is not None and kept is not None
        return _Drawn(tokens, logprobs, sound, kept, routes)

    def _step(self) -> "_Drawn":
        batch = replace(self.batch, ids=self.ids.flatten(), positions=self.positions.flatten())
        hidden = self.runner.forward(batch)
        taken = self.runner.routes() if self.record else None
        self.context += int(self.positions[:, -1].sum()) + len(self.going)
        places = (self.written[:, None] + self.place).flatten()
        drawn = sample(self.runner.head(hidden, keep=False), self.draws, places)
        tokens, sound = drawn.tokens.view_as(self.ids), drawn.sound.view_as(self.ids)
        stands, kept, over = self._judge(tokens, sound)
        self.going = self.going & ~over
        self.written = self.written + kept.sum(dim=1)
        if self.going.any():
            self._go_on(batch, tokens, stands, kept.sum(dim=1))
        return _Drawn(
            tokens,
            None if drawn.logprobs is None else drawn.logprobs.view_as(tokens),
            sound,
            kept,
            None if taken is None else taken.transpose(0, 1).to(torch.int16).unflatten(0, self.ids.shape),
        )

    def _judge(self, tokens: Tensor, sound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens (R, T) the guesses before them let stand, which of these are kept, and which rows are over."""
        stops = (tokens[:, :, None] == self.ends[:, None]).any(dim=2) | ~sound
        if self.speculation is None:
            kept = self.going[:, None]
            return kept, kept, stops[:, 0] | (self.written + 1 >= self.most)
        right = (self.ids[:, 1:] == tokens[:, :-1]).cumprod(dim=1).bool()
        stands = torch.cat([self.going[:, None], right & self.going[:, None]], dim=1)
        stopped = (stops & stands).cumsum(dim=1)
        within = self.written[:, None] + self.place < self.most[:, None]
        kept = stands & within & (stopped - stops.long() * stands <= 0)
        left = self.most - self.written - kept.sum(dim=1)
        over = (stops & kept).any(dim=1) | (left < self.speculation.most)  # these few go on in ordinary steps
        judged = self.going & ~over
        self.speculation.judged(int(judged.sum()), right[judged].sum(dim=0).tolist())
        return stands, kept, over

    def _go_on(self, batch: FlatBatch, tokens: Tensor, stands: Tensor, counts: Tensor) -> None:
        """The next step's ids and positions; rows that are over keep theirs."""
        going = self.going[:, None]
        if self.speculation is None:
            self.ids = torch.where(going, tokens, self.ids)
        else:
            last = (counts - 1).clamp(min=0)
            at = self.positions.gather(1, last[:, None])[:, 0]
            guesses = self.speculation.guess(
                replace(batch, wanted=self.first + last), tokens.masked_fill(~stands, 0).flatten(), batch.tables, at
            )
            self.ids = torch.where(going, torch.cat([tokens.gather(1, last[:, None]), guesses], dim=1), self.ids)
        self.positions = self.positions + counts[:, None] * going


class _Drawn(NamedTuple):
    """(R, steps * T, ...) each."""

    tokens: Tensor
    logprobs: Tensor | None
    sound: Tensor
    kept: Tensor
    routes: Tensor | None


def _padded(ends: Sequence[frozenset[int]]) -> Tensor:
    """(R, E), filled up with -1, which is no token."""
    width = max(map(len, ends))
    return torch.tensor([[*each, *[-1] * (width - len(each))] for each in ends], dtype=torch.long)


def _parted(values: Any, counts: Sequence[int]) -> list[Any]:
    """A list or an array in pieces of these lengths."""
    ends = list(accumulate(counts))
    return [values[end - count : end] for end, count in zip(ends, counts, strict=True)]
