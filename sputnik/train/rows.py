"""Examples as the model reads them: many in one row without padding, each seeing only itself; or one to a padded row.

    for rows in lay_out(examples, budget=4096, depths=1):
        trunk = model.trunk(rows.ids, token_mask=rows.valid, segments=rows.segments)

The packed layout needs the attention kernel that knows of segments; the padded one is for everything else. Both give
the same hidden states where it counts. B rows, T tokens, S segments, D hidden.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sputnik.model.head import IGNORE
from sputnik.train.examples import Example


@dataclass(frozen=True)
class Rows:
    """Some examples of a batch, which go through the model at once. The last token of each is only a target."""

    ids: Tensor
    """(B, T); packed: (1, N)."""
    targets: tuple[Tensor, ...]
    """Of depth k, beside `ids`: the token k + 1 further on where that carries loss, else IGNORE."""
    valid: Tensor | None
    """(B, T) False in padding; None where there is none."""
    segments: Tensor | None
    """(S, 4), see `sputnik/model/kernels/fused.py`; None if padded."""
    examples: int


def lay_out(examples: Sequence[Example], budget: int, depths: int, packed: bool = True) -> Iterator[Rows]:
    """Cut a batch into rows of at most `budget` tokens, padding included (a longer example has one of its own), with
    targets for the next token and `depths` further ones."""
    lengths = [len(example.ids) - 1 for example in examples]
    for group in best_fit(lengths, budget) if packed else by_length(lengths, budget):
        chosen = [examples[place] for place in group]
        yield packed_rows(chosen, depths) if packed else padded_rows(chosen, depths)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Length-sorted best fit (R1 B.1): the longest first, each into the row with the least room that holds it."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room, row: ascending
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        at = bisect_left(rooms, (lengths[place], 0))
        if at == len(rooms):
            rows.append([])
            room, row = max(capacity, lengths[place]), len(rows) - 1
        else:
            room, row = rooms.pop(at)
        rows[row].append(place)
        insort(rooms, (room - lengths[place], row))
    return rows


def by_length(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Neighbours in length together, as many as fit when all are padded to the longest of them."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= capacity:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def packed_rows(examples: Sequence[Example], depths: int) -> Rows:
    lengths = torch.tensor([len(example.ids) - 1 for example in examples])
    segments = torch.zeros(len(examples), 4, dtype=torch.long)
    segments[:, 0], segments[:, 1] = lengths.cumsum(0) - lengths, lengths
    ids = torch.cat([torch.from_numpy(example.ids[:-1]) for example in examples])[None]
    targets = (torch.cat([_targets(example, k) for example in examples])[None] for k in range(depths + 1))
    return Rows(ids, tuple(targets), None, segments, len(examples))


def padded_rows(examples: Sequence[Example], depths: int) -> Rows:
    def padded(pieces: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(example.ids) - 1 for example in examples])
    ids = padded([torch.from_numpy(example.ids[:-1]) for example in examples], 0)
    targets = (padded([_targets(example, k) for example in examples], IGNORE) for k in range(depths + 1))
    return Rows(ids, tuple(targets), torch.arange(ids.shape[1]) < lengths[:, None], None, len(examples))


def target_counts(examples: Sequence[Example], depths: int) -> list[int]:
    """How many tokens carry loss at each depth: those that have so many tokens before the one that predicts them."""
    return [sum(int(example.mask[1 + k :].sum()) for example in examples) for k in range(depths + 1)]


def _targets(example: Example, depth: int) -> Tensor:
    ahead = np.where(example.mask, example.ids, IGNORE)[1 + depth :]
    out = np.full(len(example.ids) - 1, IGNORE)
    out[: len(ahead)] = ahead
    return torch.from_numpy(out)
