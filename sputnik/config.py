"""Configuration: frozen dataclasses <-> TOML, strict in both directions.

A stage keeps its dataclass next to its loop; this module only reads, checks and hashes. An unknown key or a value of
the wrong type is a `ConfigError` that names the key and the nearest known one, never a silent default.
"""

import dataclasses
import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from sputnik.errors import ConfigError

T = TypeVar("T")


def load_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file; a missing file or a syntax error is a ConfigError with the place."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `ls recipes/` shows the recipes that ship with the project") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def from_dict(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build dataclass `cls` from `data`; `where` names the place in error messages (file and table)."""
    check_keys(data, [field.name for field in dataclasses.fields(cls)], where)  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        try:
            values[key] = msgspec.convert(value, hints[key], str_keys=True)  # tables of TOML and JSON
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: {key} = {value!r}: {error}") from None
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_keys(data: Mapping[str, Any], known: list[str], where: str) -> None:
    """Raise a ConfigError for the first key of `data` that is not in `known`, with the nearest known name."""
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {key!r}; {fix}")


def refuse_changed(config: Any, names: Iterable[str], reason: str) -> None:
    """Raise a ConfigError for the first of these fields of a dataclass that is not at its default; `reason` says why it
    would do nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(f"--{name.replace('_', '-')} {reason}")


def to_dict(config: Any) -> dict[str, Any]:
    """Dataclass -> plain JSON/TOML values; inverse of `from_dict`. None is left out because TOML has no null."""
    plain = msgspec.to_builtins(dataclasses.asdict(config))
    return {key: value for key, value in plain.items() if value is not None}


def set_by_path(data: dict[str, Any], assignment: str) -> None:
    """Apply one `table.key=value` of `--set`; the value is read as TOML, and as a plain string if it is not TOML."""
    path, separator, text = assignment.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {assignment}: write table.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, key = path.split(".")
    for table in tables:
        inner = data.setdefault(table, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {assignment}: {table!r} is a value, not a table")
        data = inner
    data[key] = value


def config_hash(value: Any) -> str:
    """Short stable hash of plain data or a dataclass; equal settings give equal hashes on every machine."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
