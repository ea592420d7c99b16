"""Exact resume: what a training stage writes so that `kill -9` at any moment costs time and nothing else.

One directory per save, `STAGE/resume/step-00000123/`: safetensors files (`model`, `optimizer`, whatever the stage adds)
and `state.json` (step, meta, size and SHA-256 of the files). It is written under a temporary name, synced, renamed,
the parent synced, and only then are older saves pruned: at every instant one complete save is on disk.

safetensors and JSON instead of `torch.distributed.checkpoint`, because DCP's `.metadata` file is a pickle.
Randomness needs no saving: every random choice is a pure function of (seed, stream, step), see `derive_seed`.

Left out: sharded saves (one process holds the whole state here) and asynchronous ones (a copy doubles the memory).
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sputnik.errors import CheckpointError, DataError
from sputnik.files import remove_directory, replace_directory, write_whole

SPARE_BYTES = 16 * 2**20  # room for headers, logs and the ledger on top of the tensors of a save
LAST_STEP = 10**8 - 1  # eight digits, so that names sort like numbers


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (run seed, stream name, step, ...); equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Saved:
    """A complete save on disk."""

    step: int
    path: Path
    meta: Mapping[str, Any]


class StateStore:
    """The saves of one stage, newest last; keeps `keep` of them, so that a damaged one leaves a way back. With `behind`
    it also keeps one that is at least so many steps older than the newest, and the one after it to take its place in
    time: a way back from trouble that is noticed late."""

    def __init__(self, directory: Path, keep: int = 2, behind: int | None = None) -> None:
        self.directory = directory
        self.keep = keep
        self.behind = behind

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> Path:
        """Write `tensors` (file name -> tensor name -> tensor) and JSON-able `meta` as the save of `step`, then prune.

        A save of this step that is already there and intact is left alone. DataError if the disk is full; older saves
        are untouched then.
        """
        path = self._path(step)
        if path.exists() and _read(path) is not None:
            return path
        self._require_space(step, tensors)
        try:
            with replace_directory(path) as temporary:
                files: dict[str, dict[str, Any]] = {}
                for name, group in tensors.items():
                    file = temporary / f"{name}.safetensors"
                    write_tensors(file, group)
                    files[file.name] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
                record = {"step": step, "files": files, "meta": dict(meta)}
                (temporary / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            raise DataError(f"disk full while saving step {step} in {self.directory}: {self._intact()}") from error
        self.prune(step)
        return path

    def latest(self, at_most: int = LAST_STEP) -> Saved | None:
        """The newest complete save, of step `at_most` or before; a damaged one is skipped with a warning."""
        for path in reversed(self._paths()):
            if _step(path) > at_most:
                continue
            saved = _read(path)
            if saved is not None:
                return saved
            warnings.warn(f"{path} is damaged (a file is missing, cut or changed); using an older save", stacklevel=2)
        return None

    def oldest(self) -> Saved | None:
        """The first complete save that is still there."""
        return next(filter(None, map(_read, self._paths())), None)

    def drop_after(self, step: int) -> None:
        """Delete the saves of later steps, the newest first, so that whatever is left is the start of one history."""
        for path in reversed(self._paths()):
            if _step(path) > step:
                remove_directory(path)

    def load(self, saved: Saved, name: str) -> dict[str, Tensor]:
        """The tensors of one file, each in memory of its own (a mapped file is not aligned, and alignment can change
        the last bit of a matrix product)."""
        try:
            with safe_open(saved.path / f"{name}.safetensors", framework="pt") as file:
                return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{saved.path}/{name}.safetensors cannot be read: {error}") from None

    def _path(self, step: int) -> Path:
        if not 0 <= step <= LAST_STEP:
            raise DataError(f"step {step} is outside 0..{LAST_STEP}")
        return self.directory / f"step-{step:08d}"

    def _require_space(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        needed = SPARE_BYTES + sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise DataError(
                f"disk full while saving step {step} in {self.directory}: {needed / 1e6:.0f} MB needed, "
                f"{free / 1e6:.0f} MB free; {self._intact()}"
            )

    def _intact(self) -> str:
        paths = self._paths()
        what = f"the save of step {_step(paths[-1])} is intact" if paths else "nothing is saved yet"
        return f"{what}; free some space and run the same command again"

    def _paths(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))

    def prune(self, step: int) -> None:
        """Delete what nobody will go back to from `step`, and what a killed process left."""
        paths = self._paths()
        kept = paths[-self.keep :]
        if self.behind is not None:
            far = sum(_step(path) <= step - self.behind for path in paths)
            kept += paths[max(0, far - 1) : far + 1]
        for path in paths:
            if path not in kept:
                remove_directory(path)
        for leftover in self.directory.glob(".step-*"):  # of a process that was killed in the middle of a save
            shutil.rmtree(leftover)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tied weight once: what `StateStore.save` wants."""
    once: dict[int, str] = {}
    tensors = module.state_dict(keep_vars=True).items()
    return {name: value.detach() for name, value in tensors if once.setdefault(id(value), name) == name}


