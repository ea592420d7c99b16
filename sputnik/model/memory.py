"""How much memory a model will take and whether this machine has it: asked before the first weight is read.

The forecast is exact for the weights. Left out: the cache and activations of running the model, which the engine plans
for, and swap, which would make every token wait for the disk.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from sputnik.errors import CheckpointError

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Bytes a new program may take without swapping, a container's limit respected; None where no one tells."""
    free = None
    if meminfo.is_file():
        lines = meminfo.read_text().splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    elif find_spec("psutil") is not None:
        free = int(import_module("psutil").virtual_memory().available)
    return free if free is None else min(free, _left_in_container(cgroup, free))


def _left_in_container(cgroup: Path, otherwise: int) -> int:
    """What a control group (version 2) leaves: its limit less what is in use, file cache not counted."""
    limit, current, stat = (cgroup / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit.is_file() and current.is_file()) or limit.read_text().strip() == "max":
        return otherwise
    lines = stat.read_text().splitlines() if stat.is_file() else []
    cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return max(0, int(limit.read_text()) - int(current.read_text()) + cached)


def require_memory(what: str, needed: int, dtype: str, smaller: int) -> None:
    """Raise when `needed` bytes are not there; `smaller` is what the model takes in bfloat16."""
    free = available_memory()
    if free is None or needed <= free:
        return
    if smaller < needed and smaller <= free:
        fix = f"load it as bfloat16, or `sputnik convert` it to that, {_gigabytes(smaller)}"
    else:
        fix = "end other programs, use a machine with more memory or a smaller model"
    raise CheckpointError(
        f"{what}: the weights take {_gigabytes(needed)} as {dtype}, {_gigabytes(free)} of memory are free: {fix}"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
