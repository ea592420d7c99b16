"""The memory of a run: which settings, code and parent each stage was made from, and what it took.

`runs/NAME/lineage.json` holds one record per stage, `runs/NAME/ledger.jsonl` one line per attempt: a stage that was
killed and continued has several, and one that failed was paid for too. `decide` compares the records with the recipe
and answers skip, continue or run, or refuses: two settings never share a stage.
"""

import hashlib
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from sputnik.config import from_dict
from sputnik.errors import ConfigError, DataError
from sputnik.files import sibling
from sputnik.hardware import cpu_name, resolve_precision
from sputnik.recipe.recipe import Recipe, Stage
from sputnik.train.loop import machine
from sputnik.train.state import JsonLines, read_jsonl, strict_json, write_json

Decision = Literal["skip", "continue", "run"]
Status = Literal["running", "stopped", "failed", "done"]
ABSENT = "absent"
SOURCES = (".py", ".cpp", ".h", ".toml", ".jinja", ".jsonl")


@dataclass(frozen=True)
class Record:
    """What is known of one stage. `began`: start of the last attempt; seconds and usd sum all attempts."""

    name: str
    kind: str
    parent: str | None
    hash: str
    settings: dict[str, Any]
    code: str
    status: Status
    began: float
    seconds: float = 0.0
    usd: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)


def environment() -> dict[str, Any]:
    """What the figures of a run were measured on, as of its last change."""
    found = {**machine(), "cpu": cpu_name(), "precision": resolve_precision("auto")}
    return {"python": platform.python_version(), **found}


@dataclass(frozen=True)
class Spent:
    seconds: float
    usd: float


