"""A recipe: one TOML file that names the stages of a run in order.

    name = "quickstart"            # the run directory: runs/quickstart
    seed = 0
    hardware = "cpu"               # whose price the ledger counts: cpu, H100, 8xH800 ...

    [model]
    preset = "tiny"                # further keys are fields of ModelConfig

    [tasks.sums]                   # for stages that write task = "sums"
    task = "arithmetic"
    task_options = { non_negative = true }

    [[stage]]
    name = "base"
    kind = "pretrain"              # see sputnik/recipe/stages.py
    parent = "corpus"              # default: the stage above; "" for none
    inputs = ["traces"]            # other stages it reads, all above it
    steps = 400                    # everything else is a key of that stage's config

A stage whose kind makes a model may carry a table `model` of its own. This module reads and checks; nothing runs here.
Unknown keys, unknown kinds and parents that do not stand above their child are errors that name the place.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from sputnik.config import check_keys, config_hash, from_dict, load_toml, set_by_path, to_dict
from sputnik.errors import ConfigError
from sputnik.model.config import ModelConfig
from sputnik.text.sources import SOURCES

TOP_KEYS = ["name", "seed", "hardware", "model", "tasks"]
TASK_KEYS = ["task", "task_options"]
STAGE_KEYS = ["name", "kind", "parent", "inputs", "model"]


@dataclass(frozen=True)
class Kind:
    """A kind of stage: its config class and its function.

    `run(config, context)` returns a few figures for the lineage. A `resumable` one writes into its directory as it goes
    and continues by itself when called again; any other gets a fresh directory that appears only when it is complete.
    `needs_model` puts the [model] table of recipe or stage into the stage's hash; `outcome_free` keys stay out of it.
    So that runs of earlier versions go on, keys that were `added` stay out of it, too, while they have the value given
    here, and keys that are `gone` are in it with theirs.
    One that `stands_alone` has no parent unless the recipe names one.
    `headline` names the figures that are shown when a stage ends; all of them are in the lineage.
    `makes` names files and folders that others read: a finished stage that has lost one is gone on with.
    """

    config: type
    run: Callable[[Any, Any], Mapping[str, Any]]
    resumable: bool = False
    needs_model: bool = False
    stands_alone: bool = False
    outcome_free: frozenset[str] = frozenset()
    added: Mapping[str, Any] = field(default_factory=dict)
    gone: Mapping[str, Any] = field(default_factory=dict)
    headline: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage with all that decides its result; `hash` covers that and, through the parent, everything before."""

    name: str
    kind: str
    parent: str | None
    config: Any
    settings: Mapping[str, Any]
    hash: str
    inputs: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    """The shape it is to make, if its kind makes one: the stage's own table or the recipe's."""
    makes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    name: str
    seed: int
    hardware: str
    model: Mapping[str, Any]
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = ", ".join(stage.name for stage in self.stages)
        raise ConfigError(f"recipe {self.name!r} has no stage {name!r}; it has {known}")

    def ancestors(self, name: str) -> list[Stage]:
        """The parents of a stage, nearest first."""
        found: list[Stage] = []
        parent = self.stage(name).parent
        while parent is not None:
            found.append(self.stage(parent))
            parent = found[-1].parent
        return found

    def below(self, name: str) -> list[Stage]:
        """Every stage that `name` stands on, through parents and inputs, in the order of the recipe."""
        found: set[str] = set()
        open_ones = [self.stage(name)]
        while open_ones:
            stage = open_ones.pop()
            needed = {*stage.inputs, *([stage.parent] if stage.parent else [])} - found
            found |= needed
            open_ones += map(self.stage, needed)
        return [stage for stage in self.stages if stage.name in found]

    def to_toml(self) -> str:
        """The recipe with every default written out; running it again gives the same hashes."""
        top = {"name": self.name, "seed": self.seed, "hardware": self.hardware, "model": dict(self.model)}
        return tomli_w.dumps({**top, "stage": [self._table(stage) for stage in self.stages]})

    def _table(self, stage: Stage) -> dict[str, Any]:
        table: dict[str, Any] = {"name": stage.name, "kind": stage.kind, "parent": stage.parent or ""}
        if stage.inputs:
            table["inputs"] = list(stage.inputs)
        if stage.model and stage.model != self.model:
            table["model"] = dict(stage.model)
        return table | to_dict(stage.config)


def read_recipe(
    path: Path, kind_of: Callable[[str], Kind], overrides: Iterable[str] = (), name: str | None = None
) -> Recipe:
    """Read `path`, apply each "stage.key=value" of `overrides`, check every key against the stage's config class."""
    data = load_toml(path)
    tables = data.pop("stage", [])
    data.pop("claim", None)  # what the run is to show: findings_claim.py reads it
    check_keys(data, TOP_KEYS, str(path))
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: no stages; write one [[stage]] table for each")
    for number, table in enumerate(tables, 1):
        for key in ("name", "kind"):
            if not isinstance(table.get(key), str):
                raise ConfigError(f'{path}: stage {number} has no {key}; write {key} = "..."')
    by_name = {table["name"]: table for table in tables}
    if len(by_name) < len(tables) or set(by_name) & {*TOP_KEYS, "stage"}:
        raise ConfigError(f"{path}: stage names must differ from each other and from {', '.join(TOP_KEYS)}")
    for called in by_name:  # it becomes a folder of the run, and is deleted with all it holds
        if not re.fullmatch(r"[\w-]+", called):
            raise ConfigError(f"{path}: stage {called!r}: name it with letters, digits, - and _ alone")
    everything = {**data, **by_name}
    for assignment in overrides:
        set_by_path(everything, assignment)
        check_keys(everything, [*TOP_KEYS, *by_name], f"--set {assignment}")
    top = {key: everything[key] for key in TOP_KEYS if key in everything}
    run_name = name or top.get("name", path.stem)
    if not isinstance(run_name, str) or not run_name or "/" in run_name or run_name.startswith("."):
        raise ConfigError(f"{path}: name = {run_name!r}: a run is named by one plain folder name")
    seed, model, tasks = top.get("seed", 0), top.get("model", {}), top.get("tasks", {})
    if not isinstance(seed, int) or not isinstance(model, dict) or not _is_table_of_tables(tasks):
        raise ConfigError(f"{path}: seed must be a whole number, model a table and tasks a table of tables")
    for called, table in tasks.items():
        check_keys(table, TASK_KEYS, f"{path}: tasks.{called}")
        if "task" not in table:
            raise ConfigError(f'{path}: tasks.{called} has no task; write task = "..."')
    by_name = {key: _with_task(table, tasks) for key, table in by_name.items()}
    stages = tuple(_stages(path, by_name, kind_of, seed, model))
    return Recipe(run_name, seed, str(top.get("hardware", "cpu")), model, stages)


