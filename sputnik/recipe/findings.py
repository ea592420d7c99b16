"""The findings card: every claim of a list of recipes, run over seeds, decided by rule, written down as it came out.

    name = "findings"                        # the run directory: runs/findings
    out = "../docs"                          # where findings.md, findings.json and the plots go
    recipes = ["findings/balance.toml"]      # ordinary recipes that hold [[claim]] tables (findings_claim.py)

`run_card` runs each recipe once for each seed in runs/NAME/RECIPE/seed-N, only the stages its claims read, one after
another. Stages are resumable as everywhere (runner.py), so after a kill the same command goes on where it was. The card
is a function of the run directory and is written again after each seed. What decides a claim is noted before its first
stage runs; a rule that was changed afterwards is marked on the card. A recipe that fails does not stop the others.
"""

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sputnik.config import check_keys, from_dict, load_toml, set_by_path
from sputnik.errors import ConfigError, DataError, SputnikError
from sputnik.recipe.evidence import read_json
from sputnik.recipe.findings_claim import Claim
from sputnik.recipe.lineage import Lineage
from sputnik.recipe.recipe import Kind, Recipe, Stage, read_recipe
from sputnik.recipe.runner import duration, run_lock, run_recipe
from sputnik.train.state import write_json

KEYS = ["name", "out", "recipes"]
MANY = 1000
KindOf = Callable[[str], Kind]


@dataclass(frozen=True)
class Source:
    """A recipe with claims."""

    name: str
    path: Path
    claims: tuple[Claim, ...]
    overrides: tuple[str, ...] = ()

    @property
    def seeds(self) -> int:
        return max(claim.seeds for claim in self.claims)

    def recipe(self, seed: int, kind_of: KindOf) -> Recipe:
        """The recipe of one seed. ConfigError where a claim reads a stage that is not there."""
        recipe = read_recipe(self.path, kind_of, [f"seed={seed}", *self.overrides], name=f"seed-{seed}")
        for claim in self.claims:
            for metric in claim.metrics:
                if metric.stage not in (stage.name for stage in recipe.stages):
                    raise ConfigError(f"{self.path}: claim {claim.name!r} reads {metric}: no such stage")
        return recipe

    def stages(self, recipe: Recipe, seed: int) -> list[Stage]:
        """What the claims need of this seed, in order."""
        read = {metric.stage for claim in self.claims if seed < claim.seeds for metric in claim.metrics}
        needed = read | {below.name for name in read for below in recipe.below(name)}
        return [stage for stage in recipe.stages if stage.name in needed]

    def minutes(self, seed: int) -> float:
        return sum(claim.minutes for claim in self.claims if seed < claim.seeds)


@dataclass(frozen=True)
class Card:
    name: str
    path: Path
    out: Path | None
    """None for a trial, that is with --set or --name and no folder named: it stays in the run directory."""
    sources: tuple[Source, ...]
    most_seeds: int = MANY
    """Of each claim in this call."""


def is_card(path: Path) -> bool:
    """Whether a recipe file is a list of recipes with claims."""
    return "recipes" in load_toml(path)


def read_card(path: Path, overrides: Sequence[str] = (), name: str | None = None) -> Card:
    """Read a card and its recipes. `overrides`: seeds=N, out=FOLDER, or RECIPE.STAGE.KEY=VALUE for one recipe."""
    data = load_toml(path)
    check_keys(data, KEYS, str(path))
    files = data.get("recipes")
    if not isinstance(files, list) or not files:
        raise ConfigError(f'{path}: recipes must be a list of files, as recipes = ["findings/balance.toml"]')
    own: dict[str, Any] = {}
    for assignment in overrides:
        if "." not in assignment.partition("=")[0]:
            set_by_path(own, assignment)
    check_keys(own, ["out", "seeds"], "--set")
    out = None if overrides or name is not None else path.parent / str(data.get("out", "."))
    sources = tuple(_source(path.parent / file, overrides) for file in files)
    names = [source.name for source in sources]
    for assignment in overrides:
        recipe, dot, _ = assignment.partition("=")[0].partition(".")
        if dot and recipe not in names:
            raise ConfigError(f"--set {assignment}: no recipe {recipe!r}; there are {', '.join(names)}")
    claims = [claim.name for source in sources for claim in source.claims]
    if twice := {each for each in [*names, *claims] if [*names, *claims].count(each) > 1}:
        raise ConfigError(f"{path}: two recipes or claims are called {', '.join(sorted(twice))}; rename one")
    seeds = own.get("seeds", MANY)
    if not isinstance(seeds, int) or seeds < 1:
        raise ConfigError(f"--set seeds={seeds}: a whole number of at least 1")
    run = name or str(data.get("name", path.stem))
    return Card(run, path, Path(str(own["out"])) if "out" in own else out, sources, seeds)


