"""What a run directory says: its files as plain records, tolerant of a run in progress, strict about a broken file.

A missing file is an empty record, because the run may still be going; the last line of a log may be torn for the same
reason. Anything else that does not parse is a DataError naming file and line. Read are recipe.toml, lineage.json and
ledger.jsonl of the run, and metrics.jsonl, eval.json and rollouts.jsonl of each stage.
"""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sputnik.config import load_toml
from sputnik.errors import DataError

MODEL_KINDS = ("pretrain", "sft", "rl")
LISTS = ("samples", "questions")  # parts of eval.json that are evidence for a score and no score themselves


@dataclass(frozen=True)
class Stage:
    """One stage folder and its record in the lineage; `evaluation` is its eval.json."""

    name: str
    kind: str
    path: Path
    record: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    evaluation: Mapping[str, Any] | None = None

    @property
    def status(self) -> str:
        return str(self.record.get("status", "unknown"))

    @property
    def parent(self) -> str | None:
        return self.record.get("parent")

    @property
    def score(self) -> dict[str, Any] | None:
        """The scores of eval.json with their settings, without the answers behind them."""
        if self.evaluation is None:
            return None
        return {key: value for key, value in self.evaluation.items() if key not in LISTS}

    def rollouts(self) -> Iterator[Mapping[str, Any]]:
        """Lines of rollouts.jsonl one by one: the file may be larger than memory."""
        return read_jsonl(self.path / "rollouts.jsonl")

    def alarms(self) -> list[str]:
        """What the guards of a training stage found, in the order of the steps."""
        found = [read_json(path) or {} for path in self.path.glob("alarms/step-*.json")]
        found.sort(key=lambda alarm: number((alarm.get("metrics") or {}).get("step")) or 0.0)
        return [f"{alarm.get('message')} (action: {alarm.get('action')})" for alarm in found]

    def total(self, key: str) -> float | None:
        """Seconds or usd of all attempts: from the lineage, which holds zeros while a stage runs, else the metrics."""
        last = self.metrics[-1] if self.metrics else {}
        return number(self.record.get(key)) or number(last.get(key)) or None

    @property
    def tokens(self) -> float | None:
        """Tokens read in pre-training; in RL, tokens of all answers (mean length times their number)."""
        last = self.metrics[-1] if self.metrics else {}
        if (read := number(last.get("tokens"))) is not None:
            return read
        drawn = [(number(row.get("length")) or 0.0) * sum((row.get("verdicts") or {}).values()) for row in self.metrics]
        drawn += [(number(row.get("general_length")) or 0.0) * row.get("general_answers", 0) for row in self.metrics]
        return math.fsum(drawn) or None

    @property
    def flops(self) -> float | None:
        """FLOPs of all logged steps. Rates of pre-training are of the bare step, so go by tokens; else by the clock."""
        last = self.metrics[-1] if self.metrics else {}
        read, speed, rate = (number(last.get(key)) for key in ("tokens", "tokens_per_s", "flops_per_s"))
        if read and speed and rate:
            return read * rate / speed
        times, rates = column(self.metrics, "flops_per_s", "seconds")
        spans = [now - before for before, now in zip([0.0, *times], times, strict=False)]
        return math.fsum(rate * span for rate, span in zip(rates, spans, strict=True)) or None