def _is_table_of_tables(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(table, dict) for table in value.values())


def _with_task(table: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A stage's table with the task that [tasks] describes under its name; options of its own overrule those there."""
    found = tasks.get(table.get("task", ""))
    if found is None:
        return dict(table)
    own = {key: value for key, value in table.items() if key != "task"}
    if isinstance(own.get("task_options"), dict):
        own["task_options"] = found.get("task_options", {}) | own["task_options"]
    return {**found, **own}


def _stages(
    path: Path,
    tables: Mapping[str, dict[str, Any]],
    kind_of: Callable[[str], Kind],
    seed: int,
    model: Mapping[str, Any],
) -> Iterator[Stage]:
    hashes: dict[str, str] = {}
    above: str | None = None
    for name, table in tables.items():
        where = f"{path}: stage {name!r}"
        kind = kind_of(table["kind"])
        parent = table.get("parent", None if kind.stands_alone else above) or None
        inputs = table.get("inputs", [])
        if not isinstance(inputs, list) or len(set(map(str, inputs))) < len(inputs):
            raise ConfigError(f"{where}: inputs must be a list of stage names, each of them once")
        for below in [*inputs, *([parent] if parent else [])]:
            if not isinstance(below, str) or below not in hashes:
                raise ConfigError(f"{where}: {below!r} does not stand above it")
        own = {key: value for key, value in table.items() if key not in STAGE_KEYS}
        known = [field.name for field in fields(kind.config)]
        check_keys(own, known, where)
        if "seed" in known:
            own.setdefault("seed", seed)
        config: Any = from_dict(kind.config, own, where)
        settings = {
            key: value
            for key, value in {**kind.gone, **to_dict(config)}.items()
            if key not in kind.outcome_free and (key not in kind.added or kind.added[key] != value)
        }
        settings |= _input_files(settings)
        shape = table.get("model", model) if kind.needs_model else {}
        if "model" in table and not (kind.needs_model and isinstance(shape, dict)):
            raise ConfigError(f"{where}: a stage of kind {table['kind']} makes no model of its own; drop its `model`")
        if kind.needs_model:
            model_config(shape, f"{path}: [model]" if shape is model else f"{where}: model")
            settings |= {f"model.{key}": value for key, value in shape.items()}
        made_of = {"kind": table["kind"], "parent": parent and hashes[parent], "settings": settings}
        if inputs:
            made_of["inputs"] = {below: hashes[below] for below in inputs}
        hashes[name] = config_hash(made_of)
        yield Stage(name, table["kind"], parent, config, settings, hashes[name], tuple(inputs), shape, kind.makes)
        above = name


def model_config(table: Mapping[str, Any], where: str, **changes: Any) -> ModelConfig:
    """The shape a [model] table describes: a preset, some of its fields changed, and `changes` on top."""
    own = {key: value for key, value in table.items() if key != "preset"}
    if not isinstance(table.get("preset"), str):
        raise ConfigError(f'{where}: no preset; write preset = "tiny" and the fields to change')
    return from_dict(ModelConfig, to_dict(ModelConfig.preset(table["preset"])) | own | changes, where)


def _input_files(settings: Mapping[str, Any]) -> dict[str, str]:
    """ "file PATH" -> content hash, for each setting that names a file, and each folder or pattern of texts: another
    task file is another stage."""
    found: dict[str, str] = {}
    for name in {*settings.get("texts", ()), *settings.get("foreign_texts", ())}:
        if files := _files_of(name):
            whole = hashlib.sha256()
            for file in files:
                whole.update(f"{file}\0".encode() + file.read_bytes())
            found[f"file {name}"] = whole.hexdigest()[:16]
    for text in _texts(settings):
        if 0 < len(text) < 500:
            for spelling in {text, text.rpartition(":")[0], text.partition(":")[2]} - {""}:
                path = Path(spelling)
                if path.suffix and os.path.isfile(path):  # noqa: PTH113 - Path's raises where a text is too long for a name
                    found[f"file {path}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def _files_of(name: str) -> list[Path]:
    """What text/sources.py reads in a folder or for a pattern; nothing for other names."""
    if name in {source.name for source in SOURCES}:
        return []
    path = Path(name)
    pattern = not path.is_absolute() and re.search(r"[*?[]", name)
    every = path.rglob("*") if path.is_dir() else Path().glob(name) if pattern else ()
    return sorted(file for file in every if file.is_file())


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, however deep: the families of a mixture name their files in a list of tables."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
