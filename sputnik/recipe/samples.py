"""Which model answers the report shows: the same questions before and after, and groups of rollouts at several steps.

Showing is choosing, so the choice is a fixed rule and the page prints the whole count next to it. Before and after are
each model's first answer to the same question: some that were mended, and always one still wrong and one lost when
there are any. Nothing here is random: the same run gives the same page.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sputnik.recipe.evidence import Stage, number

MENDED, STILL_WRONG, LOST, KEPT = "wrong, then correct", "still wrong", "correct, then wrong", "correct both times"
CORRECT = "correct"
SHOWN: Mapping[str, int] = MappingProxyType({MENDED: 3, STILL_WRONG: 1, LOST: 1})
CHANGES: Mapping[tuple[bool, bool], str] = MappingProxyType(
    {(False, True): MENDED, (False, False): STILL_WRONG, (True, False): LOST, (True, True): KEPT}
)


@dataclass(frozen=True)
class Pair:
    """One question answered by the base model and by R1-Zero."""

    change: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Pairs chosen for the page, and how many questions made each kind of change."""

    pairs: tuple[Pair, ...]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Group:
    """The answers to one question at one step, best advantage first, and the names of their rewards."""

    step: int
    rollouts: tuple[Mapping[str, Any], ...]

    @property
    def correct(self) -> int:
        return sum(is_correct(rollout) for rollout in self.rollouts)

    @property
    def rewards(self) -> list[str]:
        return list(dict.fromkeys(name for rollout in self.rollouts for name in rollout.get("rewards") or {}))


def is_correct(sample: Mapping[str, Any]) -> bool:
    return str(sample.get("verdict", "")).lower() == CORRECT


def compare(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> Comparison | None:
    """Pair the two models' first answers by `problem_id`; None when no question was answered by both."""
    first, second = _first_answers(before), _first_answers(after)
    pairs = []
    for problem in (problem for problem in second if problem in first):
        old, new = first[problem], second[problem]
        pairs.append(Pair(CHANGES[is_correct(old), is_correct(new)], old, new))
    if not pairs:
        return None
    by_change = {change: [pair for pair in pairs if pair.change == change] for change in CHANGES.values()}
    chosen = [pair for change, most in SHOWN.items() for pair in _spread(by_change[change], most)]
    return Comparison(tuple(chosen), {change: len(found) for change, found in by_change.items()})


def groups(stage: Stage, steps: int = 6) -> list[Group]:
    """One group at each of up to `steps` recorded steps, first and last included: the one with the most mixed verdicts.

    Two passes over the log and only the chosen groups in memory, since rollouts.jsonl grows with the run.
    """
    tally: dict[tuple[int, str], list[int]] = {}
    for rollout in stage.rollouts():
        answers = tally.setdefault(_key(rollout), [0, 0])
        answers[is_correct(rollout)] += 1
    recorded = _spread(sorted({step for step, _ in tally}), steps)
    wanted = {}
    for step in recorded:
        here = {key: min(answers) for key, answers in tally.items() if key[0] == step}
        wanted[max(here, key=lambda key: here[key])] = step
    found: dict[int, list[Mapping[str, Any]]] = {step: [] for step in recorded}
    for rollout in stage.rollouts():
        if (step_wanted := wanted.get(_key(rollout))) is not None:
            found[step_wanted].append(rollout)
    return [Group(step, tuple(sorted(found[step], key=_advantage, reverse=True))) for step in recorded]


def _key(rollout: Mapping[str, Any]) -> tuple[int, str]:
    return int(number(rollout.get("step")) or 0), str(rollout.get("problem_id", rollout.get("prompt", "")))


def _advantage(rollout: Mapping[str, Any]) -> float:
    return number(rollout.get("advantage")) or 0.0


def _first_answers(samples: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    answers: dict[str, Mapping[str, Any]] = {}
    for sample in samples:
        answers.setdefault(str(sample.get("problem_id", sample.get("prompt", ""))), sample)
    return answers


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spaced over the sequence, ends included."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[len(items) // 2]]
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
