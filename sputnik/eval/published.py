"""The tables of the V3 and R1 reports as data, each cell with its source, and ours beside theirs.

    for cell in table("r1").cells: print(cell.benchmark, cell.model, cell.value, cell.source)
    grid = beside(table("r1"), [load_result(Path("scores.json"))])

A score of ours stands in a column of its own, and only in the row of the very benchmark; a note says how it was
measured and what part of the benchmark it covers, because protocols differ even where names agree. Benchmarks that the
table does not have get rows of their own, without published values.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from sputnik.errors import ConfigError
from sputnik.eval.results import EvalResult
from sputnik.eval.stats import Interval
from sputnik.eval.suites import SUITES


@dataclass(frozen=True)
class Cell:
    benchmark: str
    model: str
    value: float | None
    source: str


@dataclass(frozen=True)
class PublishedTable:
    name: str
    title: str
    protocol: str
    cells: tuple[Cell, ...]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(cell.model for cell in self.cells))

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(cell.benchmark for cell in self.cells))

    @property
    def sources(self) -> dict[str, list[str]]:
        """Source -> models."""
        found: dict[str, list[str]] = {}
        for cell in self.cells:
            models = found.setdefault(cell.source, [])
            models += [cell.model] if cell.model not in models else []
        return found


@dataclass(frozen=True)
class Grid:
    """Text of a table: names of columns, rows with the benchmark first, notes under it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@lru_cache
def tables() -> tuple[PublishedTable, ...]:
    text = (files("sputnik.eval") / "published.toml").read_text(encoding="utf-8")
    found = []
    for each in tomllib.loads(text)["tables"]:
        columns = [(model, group["source"]) for group in each["columns"] for model in group["models"]]
        cells = [
            Cell(benchmark, model, None if value == "-" else float(value), source)
            for benchmark, values in each["rows"].items()
            for (model, source), value in zip(columns, values.split(), strict=True)
        ]
        found.append(PublishedTable(each["name"], each["title"], each["protocol"], tuple(cells)))
    return tuple(found)


def table(name: str) -> PublishedTable:
    """The table called `name`."""
    known = {each.name: each for each in tables()}
    if name not in known:
        raise ConfigError(f"no published table {name!r}; choose one of {', '.join(known)}")
    return known[name]


def beside(published: PublishedTable, ours: Sequence[EvalResult] = ()) -> Grid:
    """The published values and, in a column for each model of ours, our scores with their intervals."""
    values = {(cell.benchmark, cell.model): cell.value for cell in published.cells}
    scores: dict[tuple[str, str], str] = {}
    notes = [f"{source}: {', '.join(models)}" for source, models in published.sources.items()]
    notes.append(f"published protocol: {published.protocol}")
    for result in ours:
        notes.append(f"ours: {_note(result)}")
        for row, score in _rows(result).items():
            scores[row, result.model] = f"{100 * score.mean:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"
    mine = list(dict.fromkeys(result.model for result in ours))
    extra = [row for row, _ in scores if row not in published.benchmarks and " cons@" not in row]
    rows = [
        (
            row,
            *(_shown(values.get((row, model))) for model in published.models),
            *(scores.get((row, m), "-") for m in mine),
        )
        for row in dict.fromkeys([*published.benchmarks, *extra])
    ]
    columns = ("", *published.models, *(f"ours: {name or 'a model'}" for name in mine))
    return Grid(columns, tuple(rows), tuple(notes))


def _rows(result: EvalResult) -> dict[str, Interval]:
    """Names of the rows that hold our scores; a consensus counts only with the same number of votes."""
    name = SUITES[result.suite].benchmark if result.suite in SUITES else ""
    name = name or result.suite or result.task
    return {name: result.pass_at_1, f"{name} cons@{result.k}": result.cons_at_k}


def _note(result: EvalResult) -> str:
    whole = SUITES[result.suite].whole if result.suite in SUITES else 0
    part = f"{result.n} of {whole:,} questions" if whole else f"{result.n} questions"
    decoding = ", ".join(f"{key} {value}" for key, value in result.decoding.items() if key != "k")
    return (
        f"{result.suite or result.task}, {part}, k {result.k}, {decoding}, {100 * result.truncated:.1f} % truncated, "
        f"template {result.template} {result.template_hash}, verifier {result.task} {result.task_version}"
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:g}" if value >= 200 else f"{value:.3f}" if value < 1 else f"{value:.1f}"
