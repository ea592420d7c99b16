"""Run a recipe: every stage in order, each once, resumable, with its lineage and its price.

    run_recipe(read_recipe(Path("recipes/quickstart.toml"), kind_of), Path("runs"), console)

Running again skips finished stages whose settings and ancestors are unchanged, continues an unfinished one, and refuses
to mix two settings in one directory. A failed stage leaves nothing half-written: it either resumes from what it saved,
or its directory was never there. One process per run directory; a lock says who.

Left out: stages in parallel, several machines.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sputnik.errors import ConfigError, DataError, SputnikError
from sputnik.files import replace_directory, write_whole
from sputnik.hardware import fleet
from sputnik.recipe.evidence import discarded, read_jsonl
from sputnik.recipe.lineage import (
    Decision,
    Lineage,
    Record,
    Spent,
    Status,
    code_version,
)
from sputnik.recipe.recipe import Kind, Recipe, Stage
from sputnik.train.state import strict_json, sweep_drafts


@dataclass(frozen=True)
class StageContext:
    """What a stage is given beside its own config."""

    directory: Path
    """Where it writes; empty on the first attempt of a resumable stage, and always for any other."""
    parent: Path | None
    """Directory of the parent stage."""
    ancestors: Mapping[str, Path]
    """Kind -> directory of the nearest ancestor of that kind, e.g. the corpus of a base model."""
    run: Path
    recipe: Recipe
    console: Console
    inputs: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    """Name -> directory of the other stages it was told to read."""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The [model] table it is to follow."""


def run_recipe(
    recipe: Recipe,
    runs: Path,
    kind_of: Callable[[str], Kind],
    console: Console,
    only: str | None = None,
    fresh: str | None = None,
) -> Path:
    """Run all stages (or one, `only`) into `runs/NAME`; `fresh` first deletes that stage and all built on it."""
    run = runs / recipe.name
    existed = run.exists()
    if only is not None:
        recipe.stage(only)
    _price(0.0, recipe)  # hardware that nobody knows is refused now, not when the first stage is done
    with run_lock(run):
        try:
            lineage = Lineage(run)
            _require_lineage(lineage, recipe)
            doomed = _doomed(lineage, fresh) if fresh is not None else []
            decisions = lineage.decide(recipe, without=doomed)
            if only is not None:
                _require_ancestors(recipe, decisions, only)
            lineage.book_killed(lambda seconds: _price(seconds, recipe))
            if doomed:
                lineage.forget(doomed)
            todo = [stage for stage in recipe.stages if only in (None, stage.name)]
            console.print(plan_table(recipe, decisions, {stage.name for stage in todo}))
            for number, stage in enumerate(todo, 1):
                title = f"[bold]\\[{number}/{len(todo)}] {stage.name}[/] ({stage.kind})"
                if decisions[stage.name] == "skip":
                    _say_skipped(lineage.records[stage.name], title, console)
                    continue
                console.print(
                    title if decisions[stage.name] == "run" else f"{title}: continuing{_other_code(lineage, stage)}"
                )
                write_whole(run / "recipe.toml", recipe.to_toml())
                _run_stage(stage, recipe, kind_of(stage.kind), lineage, console)
        except BaseException:
            if not existed:
                _remove_if_bare(run)
            raise
    console.print(ledger_table(recipe, lineage))
    return run


def _require_lineage(lineage: Lineage, recipe: Recipe) -> None:
    """Without it nobody knows what the stages were made from: they would be made again from nothing. A damaged ledger
    is told now, not when the first stage is done and to be booked."""
    list(read_jsonl(lineage.run / "ledger.jsonl"))
    there = [stage.name for stage in recipe.stages if (lineage.run / stage.name).is_dir()]
    if there and not lineage.path.exists():
        raise DataError(
            f"{lineage.run} holds stage {there[0]!r}, but no {lineage.path.name} to know it by: put that back, delete "
            "the run, or start a new one with --name NAME"
        )


def _doomed(lineage: Lineage, name: str) -> list[str]:
    """The stage to make again, and all that stands on it."""
    if name not in lineage.records:
        known = ", ".join(lineage.records) or "none yet"
        raise ConfigError(f"--fresh {name}: {lineage.run} has no such stage; it holds {known}")
    return lineage.descendants(name)


def _require_ancestors(recipe: Recipe, decisions: Mapping[str, Decision], only: str) -> None:
    for below in recipe.below(only):
        if decisions[below.name] != "skip":
            raise ConfigError(f"--only {only}: it needs {below.name!r}, which is not finished; run that one first")


def _run_stage(stage: Stage, recipe: Recipe, kind: Kind, lineage: Lineage, console: Console) -> None:
    """One attempt at one stage, booked whatever its end."""
    run, directory = lineage.run, lineage.run / stage.name
    before = lineage.records.get(stage.name)
    if before is None:
        shutil.rmtree(directory, ignore_errors=True)  # of a stage that was being deleted when its process died
    began, clock = time.time(), time.monotonic()
    running = Record(
        stage.name, stage.kind, stage.parent, stage.hash, dict(stage.settings), code_version(), "running", began,
        inputs=list(stage.inputs),
    )  # fmt: skip
    lineage.set(running)
    try:
        with _workplace(directory, kind.resumable) as workplace:
            result = kind.run(stage.config, _context(stage, recipe, run, workplace, console))
    except BaseException as error:
        outcome: Status = "stopped" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        with contextlib.suppress(OSError):  # the disk may be full; the first error is the one to show
            _close(running, lineage, _price(time.monotonic() - clock, recipe), outcome, {})
        raise
    total = _close(running, lineage, _price(time.monotonic() - clock, recipe), "done", result)
    figures = "".join(f", {key} {_short(result[key])}" for key in kind.headline if key in result)
    console.print(f"    {stage.name} done in {duration(total.seconds)}, ${total.usd:.4f}{figures}", soft_wrap=True)


