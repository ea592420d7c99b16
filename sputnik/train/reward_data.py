"""The data of a reward model: lines of judged answers -> rendered dialogues, split by prompt and balanced by length.

What a line may hold says text/preferences.py. Nothing is lost in silence: `Data.counts` says what became of every line.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sputnik.errors import DataError
from sputnik.text.preferences import Judged, judged, split_held_out
from sputnik.train.examples import Found, Policy, read_records
from sputnik.train.scorer import Dialogue, RewardModel
from sputnik.train.state import derive_seed


@dataclass(frozen=True)
class Unit:
    """A pair or label ready to be scored."""

    source: Judged
    dialogues: tuple[Dialogue, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each answer."""
        return tuple(len(each) - each.prompt for each in self.dialogues)

    @property
    def longest(self) -> int:
        """What cutting into micro-batches has to reckon with: the tokens of all its rows, padded."""
        return max(map(len, self.dialogues)) * len(self.dialogues)


@dataclass(frozen=True)
class Data:
    train: list[Unit]
    held_out: list[Unit]
    counts: Mapping[str, int]
    """What became of the lines."""
    bad: list[str]
    """"FILE:LINE: reason" of the lines that were dropped."""

    @property
    def digest(self) -> str:
        """Of everything that is trained on and scored, in order."""
        whole = hashlib.sha256()
        for unit in (*self.train, None, *self.held_out):
            told = unit and (unit.source.safe, *((each.ids, each.prompt) for each in unit.dialogues))
            whole.update(repr(told).encode())
        return whole.hexdigest()[:16]


def gather(
    model: RewardModel,
    files: Sequence[Path],
    held_out: Sequence[Path] = (),
    *,
    share: float = 0.1,
    max_tokens: int = 512,
    balanced: bool = True,
    bad_lines: Policy = "refuse",
    seed: int = 0,
) -> Data:
    """Read, split, render, drop what is too long, balance. Without `held_out` files a `share` of the prompts is."""
    kind = model.card.kind

    def unit(record: Mapping[str, Any]) -> Unit:
        item = judged(kind, record)
        return Unit(item, tuple(model.from_text(item.messages, text) for text in item.answers))

    def read(some: Sequence[Path]) -> tuple[list[Unit], list[str]]:
        found: Found[tuple[str, Unit]] = read_records(some, unit, bad_lines)
        return [each for _, each in found.kept], found.bad

    items, bad = read(files)
    counts = {"lines": len(items) + len(bad)}
    if held_out:
        outside, more = read(held_out)
        bad = bad + more
        known = {each.source.key for each in outside}
        train = [each for each in items if each.source.key not in known]
        counts |= {"held_out_lines": len(outside) + len(more), "also_held_out": len(items) - len(train)}
    else:
        known = {item.key for item in split_held_out([each.source for each in items], share)[1]}
        train, outside = ([each for each in items if (each.source.key in known) == side] for side in (False, True))
    limit = min(max_tokens, model.backbone.config.max_position_embeddings)
    kept, tested = ([each for each in side if max(map(len, each.dialogues)) <= limit] for side in (train, outside))
    counts |= {"bad_lines": len(bad), "too_long": len(train) + len(outside) - len(kept) - len(tested)}
    if kind == "pairwise" and balanced:
        even = balance(kept, seed)
        counts["dropped_for_balance"] = len(kept) - len(even)
        kept = even
    counts |= {"train": len(kept), "held_out": len(tested)}
    if not kept or not tested:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        one_sided = "; the chosen answers are all longer, or all shorter: add others or set balance_lengths = false"
        why = one_sided if counts.get("dropped_for_balance") else f"; give more data, or raise max_tokens = {limit}"
        raise DataError(f"nothing is left to {'score' if kept else 'train on'} ({told}){why}")
    return Data(kept, tested, counts, bad)


def balance(units: Sequence[Unit], seed: int) -> list[Unit]:
    """In each band of length differences (1, 2-3, 4-7, ... tokens) as many pairs whose chosen answer is the longer as
    pairs where it is the shorter; which of the many stay is drawn. Ties stay."""
    bands: dict[int, dict[bool, list[int]]] = {}
    stay: list[int] = []
    for place, unit in enumerate(units):
        chosen, rejected = unit.lengths
        if chosen == rejected:
            stay.append(place)
        else:
            band = bands.setdefault(abs(chosen - rejected).bit_length(), {True: [], False: []})
            band[chosen > rejected].append(place)
    rng = random.Random(derive_seed(seed, "balance"))
    for _, sides in sorted(bands.items()):
        fewer = min(map(len, sides.values()))
        for side in sides.values():
            stay += rng.sample(side, fewer)
    return [units[place] for place in sorted(stay)]
