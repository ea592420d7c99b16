"""Our own C++ for the CPU: products with packed weights, and the engine's whole forward pass in one call.

    python -m sputnik.model.kernels        compile (half a minute, once); `make` targets do it during set-up

    if kernels.load():                     True when the library is built for this machine; else use the twin in torch
        torch.ops.sputnik.product(x, weight, "bf16")

The library is optional: whatever it computes has a twin in torch, and a machine without a compiler or without AVX-512
runs on that. It lives in the user's cache directory under a name made of the sources, torch's version and the CPU's
abilities, so a stale or foreign one is never loaded. SPUTNIK_KERNELS=off keeps it out. Left out: other instructions.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from sputnik.errors import SputnikError
from sputnik.hardware import cache_directory, cpu_fields

SOURCES = ("packed", "runner", "prefill", "stride", "choose", "causal", "train")
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-w")
SWITCH = "SPUTNIK_KERNELS"


def cpu_abilities() -> tuple[str, ...]:
    """The CPU's instruction sets as Linux names them; nothing elsewhere."""
    return tuple(sorted(cpu_fields().get("flags", "").split()))


def library_path() -> Path:
    """Where this machine's build is, or would be."""
    digest = hashlib.sha256("|".join((torch.__version__, *SOURCES, *FLAGS, *cpu_abilities())).encode())
    for source in sorted(Path(__file__).parent.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.read_bytes())
    return cache_directory() / "kernels" / f"sputnik-{digest.hexdigest()[:16]}.so"


@lru_cache(maxsize=1)
def load() -> bool:
    """Whether the library is there and may be used; loads it the first time."""
    if os.environ.get(SWITCH, "on") == "off":
        return False
    path = library_path()
    if not path.exists():
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # built in another container, say, that shares the cache directory
        raise SputnikError(
            f"{path} cannot be loaded ({str(error).partition(chr(10))[0]}): delete it and run `python -m "
            f"sputnik.model.kernels` again, or set {SWITCH}=off"
        ) from None
    return True


def why_not() -> str | None:
    """What keeps this machine from building the library, in words; None if nothing does."""
    missing = [name for name in NEEDED if name not in cpu_abilities()]
    if missing:
        return f"this CPU has no {missing[0]}"
    if shutil.which("g++") is None:
        return "there is no g++ (Debian: apt-get install g++)"
    return None


def build() -> Path:
    """Compile and put in place, whole or not at all; returns at once when it is built already."""
    path = library_path()
    if path.exists():
        return path
    obstacle = why_not()
    if obstacle is not None:
        raise SputnikError(f"the kernels cannot be built: {obstacle}; everything works without them, slower")
    path.parent.mkdir(parents=True, exist_ok=True)
    here, home = Path(__file__).parent, Path(torch.__file__).parent
    include = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [Path(folder) / f"{name}.o" for name in SOURCES]
        commands = [
            ["g++", *FLAGS, *include, "-c", str(here / f"{name}.cpp"), "-o", str(out)]
            for name, out in zip(SOURCES, objects, strict=True)
        ]
        _run(commands)
        made = Path(folder) / "sputnik.so"
        libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([["g++", "-shared", "-fopenmp", "-o", str(made), *map(str, objects), *libraries]])
        made.replace(path)
    return path


def _run(commands: list[list[str]]) -> None:
    """All at the same time."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") for command in commands]
    errors = [process.communicate()[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        if process.returncode != 0:
            lines = error.strip().splitlines() or ["g++ was stopped"]
            said = next((line for line in lines if "error" in line), lines[0])  # it starts with where it is included
            raise SputnikError(f"the kernels do not compile: {said}")


def main() -> int:
    """Build, and say what happened. Not being able to is no failure: the twins do the work."""
    try:
        print(f"kernels: {build()}")
    except (SputnikError, OSError) as error:  # the latter of a cache directory that cannot be written
        print(f"kernels: {error}", file=sys.stderr)
    return 0
