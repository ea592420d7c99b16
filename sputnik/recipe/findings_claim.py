"""One claim of the reports in a form a machine can decide: what is measured, and the rule, written before the run.

A recipe holds one or several claims beside its stages, which run once for each seed:

    [[claim]]
    name = "balance"
    text = "Without balancing some experts starve"
    source = "V3 2.1.2"
    ours = "none/metrics.jsonl: expert_imbalance"       # STAGE/FILE: PATH in the run of one seed
    against = "free/metrics.jsonl: expert_imbalance"
    compare = "ratio"
    tail = 0.25                                         # mean over the last quarter of the steps
    above = 2.0                                         # the rule
    minutes = 8                                         # what a seed takes

Seeds are paired: both sides of one seed start from the same weights and see the same data, so each gives one number
(difference, change, ratio or plain value), and these numbers have a mean and a 95 % t-interval. The claim is reproduced
("yes") if the whole interval lies within the bounds `above` and `below`, not reproduced ("no") if it lies beyond one of
them, and else nobody "could tell"; with fewer seeds than the rule asks for it is "incomplete". FILE is a .json or
.jsonl of the stage, or `lineage`, the stage's record (result, seconds, usd). Left out: corrections for asking many
questions at once; the card says how many were asked.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from sputnik.errors import ConfigError, DataError
from sputnik.eval.stats import student, variance
from sputnik.recipe.evidence import number, read_json, read_jsonl

Reproduced = Literal["yes", "no", "could not tell", "incomplete"]
LEAST_SEEDS = 3
"""Fewer decide nothing."""


@dataclass(frozen=True)
class Metric:
    """`STAGE/FILE: PATH`; steps of the path are keys, or places in a list."""

    stage: str
    file: str
    path: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, where: str) -> "Metric":
        match = re.fullmatch(r"([^/\s]+)/([\w.-]+): *(\S.*)", text)
        if match is None or not match[2].endswith((".json", ".jsonl", "lineage")):
            raise ConfigError(
                f'{where}: {text!r}: write "STAGE/FILE: KEY.KEY" with a .json or .jsonl file, or `lineage`'
            )
        return cls(match[1], match[2], tuple(match[3].strip().split(".")))

    def __str__(self) -> str:
        return f"{self.stage}/{self.file}: {'.'.join(self.path)}"

    def value(self, run: Path, tail: float = 0.0) -> float:
        """The number in the run of one seed; of a .jsonl the last, or the mean over the last `tail` of the steps."""
        if self.file.endswith(".jsonl"):
            points = self.curve(run)
            start = (1 - tail) * points[-1][0] if tail else points[-1][0]
            return fmean([value for step, value in points if step >= start])
        found = number(_follow(self._table(run), self.path))
        if found is None:
            raise DataError(f"{run}: {self} is not a number")
        return found

    def curve(self, run: Path, along: str = "step") -> list[tuple[float, float]]:
        """(x, value) of every line of a .jsonl, or of every entry of a list whose place is `*` in the path of a .json;
        `along` is the path of x. What lacks one of the two is left out; never empty."""
        if self.file.endswith(".jsonl"):
            entries, path, x = list(read_jsonl(run / self.stage / self.file)), self.path, tuple(along.split("."))
        else:
            place = self.path.index("*") if "*" in self.path else len(self.path)
            entries = _follow(self._table(run), self.path[:place]) or []
            path, x = self.path[place + 1 :], tuple(along.split("."))[place + 1 :]
        pairs = [(number(_follow(entry, x)), number(_follow(entry, path))) for entry in entries]
        points = [(x, value) for x, value in pairs if x is not None and value is not None]
        if not points:
            raise DataError(f"{run}: {self}: nothing there")
        return points

    def _table(self, run: Path) -> Any:
        if self.file != "lineage":
            return read_json(run / self.stage / self.file)
        stages = (read_json(run / "lineage.json") or {}).get("stages") or []
        return next((record for record in stages if record.get("name") == self.stage), None)


def _follow(value: Any, path: tuple[str, ...]) -> Any:
    """What stands at `path`, None where it ends before."""
    for key in path:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", key) and -len(value) <= int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


@dataclass(frozen=True)
class Claim:
    """What stands in a [[claim]] table."""

    name: str
    text: str
    """The claim in one sentence."""
    source: str
    """Report and section."""
    ours: str
    against: str = ""
    compare: Literal["value", "difference", "change", "ratio"] = "difference"
    """ours; ours - against; ours / against - 1; ours / against."""
    above: float | None = None
    below: float | None = None
    tail: float = 0.0
    seeds: int = LEAST_SEEDS
    minutes: float = 0.0
    """What one seed takes on two cores, beyond the stages of the claims above it in the file."""
    published: str = ""
    """What the report found."""
    note: str = ""
    """What this small form is, and what it leaves out."""
    unit: Literal["", "%"] = ""
    """Of what is measured: "%" for a share of 1."""
    labels: tuple[str, str] = ("against", "ours")
    curves: tuple[str, ...] = ()
    """Metrics of logs, or of lists (`points.*.pass_at_1.mean`), to draw as curves, one for each of `labels`; none: a
    point for each seed."""
    along: str = "step"
    """What the curves are drawn over: a key of the log, or a path like theirs."""
    show: Mapping[str, str] = field(default_factory=dict)
    """Further numbers to print: label -> metric."""

    def __post_init__(self) -> None:
        where = f"claim {self.name!r}"
        for metric in [self.ours, *([self.against] if self.against else []), *self.curves, *self.show.values()]:
            Metric.parse(metric, where)
        if (self.compare == "value") == bool(self.against):
            raise ConfigError(
                f"{where}: compare = {self.compare!r} goes {'without' if self.against else 'with'} `against`"
            )
        if self.above is None and self.below is None:
            raise ConfigError(f"{where}: no rule; write above = X, below = Y or both, before anything runs")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ConfigError(f"{where}: above = {self.above} leaves nothing below = {self.below}")
        if self.seeds < LEAST_SEEDS or not 0 <= self.tail <= 1 or self.minutes < 0:
            raise ConfigError(f"{where}: need seeds >= {LEAST_SEEDS}, 0 <= tail <= 1 and minutes >= 0")

    @property
    def metrics(self) -> Iterator[Metric]:
        """Everything it reads."""
        for text in [self.ours, self.against, *self.curves, *self.show.values()]:
            if text:
                yield Metric.parse(text, self.name)

    @property
    def rule(self) -> dict[str, Any]:
        """What decides, as plain values: it is kept with the run, so that a later change shows."""
        keys = ("ours", "against", "compare", "above", "below", "tail", "seeds")
        return {key: getattr(self, key) for key in keys}

    def measure(self, run: Path) -> tuple[float, float | None, float]:
        """(ours, against, effect) of one seed; DataError where something is not there."""
        ours = Metric.parse(self.ours, self.name).value(run, self.tail)
        if not self.against:
            return ours, None, ours
        against = Metric.parse(self.against, self.name).value(run, self.tail)
        if self.compare == "difference":
            return ours, against, ours - against
        if against == 0:
            raise DataError(f"{run}: {self.against} is 0, nothing can be divided by it")
        return ours, against, ours / against - (self.compare == "change")


def t_interval(values: list[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of independent values by Student's t; None for fewer than two."""
    if len(values) < 2:
        return None
    half = student(len(values) - 1) * math.sqrt(variance(values) / len(values))
    return fmean(values) - half, fmean(values) + half


def decide(claim: Claim, values: list[float]) -> Reproduced:
    """Apply the rule to the effects of the seeds there are."""
    interval = t_interval(values)
    if interval is None or len(values) < claim.seeds:
        return "incomplete"
    low, high = interval
    above, below = (
        (-math.inf if claim.above is None else claim.above),
        (math.inf if claim.below is None else claim.below),
    )
    if above < low and high < below:
        return "yes"
    return "no" if high <= above or low >= below else "could not tell"
