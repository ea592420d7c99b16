"""Two results on the same questions: the difference, how sure it is, and on which questions the two part.

    comparison = compare(load_result(Path("a.json")), load_result(Path("b.json")))
    print(comparison.difference, comparison.p)

Differences are taken question by question (second minus first), so questions hard for both cancel. The interval is
`stats.paired`'s, p that of an exact sign-flip test, with one sample a question McNemar's. What was not measured alike
is listed, never passed over; other verifiers or questions than the same ones cannot be compared at all.
"""

from dataclasses import asdict, dataclass
from typing import Any

from sputnik.errors import DataError
from sputnik.eval.results import EvalResult
from sputnik.eval.stats import Interval, paired, sign_flip


@dataclass(frozen=True)
class Comparison:
    first: str
    second: str
    difference: Interval
    """pass@1 of the second minus that of the first, over the questions both have."""
    p: float
    second_better: int
    """Questions on which the second was right more often."""
    first_better: int
    both_all: int
    """Questions on which both were right in every sample."""
    both_none: int
    same: int
    """The rest: equally often right."""
    left_out: int
    """Questions that only one of the two was judged on."""
    unlike: tuple[str, ...]
    """What was not measured alike, one phrase each."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(first: EvalResult, second: EvalResult) -> Comparison:
    """DataError if the two have no question in common or were judged by different verifiers."""
    if (first.task, first.task_version) != (second.task, second.task_version):
        raise DataError(
            f"not the same task: {first.task} version {first.task_version} and {second.task} version "
            f"{second.task_version}; evaluate both with the same one"
        )
    one, two = dict(first.questions), dict(second.questions)
    common = [name for name in one if name in two]
    if not common:
        raise DataError("the two results have no question in common; evaluate both with the same split and seed")
    pairs = [(one[name], two[name]) for name in common]
    a, b = [a for a, _ in pairs], [b for _, b in pairs]
    return Comparison(
        first=first.model,
        second=second.model,
        difference=paired(a, b, min(first.k, second.k)),
        p=sign_flip(a, b),
        second_better=sum(x < y for x, y in pairs),
        first_better=sum(x > y for x, y in pairs),
        both_all=pairs.count((1.0, 1.0)),
        both_none=pairs.count((0.0, 0.0)),
        same=sum(x == y and 0 < x < 1 for x, y in pairs),
        left_out=len(one) + len(two) - 2 * len(common),
        unlike=tuple(unlike(first, second)),
    )


def unlike(first: EvalResult, second: EvalResult) -> list[str]:
    """Settings that differ, samples and context aside from the questions themselves."""
    settings = [
        {**result.decoding, "template": f"{result.template} {result.template_hash}".strip()}
        for result in (first, second)
    ]
    names = [name for name in dict.fromkeys([*settings[0], *settings[1]]) if name != "context"]
    return [
        f"{name} {settings[0].get(name, 'not given')} and {settings[1].get(name, 'not given')}"
        for name in names
        if settings[0].get(name) != settings[1].get(name)
    ]