@torch.no_grad()
def load_module_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `module_tensors`: copy into the memory the module has, so that optimisers keep their parameters."""
    own = module_tensors(module)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[0]
        raise CheckpointError(f"the saved state and the model do not have the same tensors (first: {odd!r})")
    for name, value in own.items():
        value.copy_(tensors[name])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file; the tensors must not share memory."""
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read(path: Path) -> Saved | None:
    """The save at `path`, or None if any file is missing or differs from what was written."""
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for name, expected in record["files"].items():
            file = path / name
            if file.stat().st_size != expected["bytes"] or _digest(file) != expected["sha256"]:
                return None
        return Saved(record["step"], path, record["meta"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """safetensors reports an I/O error only as text."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"(os error {code})" in str(error) for code in codes)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    write_whole(path, json.dumps(strict_json(record), indent=1, ensure_ascii=False) + "\n")


def strict_json(value: Any) -> Any:
    """NaN and infinities become None: JSON has no word for them, and browsers refuse Python's."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(inner) for inner in value]
    return value


class JsonLines:
    """An append-only log. Its byte position belongs to the saved state: a resumed run cuts the log there, so lines of
    steps that will be repeated are not written twice."""

    def __init__(self, path: Path, position: int | None = None) -> None:
        """Open at `position`, dropping what follows (0 starts afresh); None keeps every whole line there is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        if position is None:
            position = path.read_bytes().rfind(b"\n") + 1 if size else 0
        if position > size:
            raise DataError(
                f"{path} is shorter than the saved state knows: put back what was cut off, or delete {path.parent} to "
                "begin again"
            )
        self.path = path
        self._file: BinaryIO = path.open("ab")
        self._file.truncate(position)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; it is visible to readers at once and safe on disk after `position`."""
        line = json.dumps(strict_json(record), ensure_ascii=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()

    @property
    def position(self) -> int:
        """Bytes that are safe on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; a torn last line (killed while writing) is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    found = []
    for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}:{number}: damaged ({error}): mend or delete this line") from None
    return found


@contextlib.contextmanager
def stage_lock(directory: Path) -> Iterator[None]:
    """Two processes in one stage directory would spoil it. The lock dies with its process, also by `kill -9`; it is a
    POSIX one because those do not live on in forked workers."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{directory}: another process is running this stage; wait for it or stop it") from None
        sweep_drafts(directory)
        yield


def sweep_drafts(directory: Path) -> None:
    """Delete what `write_whole` left in `directory` because its process was killed."""
    for draft in directory.glob(".*.*.*"):
        of_ours = re.fullmatch(r".+\.(?:html|jsonl?|md|toml)\.([0-9]{1,7})", draft.name)
        if of_ours and not _is_alive(int(of_ours[1])):
            draft.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


class StopSignal:
    """While inside, the first Ctrl-C or SIGTERM only sets `requested`; a second one aborts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("stopping after this step; once more to abort at once", file=sys.stderr, flush=True)
