"""Several decoding steps between two looks at the scheduler: what a step of many sequences costs in Python, paid once.

Who waits for whole answers (rollouts, evaluation) does not miss a token that comes a few steps later. A stride, which
`Engine.step(most)` takes where it may, draws up to `most` tokens of every sequence as tensors alone, with nothing to be
decided in between but whether a row has ended. Ended rows stay, computing their last token over and over, until they
are too many. Controls of thoughts look at what was drawn afterwards, and what follows a change of theirs is drawn anew:
text with and without strides is the same text, as with guesses, since a draw is a function of logits, seed and place.
The slow twin is the engine's ordinary step.

R rows, one token of one sequence each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sputnik.engine.flat import FlatBatch, Runner
from sputnik.engine.sample import Sample
from sputnik.engine.sampling import SamplingBatch, sample
from sputnik.engine.sequence import Work

STRIDE = 16
"""Tokens of a sequence at once, for those who wait for its end."""
IDLE = 16
"""A stride ends when more than one in so many rows has ended: they are computed for nothing."""


@dataclass(frozen=True)
class Stride:
    """What was drawn: of each row its tokens up to its end, with their log-probabilities (none: greedy, none asked)."""

    steps: int
    tokens: list[list[int]]
    logprobs: list[list[float]] | None
    failed: list[bool]
    """Rows whose logits were not finite: the last of their tokens is none."""
    routes: "np.ndarray[Any, np.dtype[np.int16]] | None"
    """(steps, R, expert layers, K): experts of the token that step s computed for row r, if recorded."""
    context: int
    """Cached tokens attended to, over all rows and steps."""


def may_stride(works: Sequence[Work], samples: Sequence[Sample]) -> bool:
    """Whether all only decode, and no draw depends on the one before other than through the model."""
    return all(work.count == 1 and work.sequence.decoding for work in works) and all(
        each.guessable and not each.params.logprobs and each.forced() is None for each in samples
    )


def stride(
    runner: Runner, batch: FlatBatch, draws: SamplingBatch, samples: Sequence[Sample], most: int, record: bool = False
) -> Stride:
    """At most `most` tokens for each row; its sequence has blocks for them. `record`: with the experts."""
    rows = len(samples)
    positions, ids = batch.positions, batch.ids
    written = torch.tensor([len(each.written) for each in samples])
    left = torch.tensor([each.params.max_tokens for each in samples]) - written
    ends = _padded([each.ends for each in samples])
    going, sound = torch.ones(rows, dtype=torch.bool), torch.ones(rows, dtype=torch.bool)
    counts = torch.zeros(rows, dtype=torch.long)
    tokens, logprobs, routes, context = list[Tensor](), list[Tensor](), list[Tensor](), 0
    while len(tokens) < most:
        hidden = runner.forward(replace(batch, ids=ids, positions=positions))
        taken = runner.routes() if record else None
        if taken is not None:
            routes.append(taken.transpose(0, 1).to(torch.int16))
        context += int(positions.sum()) + rows
        drawn = sample(runner.head(hidden, keep=False), draws, written + len(tokens))
        tokens.append(drawn.tokens)
        if drawn.logprobs is not None:
            logprobs.append(drawn.logprobs)
        counts += going
        sound &= drawn.sound | ~going
        going = going & drawn.sound & (len(tokens) < left) & (drawn.tokens[:, None] != ends).all(dim=1)
        if IDLE * int(going.sum()) < (IDLE - 1) * rows:
            break
        positions = positions + going
        ids = torch.where(going, drawn.tokens, ids)
    kept = counts.tolist()
    drawn_tr = torch.stack(tokens).T.tolist()
    return Stride(
        len(tokens),
        [row[:count] for row, count in zip(drawn_tr, kept, strict=True)],
        [row[:n] for row, n in zip(torch.stack(logprobs).T.tolist(), kept, strict=True)] if logprobs else None,
        (~sound).tolist(),
        torch.stack(routes).numpy() if routes else None,
        context,
    )


def _padded(ends: Sequence[frozenset[int]]) -> Tensor:
    """(R, most ends), filled up with -1, which is no token."""
    width = max(map(len, ends))
    return torch.tensor([[*each, *[-1] * (width - len(each))] for each in ends])
