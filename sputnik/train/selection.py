"""Which of several good answers to a question are worth training on: no copies, no near copies, at most so many.

    verdicts = choose([Candidate("7+5=12", "12", 9), ...], keep=2, prefer="diverse")     # None: kept; else why not

Pure functions of texts and lengths. Alike means: the same passages of three words, numbers or signs, whatever their
spacing and case. Left out: copies among the answers to different questions, which train/traces.py finds by `key`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sputnik.tasks.base import hash_of
from sputnik.text.quality import PIECE

Prefer = Literal["short", "diverse", "any"]
SHINGLE = 3


@dataclass(frozen=True)
class Candidate:
    """`length` in tokens, thought and answer; `checks`: the thought looks back at itself."""

    thinking: str
    answer: str
    length: int
    checks: bool = False


def choose(
    candidates: Sequence[Candidate], keep: int, prefer: Prefer = "short", near: float = 0.9, checks_first: bool = False
) -> list[str | None]:
    """For each candidate None if it is kept, else "duplicate", "near duplicate" or "enough".

    short: the shortest first. any: in the order given. diverse: the shortest, then always the one least like those
    kept. `near` is the similarity from which two are copies. `checks_first` puts thoughts with a check before others.
    """
    left = list(range(len(candidates)))
    if prefer != "any":
        left.sort(key=lambda n: candidates[n].length)
    if checks_first:
        left.sort(key=lambda n: not candidates[n].checks)
    shingles = [shingles_of(candidate.thinking) for candidate in candidates]
    keys = [key(candidate.thinking, candidate.answer) for candidate in candidates]
    alike = [0.0] * len(candidates)  # to the nearest of those kept
    found: list[str | None] = [None] * len(candidates)
    kept: set[int] = set()
    while left:
        most_unlike = min(left, key=lambda n: (checks_first and not candidates[n].checks, alike[n]))
        chosen = most_unlike if prefer == "diverse" and kept else left[0]
        left.remove(chosen)
        if keys[chosen] in kept:
            found[chosen] = "duplicate"
        elif alike[chosen] >= near:
            found[chosen] = "near duplicate"
        elif len(kept) == keep:
            found[chosen] = "enough"
        else:
            kept.add(keys[chosen])
            for n in left:
                alike[n] = max(alike[n], similarity(shingles[n], shingles[chosen]))
    return found


def key(*texts: str) -> int:
    """Equal for texts that differ in case and spacing alone."""
    return hash_of("\n".join(" ".join(PIECE.findall(text.casefold())) for text in texts))


def shingles_of(text: str) -> frozenset[tuple[str, ...]]:
    """The passages of `SHINGLE` pieces in a text; of a shorter one, the whole."""
    pieces = PIECE.findall(text.casefold())
    return frozenset(tuple(pieces[n : n + SHINGLE]) for n in range(max(1, len(pieces) - SHINGLE + 1)))


def similarity(first: frozenset[tuple[str, ...]], second: frozenset[tuple[str, ...]]) -> float:
    """Passages in both / passages in either (Jaccard)."""
    either = len(first | second)
    return len(first & second) / either if either else 1.0