@dataclass(frozen=True)
class Run:
    """A run directory as it stands."""

    path: Path
    name: str
    recipe: Mapping[str, Any]
    recipe_text: str
    lineage: Mapping[str, Any]
    ledger: tuple[Mapping[str, Any], ...]
    stages: tuple[Stage, ...]

    def of_kind(self, *kinds: str) -> list[Stage]:
        return [stage for stage in self.stages if stage.kind in kinds]

    @property
    def zero(self) -> Stage | None:
        """R1-Zero: the first reinforcement learning stage."""
        return next(iter(self.of_kind("rl")), None)

    @property
    def base(self) -> Stage | None:
        """The model that R1-Zero started from, or the last pre-trained one."""
        models = self.of_kind("pretrain", "pretrained")
        named = [stage for stage in models if self.zero and self.zero.parent == stage.name]
        return next(reversed(named or self.of_kind("pretrain") or models), None)

    def evaluations(self, model: Stage | None) -> list[Stage]:
        """The stages that hold an eval.json of `model`: itself, and evaluation stages built on it."""
        if model is None:
            return []
        own = [
            stage for stage in self.stages if stage is model or (stage.kind == "eval" and stage.parent == model.name)
        ]
        return [stage for stage in own if stage.evaluation is not None]

    @property
    def missing(self) -> list[str]:
        """What a complete report would need and this directory does not have, one phrase each."""
        gaps = [name for name in ("recipe.toml", "lineage.json") if not (self.path / name).is_file()]
        planned = {stage.parent for stage in self.of_kind("eval")}
        for stage in self.stages:
            if stage.status != "done":
                gaps.append(f"stage {stage.name}: {stage.status}")
            elif stage.kind in MODEL_KINDS and not stage.metrics:
                gaps.append(f"{stage.name}/metrics.jsonl")
            if stage in (self.base, self.zero) and stage.name not in planned and stage.evaluation is None:
                gaps.append(f"an evaluation of {stage.name}")
        wanted = {"a base model": self.base, "a reinforcement learning stage": self.zero}
        return gaps + [words for words, stage in wanted.items() if stage is None]


def read_run(path: Path) -> Run:
    """Read a run directory; a path that is not a directory is a DataError."""
    if not path.is_dir():
        raise DataError(f"{path}: no such run directory; `ls {path.parent}` shows the runs there are")
    recipe_file = path / "recipe.toml"
    recipe = load_toml(recipe_file) if recipe_file.is_file() else {}
    lineage = read_json(path / "lineage.json") or {}
    return Run(
        path=path,
        name=path.resolve().name,
        recipe=recipe,
        recipe_text=recipe_file.read_text(encoding="utf-8") if recipe else "",
        lineage=lineage,
        ledger=tuple(read_jsonl(path / "ledger.jsonl")),
        stages=tuple(_read_stage(path, record) for record in _records(recipe, lineage)),
    )


def _records(recipe: Mapping[str, Any], lineage: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The lineage's records in the recipe's order; stages that have not begun are told by the recipe alone."""
    recorded = {record.get("name"): record for record in lineage.get("stages") or []}
    planned: dict[Any, Mapping[str, Any]] = {}
    for stage in recipe.get("stage") or []:
        parent = stage.get("parent", next(reversed(planned), None)) or None  # "" says that it has none
        name, unknown = stage.get("name"), "unknown" if not lineage else "not started"
        planned[name] = {"name": name, "kind": stage.get("kind"), "parent": parent, "status": unknown}
    return list({**planned, **recorded}.values())


def _read_stage(run: Path, record: Mapping[str, Any]) -> Stage:
    name = str(record.get("name") or "")
    folder = run / name
    if folder.parent != run or name in ("", "..", "."):
        raise DataError(f"{run}: stage name {name!r} is not the name of a folder in the run directory")
    return Stage(
        name=name,
        kind=str(record.get("kind") or name),
        path=folder,
        record=record,
        metrics=tuple(read_jsonl(folder / "metrics.jsonl")),
        evaluation=read_json(folder / "eval.json"),
    )


def discarded(ledger: Iterable[Mapping[str, Any]], kept: Collection[tuple[Any, Any]]) -> dict[str, float] | None:
    """Seconds and usd of attempts that were paid for and stand in no stage any more: deleted, or made again with other
    settings. `kept` holds (name, hash) of every stage there is; None if nothing was thrown away."""
    lost = [line for line in ledger if (line.get("stage"), line.get("hash")) not in kept]
    sums = {key: math.fsum(number(line.get(key)) or 0.0 for line in lost) for key in ("seconds", "usd")}
    return sums if lost else None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); remove it and run the stage again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file; nothing when there is no file. A torn last line is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for index, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                if not line.endswith(b"\n"):
                    return  # the writer is in the middle of this line
                raise DataError(f"{path}:{index}: not valid JSON ({error}); cut the file before this line") from None


def number(value: Any) -> float | None:
    """A finite number, or None: logs may hold null or NaN where a step measured nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def column(rows: Iterable[Mapping[str, Any]], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """(x, y) of the rows where both are finite numbers."""
    pairs = [(number(row.get(x)), number(row.get(key))) for row in rows]
    kept = [(at, value) for at, value in pairs if at is not None and value is not None]
    return [at for at, _ in kept], [value for _, value in kept]