def _source(path: Path, overrides: Sequence[str]) -> Source:
    """A claim's name is also the name of its plot."""
    tables = load_toml(path).get("claim")
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"{path}: no claims; write one [[claim]] table for each")
    claims = tuple(from_dict(Claim, table, f"{path}: claim {n}") for n, table in enumerate(tables, 1))
    prefix = f"{path.stem}."
    mine = tuple(each.removeprefix(prefix) for each in overrides if each.startswith(prefix))
    return Source(path.stem, path, claims, mine)


def chosen(card: Card, only: Collection[str]) -> tuple[Source, ...]:
    """The recipes with the claims named in `only` (claims or whole recipes); all of them for none."""
    known = [name for source in card.sources for name in (source.name, *(claim.name for claim in source.claims))]
    for name in only:
        if name not in known:
            raise ConfigError(f"--only {name}: no such claim or recipe; there are {', '.join(known)}")
    kept = []
    for source in card.sources:
        claims = tuple(c for c in source.claims if not only or source.name in only or c.name in only)
        if claims:
            kept.append(replace(source, claims=claims))
    return tuple(kept)


@dataclass
class Unit:
    """A recipe with one seed, and what is left of it."""

    source: Source
    seed: int
    recipe: Recipe
    needed: list[Stage]
    todo: list[Stage]
    estimate: float
    """Seconds in all, by the recipe's own words."""
    spent: float = 0.0
    usd: float = 0.0

    def book(self, lineage: Lineage) -> None:
        """Seconds and money of all attempts so far."""
        records = [lineage.records[stage.name] for stage in self.needed if stage.name in lineage.records]
        self.spent, self.usd = sum(each.seconds for each in records), sum(each.usd for each in records)


def run_card(
    card: Card,
    runs: Path,
    kind_of: KindOf,
    console: Console,
    write: Callable[[Card, Path, KindOf, bool], object],
    only: Collection[str] = (),
    fresh: str | None = None,
    seeds: Collection[int] = (),
) -> Path:
    """Run what is not finished and `write` the card after each seed, with its plots at the end; returns the run
    directory. `only` these claims or recipes, `seeds` these alone: another process may be at others. `fresh` first
    deletes a recipe, or RECIPE.STAGE with all that stands on it, in every seed. A recipe that failed is a SputnikError
    at the end."""
    run = runs / card.name
    failed: list[str] = []
    if fresh is not None:
        _forget(card, run, fresh)
    units = [_unit(run, source, seed, kind_of) for source, seed in _pairs(card, only, seeds)]
    console.print(_plan(units))
    for unit in units:
        _keep_rules(run / unit.source.name, unit.source)
    try:
        for unit in units:
            write(card, run, kind_of, False)
            try:
                _run_unit(unit, units, run, kind_of, console)
            except SputnikError as error:
                failed.append(f"{unit.source.name} seed {unit.seed}")
                console.print(f"{failed[-1]} failed: {error}", style="red", soft_wrap=True)
    finally:
        write(card, run, kind_of, True)
    if failed:
        raise DataError(f"{len(failed)} of {len(units)} runs failed ({', '.join(failed)}); the card says so")
    return run


