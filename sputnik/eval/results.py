"""From judged answers to a score with all that is needed to doubt it; a pure function of the records.

A cut-off answer is TRUNCATED and an empty one UNPARSEABLE; both, and TIMEOUT, count as not correct. BAD_GOLD and ERROR
(a verifier that broke, a request that failed) are no fault of the model: the question or the sample leaves the
denominator, and `warnings` says so.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from sputnik.errors import DataError, TaskError
from sputnik.eval.records import FAILED, Record
from sputnik.eval.stats import Interval, cons_at_k, pass_at_1, pass_at_k
from sputnik.tasks.base import BestConstant, Problem, Task, Verdict

Groups = Sequence[Sequence[Record]]


@dataclass(frozen=True)
class EvalResult:
    """Lengths are in tokens; shares are of all samples that came."""

    task: str
    task_version: str
    template: str
    template_hash: str
    decoding: dict[str, Any]
    n: int
    k: int
    pass_at_1: Interval
    cons_at_k: Interval
    pass_at_k: dict[str, Interval]
    """By number of samples: "1", "2", "4", ... and k."""
    best_constant: BestConstant
    """What one and the same answer to all questions would score."""
    verdicts: dict[str, int]
    """All seven, zeros too."""
    truncated: float
    well_formed: float
    self_check: float
    length: float
    length_finished: float
    thinking_length: float
    seconds: float
    tokens_per_s: float
    """Generated tokens per second of generation; 0 if all answers were there."""
    warnings: tuple[str, ...]
    """What a reader must know before believing the score; empty when all is well."""
    questions: tuple[tuple[str, float], ...]
    """(problem id, share correct) of every judged question, for paired comparison."""
    samples: tuple[dict[str, Any], ...] = ()
    model: str = ""
    suite: str = ""
    chance: float | None = None
    """What guessing gets, where the choices are given."""
    families: dict[str, Interval] = field(default_factory=dict)
    """pass@1 of each family, if the task is a mixture."""
    usage: dict[str, int] = field(default_factory=dict)
    """Tokens as an endpoint counts them."""

    def to_dict(self, samples: bool = False) -> dict[str, Any]:
        """Plain JSON values; the samples only if asked for, they are long; nothing that does not apply."""
        plain = asdict(self)
        absent = [name for name in ("model", "suite", "chance", "families", "usage") if plain[name] in ("", None, {})]
        return {key: value for key, value in plain.items() if key not in absent and (samples or key != "samples")}

    @property
    def failed(self) -> int:
        """Answers that never came."""
        return sum(sample["finish"] == FAILED for sample in self.samples)


def load_result(path: Path) -> EvalResult:
    """A saved result: what `sputnik eval --out` and evaluation stages write."""
    try:
        return msgspec.convert(json.loads(path.read_text(encoding="utf-8")), EvalResult)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, msgspec.ValidationError) as error:
        raise DataError(f"{path}: no saved result of an evaluation ({error})") from None


@dataclass(frozen=True)
class Setting:
    """What a score was measured with and is not in the records."""

    template: str
    template_hash: str
    decoding: dict[str, Any]
    model: str = ""
    suite: str = ""


def summarise(
    groups: Groups,
    problems: Sequence[Problem],
    task: Task,
    setting: Setting,
    k: int,
    baseline: BestConstant,
    *,
    seconds: float = 0.0,
    tokens_per_s: float = 0.0,
    usage: dict[str, int] | None = None,
) -> EvalResult:
    """The score of the answers to `problems`, group by group. TaskError if not one could be judged."""
    every = [record for group in groups for record in group]
    counts = Counter(record.verdict for record in every)
    judged = judged_groups(groups)
    if not judged:
        detail = next((record.detail for record in every if record.detail), "no detail given")
        raise TaskError(f"task {task.name!r}: no answer could be judged ({detail}); mend what stands in parentheses")
    correct = [[record.correct for record in group] for group in judged]
    came = [record for record in every if record.finish != FAILED]
    finished = [record.length for record in came if record.finish == "stop"]
    most = max(map(len, correct))  # errors may have taken samples from every question
    chances = [problem.meta["chance"] for problem in problems if "chance" in problem.meta]
    return EvalResult(
        task=task.name,
        task_version=task.version,
        template=setting.template,
        template_hash=setting.template_hash,
        decoding={**setting.decoding, "k": k},
        n=len(problems),
        k=k,
        pass_at_1=pass_at_1(correct),
        cons_at_k=cons_at_k(votes(judged)),
        pass_at_k={str(j): pass_at_k(correct, j) for j in powers(k) if j <= most},
        best_constant=baseline,
        verdicts={verdict.value: counts[verdict] for verdict in Verdict},
        truncated=counts[Verdict.TRUNCATED] / len(came),
        well_formed=fmean(record.well_formed for record in came),
        self_check=fmean(record.self_check for record in came),
        length=fmean(record.length for record in came),
        length_finished=fmean(finished) if finished else 0.0,
        thinking_length=fmean(record.thinking_length for record in came),
        seconds=seconds,
        tokens_per_s=tokens_per_s,
        warnings=tuple(_warnings(groups, counts)),
        questions=tuple((group[0].problem_id, fmean(record.correct for record in group)) for group in judged),
        samples=tuple(asdict(record) for record in every),
        model=setting.model,
        suite=setting.suite,
        chance=fmean(chances) if len(chances) == len(problems) else None,
        families=_families(judged),
        usage=usage or {},
    )


def judged_groups(groups: Groups) -> list[list[Record]]:
    """What enters the scores: no question with a bad gold answer, no sample whose verifier broke."""
    sound = [group for group in groups if all(record.verdict != Verdict.BAD_GOLD for record in group)]
    kept = [[record for record in group if record.verdict != Verdict.ERROR] for group in sound]
    return [group for group in kept if group]


def votes(groups: Groups) -> list[list[tuple[str | None, bool]]]:
    return [[(record.vote, record.correct) for record in group] for group in groups]


def powers(k: int) -> list[int]:
    """1, 2, 4, ... and k."""
    return sorted({2**i for i in range(k.bit_length())} | {k})


def _families(groups: Groups) -> dict[str, Interval]:
    names = sorted({record.family for group in groups for record in group if record.family})
    return {
        name: pass_at_1([[record.correct for record in group] for group in groups if group[0].family == name])
        for name in names
    }


def _warnings(groups: Groups, counts: Counter[str]) -> Iterator[str]:
    def first(verdict: Verdict, failed: bool = False) -> str:
        record = next(
            r for group in groups for r in group if r.verdict == verdict and (r.finish == FAILED) == failed
        )  # fmt: skip
        return f"{record.problem_id}: {record.detail or record.gold}"

    total = sum(counts.values())
    failed = sum(record.finish == FAILED for group in groups for record in group)
    if counts[Verdict.BAD_GOLD]:
        bad = sum(any(record.verdict == Verdict.BAD_GOLD for record in group) for group in groups)
        yield f"{bad} of {len(groups)} questions left out, gold answer not readable (first: {first(Verdict.BAD_GOLD)})"
    if failed:
        yield f"{failed} of {total} requests failed and are left out (first: {first(Verdict.ERROR, failed=True)})"
    if broken := counts[Verdict.ERROR] - failed:
        yield f"{broken} of {total} samples left out, verifier broke (first: {first(Verdict.ERROR)})"
    for verdict, fix in ((Verdict.TRUNCATED, "raise max_tokens"), (Verdict.TIMEOUT, "raise the verifier's deadline")):
        if counts[verdict] > total / 10:
            yield f"{counts[verdict]} of {total} samples {verdict.value}, counted as not correct; {fix}"
