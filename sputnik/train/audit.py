"""Is the verifier right? Its errors on answers that people have labelled (docs/rl.md).

    report = audit(task, pool, Path("labelled.jsonl"))     # or labelled_set("arithmetic", task)
    print(report.false_positive)      0.0 % [0.0, 9.2] (n=38, k=1)

A false positive pays a wrong answer, and a policy will find it; a false negative punishes a right one, and the policy
unlearns how people write. A line of the file is {"prompt", "gold", "answer", "correct"}, with "meta" where the task's
verifier needs it. A task of the package has its set in sputnik/tasks/labelled, a task file `mine.py` in
`mine.labelled.jsonl` beside it. Answers that the verifier fails on are counted apart and are in neither rate.

Left out: the answers a policy will invent. The self-check tries some of those (tasks/base.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.table import Table

from sputnik.errors import DataError
from sputnik.eval.judging import accuracy
from sputnik.eval.stats import Interval
from sputnik.tasks.base import Problem, Task, Verdict, load_task
from sputnik.tasks.verify import VerifierPool
from sputnik.train.examples import read_records
from sputnik.train.rollout import UNJUDGED

SHOWN = 8
"""Mistakes in the table; all of them are in the report."""
KEYS: Mapping[str, type] = {"prompt": str, "gold": str, "answer": str, "correct": bool}


@dataclass(frozen=True)
class Labelled:
    """One answer to one question, and whether a person calls it right."""

    problem: Problem
    answer: str
    correct: bool


@dataclass(frozen=True)
class Audit:
    """The rates are None where the set has no such answers."""

    file: str
    task: str
    version: str
    false_positive: Interval | None
    """Share of the wrong answers that are paid."""
    false_negative: Interval | None
    """Share of the right answers that are not."""
    verdicts: dict[str, int]
    mistakes: tuple[dict[str, Any], ...]


def labelled_set(spec: str, task: Task) -> Path | None:
    """The labelled answers that come with a task, if there are any."""
    home, _, _ = spec.partition(":")
    if home.endswith(".py"):
        path = Path(home).with_suffix(".labelled.jsonl")
    else:
        path = Path(str(files("sputnik.tasks"))) / "labelled" / f"{task.name}.jsonl"
    return path if path.is_file() else None


def read_labelled(file: Path) -> list[Labelled]:
    """Every line of the file; the first that is none is an error with its number."""
    found = read_records([file], _labelled, "drop")
    if found.bad:
        raise DataError(
            f'{found.bad[0]}; a line is {{"prompt": ..., "gold": ..., "answer": ..., "correct": true or false}}'
        )
    return [labelled for _, labelled in found.kept]


def _labelled(record: Mapping[str, Any]) -> Labelled:
    for key, kind in KEYS.items():
        if not isinstance(record.get(key), kind):
            raise DataError(f'"{key}" is missing or no {kind.__name__}')
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise DataError('"meta" must be an object')
    return Labelled(
        Problem(prompt=record["prompt"], gold=record["gold"], meta=meta), record["answer"], record["correct"]
    )


def audit(task: Task, pool: VerifierPool, file: Path) -> Audit:
    """Judge every labelled answer; questions are the units of the intervals."""
    labelled = read_labelled(file)
    judgements = pool.verify([(each.problem, each.answer) for each in labelled])
    verdicts = [judgement.verdict for judgement in judgements]
    pairs = [(each, v) for each, v in zip(labelled, verdicts, strict=True) if v not in (*UNJUDGED, Verdict.TIMEOUT)]
    mistakes = tuple(
        {
            "prompt": each.problem.prompt,
            "gold": each.problem.gold,
            "answer": each.answer,
            "correct": each.correct,
            "verdict": verdict.value,
        }
        for each, verdict in pairs
        if each.correct != (verdict is Verdict.CORRECT)
    )
    return Audit(
        str(file),
        task.name,
        task.version,
        _rate([pair for pair in pairs if not pair[0].correct]),
        _rate([pair for pair in pairs if pair[0].correct]),
        {verdict.value: count for verdict, count in Counter(verdicts).items()},
        mistakes,
    )


def _rate(pairs: Sequence[tuple[Labelled, Verdict]]) -> Interval | None:
    wrong = [float(each.correct != (verdict is Verdict.CORRECT)) for each, verdict in pairs]
    return accuracy(wrong, [each.problem.prompt for each, _ in pairs]) if pairs else None


def audit_file(spec: str, options: dict[str, Any], file: Path | None) -> Audit:
    """Load the task and audit it with `file`, or with its own set."""
    task = load_task(spec, options)
    found = file or labelled_set(spec, task)
    if found is None:
        raise DataError(f"task {task.name!r} comes without a labelled set; give one with --audit FILE.jsonl")
    with VerifierPool(spec, options) as pool:
        return audit(task, pool, found)


def audit_table(report: Audit) -> Table:
    title = f"verifier of {report.task}, on answers labelled by people"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("wrong answers paid", _told(report.false_positive))
    table.add_row("right answers not paid", _told(report.false_negative))
    table.add_row("verdicts", ", ".join(f"{name} {count}" for name, count in report.verdicts.items()))
    for mistake in report.mistakes[:SHOWN]:
        label = "right" if mistake["correct"] else "wrong"
        table.add_row(f"{mistake['verdict']}, but {label}", f"{mistake['answer']!r} for {mistake['gold']!r}")
    return table


def _told(rate: Interval | None) -> str:
    return "none in the set" if rate is None else str(rate)
