"""What changes logits before a draw: bias, penalties, tokens that may not come yet; tensor code, many rows at once.

`SamplingBatch` (sampling.py) applies these to a copy of the logits, in this order.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sputnik.engine.params import SamplingParams


class Written(Protocol):
    """What a penalty looks at: `sampling.Row`."""

    @property
    def params(self) -> SamplingParams: ...

    @property
    def prompt(self) -> Sequence[int]: ...

    @property
    def written(self) -> Sequence[int]: ...


class Bias:
    """`logit_bias` of all rows."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        entries = [(row, id, bias) for row, each in enumerate(params) for id, bias in each.logit_bias.items()]
        self.where = (ints((row for row, _, _ in entries), device), ints((id for _, id, _ in entries), device))
        self.bias = floats((bias for _, _, bias in entries), device)

    def apply(self, scores: Tensor) -> None:
        scores.index_put_(self.where, self.bias, accumulate=True)


class MinTokens:
    """Tokens that would end a row before it has written `min_tokens`."""

    def __init__(self, params: Sequence[SamplingParams], eos_ids: Sequence[int], device: torch.device) -> None:
        entries = [
            (row, id, each.min_tokens)
            for row, each in enumerate(params)
            if each.min_tokens
            for id in each.ends(eos_ids)
        ]
        self.rows, self.ids, self.until = (ints((entry[n] for entry in entries), device) for n in (0, 1, 2))

    def apply(self, scores: Tensor, positions: Tensor) -> None:
        kept = scores[self.rows, self.ids].masked_fill(positions[self.rows] < self.until, -torch.inf)
        scores.index_put_((self.rows, self.ids), kept)


class Penalties:
    """How often the penalised rows have written what: a table of the pairs (row, token) that occur, not of all."""

    def __init__(self, rows: Sequence[Written], vocab_size: int, device: torch.device) -> None:
        params = [row.params for row in rows]
        self.presence = floats((each.presence_penalty for each in params), device)
        self.frequency = floats((each.frequency_penalty for each in params), device)
        self.repetition = floats((each.repetition_penalty for each in params), device)
        self.vocab_size = vocab_size
        self.rows = [n for n, each in enumerate(params) if is_penalised(each)]
        counts: Counter[int] = Counter()
        for n in self.rows:
            counts.update(n * vocab_size + id for id in rows[n].written)
            if params[n].repetition_penalty != 1:
                counts.update(dict.fromkeys((n * vocab_size + id for id in rows[n].prompt), 0))
        self.places = {pair: place for place, pair in enumerate(counts)}
        self.pairs = ints(counts, device)
        self.counts = floats(counts.values(), device)

    def count(self, tokens: Tensor) -> None:
        given = tokens.tolist()
        pairs = [n * self.vocab_size + given[n] for n in self.rows]
        fresh = [pair for pair in pairs if pair not in self.places]
        if fresh:
            self.places.update({pair: place for place, pair in enumerate(fresh, len(self.places))})
            self.pairs = torch.cat([self.pairs, ints(fresh, tokens.device)])
            self.counts = F.pad(self.counts, (0, len(fresh)))
        self.counts[ints((self.places[pair] for pair in pairs), tokens.device)] += 1

    def apply(self, scores: Tensor) -> None:
        where = (self.pairs // self.vocab_size, self.pairs % self.vocab_size)
        presence, frequency, repetition = (all[where[0]] for all in (self.presence, self.frequency, self.repetition))
        own = scores[where]
        own = torch.where(own > 0, own / repetition, own * repetition)
        scores.index_put_(where, own - frequency * self.counts - presence * (self.counts > 0))


def is_penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def is_edited(params: SamplingParams) -> bool:
    return bool(params.logit_bias or params.min_tokens) or is_penalised(params)


def ints(values: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long, device=device)


def floats(values: Iterable[float], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32, device=device)
