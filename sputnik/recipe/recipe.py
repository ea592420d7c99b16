"""A recipe: one TOML file that names the stages of a run in order.

    name = "quickstart"            # the run directory: runs/quickstart
    seed = 0
    hardware = "cpu"               # whose price the ledger counts: cpu, H100, 8xH800 ...

    [model]
    preset = "tiny"                # further keys are fields of ModelConfig

    [[stage]]
    name = "base"
    kind = "pretrain"              # see sputnik/recipe/stages.py
    parent = "corpus"              # default: the stage above
    steps = 400                    # everything else is a key of that stage's config

This module reads and checks; nothing here runs. Unknown keys, unknown kinds and parents that do not stand above their
child are errors that name the place.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w

from sputnik.config import check_keys, config_hash, from_dict, load_toml, set_by_path, to_dict
from sputnik.errors import ConfigError
from sputnik.model.config import ModelConfig

TOP_KEYS = ["name", "seed", "hardware", "model"]
STAGE_KEYS = ["name", "kind", "parent"]


@dataclass(frozen=True)
class Kind:
    """A kind of stage: its config class and its function.

    `run(config, context)` returns a few figures for the lineage. A `resumable` one writes into its directory as it goes
    and continues by itself when called again; any other gets a fresh directory that appears only when it is complete.
    `needs_model` puts the recipe's [model] table into the hash of the stage; `outcome_free` keys stay out of it.
    `headline` names the figures that are shown when a stage ends; all of them are in the lineage.
    """

    config: type
    run: Callable[[Any, Any], Mapping[str, Any]]
    resumable: bool = False
    needs_model: bool = False
    outcome_free: frozenset[str] = frozenset()
    headline: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage with all that decides its result; `hash` covers that and, through the parent, everything before."""

    name: str
    kind: str
    parent: str | None
    config: Any
    settings: Mapping[str, Any]
    hash: str


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

    def to_toml(self) -> str:
        """The recipe with every default written out; running it again gives the same hashes."""
        top = {"name": self.name, "seed": self.seed, "hardware": self.hardware, "model": dict(self.model)}
        stages = [
            {"name": s.name, "kind": s.kind, **({"parent": s.parent} if s.parent else {}), **to_dict(s.config)}
            for s in self.stages
        ]
        return tomli_w.dumps({**top, "stage": stages})


def read_recipe(
    path: Path, kind_of: Callable[[str], Kind], overrides: Iterable[str] = (), name: str | None = None
) -> Recipe:
    """Read `path`, apply each "stage.key=value" of `overrides`, check every key against the stage's config class."""
    data = load_toml(path)
    tables = data.pop("stage", [])
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
    everything = {**data, **by_name}
    for assignment in overrides:
        set_by_path(everything, assignment)
        check_keys(everything, [*TOP_KEYS, *by_name], f"--set {assignment}")
    top = {key: everything[key] for key in TOP_KEYS if key in everything}
    run_name = name or top.get("name", path.stem)
    if not isinstance(run_name, str) or not run_name or "/" in run_name or run_name.startswith("."):
        raise ConfigError(f"{path}: name = {run_name!r}: a run is named by one plain folder name")
    seed, model = top.get("seed", 0), top.get("model", {})
    if not isinstance(seed, int) or not isinstance(model, dict):
        raise ConfigError(f"{path}: seed must be a whole number and model a table")
    stages = tuple(_stages(path, by_name, kind_of, seed, model))
    return Recipe(run_name, seed, str(top.get("hardware", "cpu")), model, stages)


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
        parent = table.get("parent", above)
        if parent is not None and parent not in hashes:
            raise ConfigError(f"{where}: parent {parent!r} does not stand above it")
        own = {key: value for key, value in table.items() if key not in STAGE_KEYS}
        known = [field.name for field in fields(kind.config)]
        check_keys(own, known, where)
        if "seed" in known:
            own.setdefault("seed", seed)
        config: Any = from_dict(kind.config, own, where)
        settings = {key: value for key, value in to_dict(config).items() if key not in kind.outcome_free}
        settings |= _input_files(settings)
        if kind.needs_model:
            model_config(model, f"{path}: [model]")
            settings |= {f"model.{key}": value for key, value in model.items()}
        hashes[name] = config_hash({"kind": table["kind"], "parent": parent and hashes[parent], "settings": settings})
        yield Stage(name, table["kind"], parent, config, settings, hashes[name])
        above = name


def model_config(table: Mapping[str, Any], where: str, **changes: Any) -> ModelConfig:
    """The shape a [model] table describes: a preset, some of its fields changed, and `changes` on top."""
    own = {key: value for key, value in table.items() if key != "preset"}
    if not isinstance(table.get("preset"), str):
        raise ConfigError(f'{where}: no preset; write preset = "tiny" and the fields to change')
    return from_dict(ModelConfig, to_dict(ModelConfig.preset(table["preset"])) | own | changes, where)


def _input_files(settings: Mapping[str, Any]) -> dict[str, str]:
    """ "file PATH" -> content hash, for each setting that names a file: another task file is another stage."""
    found: dict[str, str] = {}
    for value in settings.values():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and 0 < len(text) < 500:
                for spelling in {text, text.rpartition(":")[0], text.partition(":")[2]} - {""}:
                    path = Path(spelling)
                    if path.suffix and path.is_file():
                        found[f"file {path}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found