def _close(running: Record, lineage: Lineage, attempt: Spent, outcome: Status, result: Mapping[str, Any]) -> Spent:
    """Book an attempt and write how it ended; a stage that left nothing behind is forgotten."""
    total = lineage.book(running, attempt, outcome)
    if not (lineage.run / running.name).exists():
        lineage.forget([running.name])
        return total
    lineage.set(
        dataclasses.replace(
            running, status=outcome, seconds=total.seconds, usd=total.usd, result=strict_json(dict(result))
        )
    )
    return total


def _context(stage: Stage, recipe: Recipe, run: Path, workplace: Path, console: Console) -> StageContext:
    ancestors = {ancestor.kind: run / ancestor.name for ancestor in reversed(recipe.ancestors(stage.name))}
    parent = run / stage.parent if stage.parent else None
    inputs = {name: run / name for name in stage.inputs}
    return StageContext(workplace, parent, ancestors, run, recipe, console, inputs, stage.model)


@contextlib.contextmanager
def _workplace(directory: Path, resumable: bool) -> Iterator[Path]:
    """The stage's directory; one that cannot resume is filled under another name and renamed when complete."""
    if not resumable:
        with replace_directory(directory) as temporary:
            yield temporary
        return
    directory.mkdir(exist_ok=True)
    try:
        yield directory
    except SputnikError:
        if not any(path.is_file() and path.name != ".lock" for path in directory.rglob("*")):
            shutil.rmtree(directory)
        raise


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run directory. A POSIX lock: it dies with this process and is not inherited by its workers."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise DataError(f"{run} is in use by process {owner}; wait for it, or choose another --name") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for folder in (run, *filter(Path.is_dir, run.rglob("*"))):
            sweep_drafts(folder)
        yield


def _remove_if_bare(run: Path) -> None:
    """Drop a run directory this call made, if no stage has left anything in it."""
    if not any(path.is_dir() for path in run.iterdir()):
        shutil.rmtree(run)


def _price(seconds: float, recipe: Recipe) -> Spent:
    device, count = fleet(recipe.hardware)
    return Spent(seconds, seconds * device.usd_per_hour * count / 3600)


def _say_skipped(record: Record, title: str, console: Console) -> None:
    note = "" if record.code == code_version() else f", made by code {record.code}"
    console.print(f"{title}: finished before, unchanged{note}")


def _other_code(lineage: Lineage, stage: Stage) -> str:
    """A warning where a result may differ from an unbroken run."""
    begun = lineage.records[stage.name].code
    return "" if begun == code_version() else f"; [yellow]begun by code {begun}, this is {code_version()}[/]"


def plan_table(recipe: Recipe, decisions: Mapping[str, Decision], todo: set[str]) -> Table:
    """What will happen, before it happens: each stage with the settings that are not defaults."""
    table = Table(title=f"run {recipe.name}, seed {recipe.seed}, {recipe.hardware}", title_justify="left")
    for column in ("stage", "kind", "on", "to do", "settings"):
        table.add_column(column, overflow="fold")
    for stage in recipe.stages:
        decision = decisions[stage.name] if stage.name in todo else "-"
        on = ", ".join([*([stage.parent] if stage.parent else []), *stage.inputs])
        table.add_row(stage.name, stage.kind, on, decision, _not_default(stage.config))
    return table


def _not_default(config: Any) -> str:
    told = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            told.append(f"{field.name} {_short(value)}")
    return ", ".join(told)


def ledger_table(recipe: Recipe, lineage: Lineage) -> Table:
    """What each stage took, what was thrown away, and the sum."""
    table = Table(title=f"ledger of {lineage.run}", title_justify="left")
    table.add_column("stage")
    table.add_column("state")
    table.add_column("time", justify="right")
    table.add_column("usd", justify="right")
    records = {stage.name: lineage.records[stage.name] for stage in recipe.stages if stage.name in lineage.records}
    for name, record in records.items():
        table.add_row(name, record.status, duration(record.seconds), f"{record.usd:.4f}")
    kept = {(record.name, record.hash) for record in lineage.records.values()}
    lost = discarded(read_jsonl(lineage.run / "ledger.jsonl"), kept) or {"seconds": 0.0, "usd": 0.0}
    if lost["seconds"]:
        table.add_row("thrown away", "", duration(lost["seconds"]), f"{lost['usd']:.4f}")
    table.add_section()
    seconds = lost["seconds"] + sum(record.seconds for record in records.values())
    usd = lost["usd"] + sum(record.usd for record in records.values())
    table.add_row("total", "", duration(seconds), f"{usd:.4f}")
    return table


def duration(seconds: float) -> str:
    """ "7.2 s", "3 min 05 s", "2 h 03 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
