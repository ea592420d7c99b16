"""Rows of examples: as full as can be, and each example alone in there."""

import random

import numpy as np
import pytest
import torch

from sputnik.model.head import IGNORE
from sputnik.train.examples import Example
from sputnik.train.rows import best_fit, by_length, lay_out, packed_rows, padded_rows, target_counts


def example(length: int, learned: int, first: int = 0) -> Example:
    mask = np.arange(length) >= length - learned
    return Example(np.arange(first, first + length), mask, "x:1", "q")


def test_best_fit_fills_rows_and_loses_nothing() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(500)]
    rows = best_fit(lengths, 128)
    assert sorted(place for row in rows for place in row) == list(range(500))
    fills = [sum(lengths[place] for place in row) for row in rows]
    assert max(fills) <= 128 and sum(fills) / (128 * len(rows)) > 0.97
    assert rows == best_fit(lengths, 128)


def test_best_fit_takes_the_row_with_the_least_room() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert best_fit([30, 4], 10) == [[0], [1]]  # longer than a row: one of its own


def test_padded_groups_stay_within_the_budget() -> None:
    lengths = [9, 1, 5, 5, 2, 30]
    groups = by_length(lengths, 20)
    assert groups == [[5], [0, 2], [3, 4, 1]]
    assert all(len(group) * max(lengths[place] for place in group) <= 20 for group in groups[1:])


@pytest.mark.parametrize("packed", [True, False])
def test_every_target_of_a_batch_is_in_the_rows_once(packed: bool) -> None:
    batch = [example(length, learned, 100 * length) for length, learned in ((9, 3), (4, 1), (2, 1), (7, 6), (30, 2))]
    rows = list(lay_out(batch, budget=16, depths=2, packed=packed))
    assert sum(each.examples for each in rows) == 5 and len(rows) > 2
    for depth, count in enumerate(target_counts(batch, 2)):
        found = torch.cat([each.targets[depth].flatten() for each in rows])
        found = found[found != IGNORE]
        assert len(found) == count
        wanted = [id for each in batch for id in each.ids[1 + depth :][each.mask[1 + depth :]].tolist()]
        assert sorted(found.tolist()) == sorted(wanted)


def test_a_target_stands_where_the_token_before_it_is_read() -> None:
    batch = [example(5, 2, 10), example(4, 3, 20)]
    packed, padded = packed_rows(batch, 1), padded_rows(batch, 1)
    assert packed.ids.tolist() == [[10, 11, 12, 13, 20, 21, 22]] and packed.valid is None
    assert packed.targets[0].tolist() == [[IGNORE, IGNORE, 13, 14, 21, 22, 23]]
    assert packed.targets[1].tolist() == [[IGNORE, 13, 14, IGNORE, 22, 23, IGNORE]]
    assert packed.segments is not None and packed.segments.tolist() == [[0, 4, 0, 0], [4, 3, 0, 0]]
    assert padded.ids.tolist() == [[10, 11, 12, 13], [20, 21, 22, 0]] and padded.segments is None
    assert padded.targets[0].tolist() == [[IGNORE, IGNORE, 13, 14], [21, 22, 23, IGNORE]]
    assert padded.valid is not None and padded.valid.tolist() == [[True] * 4, [True, True, True, False]]
