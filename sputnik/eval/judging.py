"""How good a reward model is: held-out accuracy with its interval, what length alone would get, calibration.

Everything is pure arithmetic on scores. Answers to one prompt are not independent, so the prompt is the unit of every
interval (eval/stats.py). Lengths are tokens of the judged answer.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from statistics import StatisticsError, correlation, fmean
from typing import Any

from sputnik.errors import DataError
from sputnik.eval.stats import Interval, interval95

BINS = 10


def accuracy(right: Sequence[float], units: Sequence[Hashable]) -> Interval:
    """Mean of `right` (1, 0, or 1/2 for a tie), each belonging to a unit; the units' means carry the interval."""
    by_unit: dict[Hashable, list[float]] = defaultdict(list)
    for unit, value in zip(units, right, strict=True):
        by_unit[unit].append(value)
    if not by_unit:
        raise DataError("nothing is held out to be scored; give more data, or raise held_out")
    return interval95([fmean(values) for values in by_unit.values()], [len(values) for values in by_unit.values()])


def beats(a: float, b: float) -> float:
    """1 if a is the greater one, 1/2 for a tie."""
    return 0.5 if a == b else float(a > b)


def pair_report(
    scores: Sequence[tuple[float, float]],
    lengths: Sequence[tuple[int, int]],
    units: Sequence[Hashable],
    groups: Sequence[str],
) -> dict[str, Any]:
    """(chosen, rejected) scores and lengths. `longer_wins` is what a judge gets who knows nothing but length; the
    baseline to beat is that or its opposite, whichever does better."""
    right = [beats(*pair) for pair in scores]
    longer = [beats(*pair) for pair in lengths]
    by_length = accuracy(longer, units)
    gaps = [a - b for a, b in scores]
    return {
        "accuracy": asdict(accuracy(right, units)),
        "longer_wins": asdict(by_length),
        "length_baseline": max(by_length.mean, 1 - by_length.mean),
        "length_correlation": _correlation(gaps, [a - b for a, b in lengths]),
        "loss": fmean([softplus(-gap) for gap in gaps]),
        "margin": fmean(gaps),
        "groups": _by_group(right, units, groups),
    }


def label_report(
    scores: Sequence[float],
    safe: Sequence[bool],
    lengths: Sequence[int],
    units: Sequence[Hashable],
    groups: Sequence[str],
) -> dict[str, Any]:
    """Scores are logits of "safe". `majority` is what the commoner label gets; `longer_safer` the chance that of a safe
    and an unsafe answer the safe one is longer."""
    right = [float((score > 0) == label) for score, label in zip(scores, safe, strict=True)]
    share = fmean(safe)
    chances = [sigmoid(score) for score in scores]
    return {
        "accuracy": asdict(accuracy(right, units)),
        "majority": max(share, 1 - share),
        "unsafe_caught": _mean([value for value, label in zip(right, safe) if not label]),
        "safe_passed": _mean([value for value, label in zip(right, safe) if label]),
        "ranking": _ranking(scores, safe),
        "longer_safer": _ranking(lengths, safe),
        "length_correlation": _correlation(scores, lengths),
        "loss": fmean([softplus(-score if label else score) for score, label in zip(scores, safe)]),
        "calibration": calibration(chances, safe),
        "groups": _by_group(right, units, groups),
    }


def calibration(chances: Sequence[float], safe: Sequence[bool]) -> dict[str, Any]:
    """Brier score, expected calibration error, and per tenth of the predictions how often they were right."""
    bins: list[dict[str, float]] = []
    error = 0.0
    for place in range(BINS):
        inside = [(p, y) for p, y in zip(chances, safe, strict=True) if min(BINS - 1, int(p * BINS)) == place]
        if inside:
            predicted, observed = fmean([p for p, _ in inside]), fmean([y for _, y in inside])
            bins.append({"from": place / BINS, "predicted": predicted, "observed": observed, "n": len(inside)})
            error += len(inside) / len(chances) * abs(predicted - observed)
    brier = fmean([(p - y) ** 2 for p, y in zip(chances, safe)])
    return {"brier": brier, "expected_error": error, "bins": bins}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """log(1 + e^x) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _by_group(right: Sequence[float], units: Sequence[Hashable], groups: Sequence[str]) -> dict[str, Any]:
    named = sorted({group for group in groups if group})
    places = {name: [i for i, group in enumerate(groups) if group == name] for name in named}
    return {
        name: asdict(accuracy([right[i] for i in found], [units[i] for i in found])) for name, found in places.items()
    }


def _ranking(values: Sequence[float], safe: Sequence[bool]) -> float | None:
    """Chance that a safe one has the greater value (area under the ROC curve), by ranks; None without both labels."""
    good = sum(safe)
    if not 0 < good < len(safe):
        return None
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    total = sum(rank for rank, label in zip(ranks, safe) if label)
    return (total - good * (good + 1) / 2) / (good * (len(safe) - good))


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's; None where one of them does not vary."""
    try:
        return correlation(a, b)
    except StatisticsError:
        return None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