class Lineage:
    """The records of one run directory, written whole at each change."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path = run / "lineage.json"
        self.records: dict[str, Record] = {}
        self._written = 0.0
        if self.path.exists():
            self._written = self.path.stat().st_mtime
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))["stages"]
                self.records = {record["name"]: from_dict(Record, record, str(self.path)) for record in stored}
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ConfigError) as error:
                raise DataError(
                    f"{self.path} cannot be read ({error}); put a copy of it back, or start a new run with --name NAME"
                ) from None

    def set(self, record: Record) -> None:
        self.records[record.name] = record
        self._write()

    def forget(self, names: list[str]) -> None:
        """Delete stages with everything they wrote. The record goes first: what is left without one is swept later."""
        for name in names:
            self.records.pop(name, None)
        self._write()
        for name in names:
            shutil.rmtree(self.run / name, ignore_errors=True)

    def _write(self) -> None:
        stages = [asdict(record) for record in self.records.values()]
        write_json(self.path, {"name": self.run.name, "environment": environment(), "stages": stages})

    def book(self, record: Record, attempt: Spent, outcome: str) -> Spent:
        """Add one attempt to the ledger; returns the sum of all attempts at this stage with these settings."""
        ledger = JsonLines(self.run / "ledger.jsonl")
        ledger.write(
            {"stage": record.name, "hash": record.hash, "started": _started(record), "outcome": outcome}
            | asdict(attempt)
        )
        ledger.close()
        return self._spent(record)

    def book_killed(self, price: Callable[[float], Spent]) -> None:
        """Whoever holds the lock of the run knows that nobody is at a stage that is said to be running: its process was
        killed, before it could book the attempt or just after."""
        for record in list(self.records.values()):
            if record.status == "running":
                if _started(record) not in (line["started"] for line in self._attempts(record)):
                    self.book(record, price(self._seconds_of_killed(record)), "killed")
                self.set(replace(record, status="stopped", **asdict(self._spent(record))))

    def _seconds_of_killed(self, record: Record) -> float:
        """It lived at least until the last file it wrote. It began by writing the lineage: in a copy of the run, whose
        files may all be as old as the copy, that is no time at all instead of the days since."""
        places = (self.run / record.name, sibling(self.run / record.name, "partial"))
        touched = [path.stat().st_mtime for place in places for path in place.rglob("*") if path.is_file()]
        began = max(record.began, self._written)
        return max(0.0, max(touched, default=began) - began)

    def _attempts(self, record: Record) -> list[dict[str, Any]]:
        lines = read_jsonl(self.run / "ledger.jsonl")
        return [line for line in lines if (line["stage"], line["hash"]) == (record.name, record.hash)]

    def _spent(self, record: Record) -> Spent:
        lines = self._attempts(record)
        return Spent(sum(line["seconds"] for line in lines), sum(line["usd"] for line in lines))

    def descendants(self, name: str) -> list[str]:
        """`name` and every recorded stage built on it."""
        found = [name]
        for child, record in self.records.items():
            if not {record.parent, *record.inputs}.isdisjoint(found) and child not in found:
                found += self.descendants(child)
        return [stage for stage in dict.fromkeys(found) if stage in self.records]

    def decide(self, recipe: Recipe, without: Collection[str] = ()) -> dict[str, Decision]:
        """What to do with each stage of `recipe` once the stages `without` are deleted. ConfigError if the run holds
        something made from other settings."""
        decisions: dict[str, Decision] = {}
        for stage in recipe.stages:
            record = None if stage.name in without else self.records.get(stage.name)
            if record is None:
                decisions[stage.name] = "run"
            elif record.hash != stage.hash:
                raise ConfigError(self._refusal(stage, record))
            elif record.status == "done" and all(
                (self.run / stage.name / each).exists() for each in ("", *stage.makes)
            ):
                decisions[stage.name] = "skip"
            else:
                decisions[stage.name] = "continue"
        extra = [name for name in self.records if name not in decisions and name not in without]
        if extra:
            raise ConfigError(
                f"{self.run} holds stage {extra[0]!r}, which this recipe does not have; "
                f"delete it with --fresh {extra[0]}, or start a new run with --name NAME"
            )
        return decisions

    def _refusal(self, stage: Stage, record: Record) -> str:
        changes = changed_keys(record.settings, strict_json(stage.settings))  # a tuple is kept as a list
        if record.kind != stage.kind:
            changes.insert(0, f"kind {record.kind} -> {stage.kind}")
        if not changes:
            before, after = ([each.parent, *each.inputs] for each in (record, stage))
            changes = [f"what it stands on, {before} -> {after}, or the settings of that"]
        lost = self.descendants(stage.name)
        also = f" (discards {', '.join(lost)})" if len(lost) > 1 else ""
        return (
            f"{self.run}: stage {stage.name!r} was made with other settings: {'; '.join(changes)}. "
            f"Make it again with --fresh {stage.name}{also}, or keep both with --name NAME"
        )


def _started(record: Record) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.began))


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """ "lr 0.001 -> 0.002" for each key that differs, "families[1].weight 1 -> 2" for what lies deeper."""
    return [f"{where} {old} -> {new}" for where, old, new in _changes("", before, after)]


def _changes(where: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted({*before, *after}):
            inner = f"{where}.{key}" if where else key
            yield from _changes(inner, before.get(key, ABSENT), after.get(key, ABSENT))
    elif isinstance(before, list) and isinstance(after, list):
        for index, (old, new) in enumerate(zip_longest(before, after, fillvalue=ABSENT)):
            yield from _changes(f"{where}[{index}]", old, new)
    elif before != after:
        yield where, before, after


def sources(package: Path) -> list[Path]:
    """All that decides what a stage makes: the kernels' C++, templates and wordings as well as Python."""
    return sorted(path for path in package.rglob("*") if path.suffix in SOURCES)


@cache
def code_version() -> str:
    """Git commit of the checkout if there is one, and a hash of the package's sources in any case."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sources(package):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    content = digest.hexdigest()[:12]
    if not (package.parent / ".git").exists():
        return content
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=package.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return content
    return f"{head.stdout.strip()}/{content}"