def _pairs(card: Card, only: Collection[str], seeds: Collection[int]) -> Iterator[tuple[Source, int]]:
    sources = chosen(card, only)
    for seed in seeds:
        if not 0 <= seed < max(source.seeds for source in sources):
            raise ConfigError(f"--seeds: {seed}: no claim asks for it; seeds count from 0")
    for source in sources:
        for seed in range(min(source.seeds, card.most_seeds)):
            if not seeds or seed in seeds:
                yield source, seed


def _unit(run: Path, source: Source, seed: int, kind_of: KindOf) -> Unit:
    recipe = source.recipe(seed, kind_of)
    try:
        lineage = Lineage(run / source.name / recipe.name)
        decisions = lineage.decide(recipe)
    except ConfigError as error:  # its advice is for a run of its own
        raise ConfigError(str(error).replace("--fresh ", f"--fresh {source.name}.")) from None
    needed = source.stages(recipe, seed)
    todo = [stage for stage in needed if decisions[stage.name] != "skip"]
    unit = Unit(source, seed, recipe, needed, todo, 60 * source.minutes(seed))
    unit.book(lineage)
    return unit


def _run_unit(unit: Unit, units: Sequence[Unit], run: Path, kind_of: KindOf, console: Console) -> None:
    folder = run / unit.source.name
    while unit.todo:
        stage = unit.todo[0]
        spent, usd = sum(each.spent for each in units), sum(each.usd for each in units)
        console.print(
            f"[bold]{unit.source.name}[/] seed {unit.seed} ({units.index(unit) + 1} of {len(units)}), {stage.name}: "
            f"{duration(spent)} (${usd:.3f}) so far, about {duration(left(units))} left"
        )
        with (folder / f"{unit.recipe.name}.log").open("a", encoding="utf-8") as log:
            quiet = Console(file=log, width=120)
            try:
                run_recipe(unit.recipe, folder, kind_of, quiet, only=stage.name)
            finally:
                unit.book(Lineage(folder / unit.recipe.name))
        unit.todo.pop(0)


def left(units: Sequence[Unit]) -> float:
    """Seconds: the estimates of the recipes, corrected by what their finished seeds took, or else by what all did."""
    done = [unit for unit in units if not unit.todo and unit.estimate]
    pace = sum(unit.spent for unit in done) / sum(unit.estimate for unit in done) if done else 1.0
    total = 0.0
    for unit in units:
        if unit.todo:
            same = [each.spent for each in done if each.source.name == unit.source.name]
            whole = sum(same) / len(same) if same else pace * unit.estimate
            total += max(0.0, whole - unit.spent)
    return total


def _keep_rules(folder: Path, source: Source) -> None:
    """Note what decides each claim, once and for all: before its first stage."""
    path = folder / "rules.json"
    kept = read_json(path) or {}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {claim.name: claim.rule for claim in source.claims} | kept)


def _forget(card: Card, run: Path, name: str) -> None:
    source, _, stage = name.partition(".")
    if source not in (each.name for each in card.sources):
        raise ConfigError(f"--fresh {name}: no such recipe; there are {', '.join(s.name for s in card.sources)}")
    folders = [path.parent for path in sorted((run / source).glob("seed-*/lineage.json"))]
    with contextlib.ExitStack() as held:
        for folder in folders:  # of a seed that another process is at, nothing is deleted
            held.enter_context(run_lock(folder))
        if not stage:
            shutil.rmtree(run / source, ignore_errors=True)
            return
        for folder in folders:
            lineage = Lineage(folder)
            if stage in lineage.records:
                lineage.forget(lineage.descendants(stage))


def _plan(units: Sequence[Unit]) -> Table:
    table = Table(title=f"{len(units)} runs, about {duration(left(units))}", title_justify="left")
    for column in ("recipe", "seed", "claims", "stages left", "minutes a seed"):
        table.add_column(column, overflow="fold")
    for unit in units:
        claims = ", ".join(claim.name for claim in unit.source.claims if unit.seed < claim.seeds)
        todo = ", ".join(stage.name for stage in unit.todo) or "none"
        table.add_row(unit.source.name, str(unit.seed), claims, todo, f"{unit.source.minutes(unit.seed):g}")
    return table
