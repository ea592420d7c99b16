"""Devices: dense peaks, memory, bandwidth and price; a catalogue, and this machine's CPU measured on request.

    hardware("H800"), fleet("8xH800")    (device, count)
    measure_cpu()                        CpuSpeed(threads=2, bf16=1.0e11, fp32=1.9e11, bandwidth=1.3e10, ...) in < 3 s

A CPU's peak is what one thread does in a second of its own time, times the threads: other programs on the machine do
not lower it, but where two threads share a core it is too high. It is remembered in the user's cache directory.
Left out: links between devices, NUMA, and CPUs whose clock depends on how hot they are.
"""

import contextlib
import ctypes
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from sputnik.errors import ConfigError
from sputnik.files import write_whole

MIB, GIB = 1024**2, 1024**3


@dataclass(frozen=True)
class Hardware:
    """One device: FLOP/s (dense), bytes and bytes/s. fp8 is None where there is none; `price` says whose price it is.

    On a CPU `bf16` is the better of BF16 and FP32, for without matrix units FP32 may be the faster one.
    """

    name: str
    bf16: float
    fp8: float | None
    memory: float
    bandwidth: float
    usd_per_hour: float
    price: str


_LISTED = "assumption: middle of on-demand list prices, May 2026"
HARDWARE: Mapping[str, Hardware] = {
    "H800": Hardware("H800", 989e12, 1979e12, 80 * GIB, 3.35e12, 2.0, "published: DeepSeek-V3 report, table 1"),
    "H100": Hardware("H100", 989e12, 1979e12, 80 * GIB, 3.35e12, 2.5, _LISTED),
    "H200": Hardware("H200", 989e12, 1979e12, 141 * GIB, 4.8e12, 3.5, _LISTED),
    "A100": Hardware("A100", 312e12, None, 80 * GIB, 2.04e12, 1.5, _LISTED),
    "B200": Hardware("B200", 2250e12, 4500e12, 180 * GIB, 8.0e12, 5.0, _LISTED),
}
CPU_USD_PER_HOUR = 0.10
PRICE_VARIABLE = "SPUTNIK_USD_PER_HOUR"


def hardware(name: str, usd_per_hour: float | None = None) -> Hardware:
    """A device by name; "cpu" is this machine, measured once and remembered.

    The price is the argument if given, else the environment's SPUTNIK_USD_PER_HOUR, else the catalogue's.
    """
    if name.lower() == "cpu":
        speed = measure_cpu()
        peak, price = max(speed.bf16, speed.fp32), "assumption: a small cloud machine, 2026"
        found = Hardware("cpu", peak, None, speed.memory, speed.bandwidth, CPU_USD_PER_HOUR, price)
    elif name.upper() in HARDWARE:
        found = HARDWARE[name.upper()]
    else:
        raise ConfigError(f"no hardware {name!r}; choose one of cpu, {', '.join(HARDWARE)}")
    given = os.environ.get(PRICE_VARIABLE)
    if usd_per_hour is None and given is not None:
        try:
            usd_per_hour = float(given)
        except ValueError:
            raise ConfigError(f"{PRICE_VARIABLE}={given!r}: set it to dollars per hour, for example 0.10") from None
    if usd_per_hour is None:
        return found
    if not 0 <= usd_per_hour < math.inf:  # NaN neither: a ledger could not be read again
        raise ConfigError(f"{usd_per_hour} dollars per hour are no price; give one of 0 or more")
    return replace(found, usd_per_hour=usd_per_hour, price="given by the user")


def fleet(spec: str, usd_per_hour: float | None = None) -> tuple[Hardware, int]:
    """How many of what: "8xH800" is (H800, 8), "cpu" is (this machine, 1)."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([A-Za-z]\w*)", spec.strip())
    if match is None:
        raise ConfigError(f"hardware {spec!r}: write NAME or COUNTxNAME, for example 8xH800")
    return hardware(match[2], usd_per_hour), int(match[1] or 1)


# --- this machine ----------------------------------------------------------------------------------------------------

SIZE = 1024
READ_BYTES = 512 * 1024**2
"""More than the last-level cache of today's servers."""
SECONDS_PER_RATE = 0.3


@dataclass(frozen=True)
class CpuSpeed:
    """Rates of all `threads` together: FLOP/s of 1024-cubed matmuls, bytes/s of a read.

    bf16 is not always the faster one: without AMX, many Intel servers multiply fp32 twice as fast.
    """

    name: str
    threads: int
    memory: int
    bf16: float
    fp32: float
    bandwidth: float

    @property
    def faster(self) -> str:
        """What precision "auto" means here."""
        return "bf16" if self.bf16 > self.fp32 else "fp32"


def cache_directory() -> Path:
    """Where measurements are kept: $SPUTNIK_CACHE, else the user's cache directory."""
    given = os.environ.get("SPUTNIK_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sputnik"


@lru_cache
def cpu_fields() -> Mapping[str, str]:
    """What Linux says of the processor, by the names it uses: "model name", "flags" ...; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_name() -> str:
    """The processor as the system calls it; family, model and stepping too, for virtual machines hide the rest."""
    fields = cpu_fields()
    if not fields:
        return platform.processor() or platform.machine()
    numbers = "-".join(fields.get(key, "?") for key in ("cpu family", "model", "stepping"))
    return f"{fields.get('model name', platform.machine())} ({numbers})"


@lru_cache
def multiplies_bf16() -> bool:
    """Whether bf16 products are faster than fp32 ones here, told by what the CPU is and not by the clock, so that a
    resumed run computes the same bits: with AMX, with AMD's AVX512_BF16, and wherever we do not know better."""
    fields = cpu_fields()
    flags = fields.get("flags")
    if flags is None or "amx_bf16" in flags:
        return True
    return fields.get("vendor_id") == "AuthenticAMD" and "avx512_bf16" in flags


class _Heap(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _fields_ = (("numbers", ctypes.c_size_t * 10),)

    @property
    def used(self) -> int:
        return int(self.numbers[7])

    @property
    def free(self) -> int:
        return int(self.numbers[8])


@contextlib.contextmanager
def kept_memory(most: int = GIB) -> Iterator[Callable[[], None]]:
    """Inside, freed memory stays with the process for the next step: glibc gives large pieces back to the system,
    which clears each page again, a tenth of a small model's step. Without glibc it changes nothing.

    What it yields is to be called between steps: pieces of ever other sizes leave gaps that nothing fits, and once more
    than `most` bytes and half of what is in use lie idle they are given back (they grew to 18 GB in 60 steps of RL)."""
    if platform.libc_ver()[0] != "glibc":
        yield lambda: None
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3  # malloc.h

    def tidy() -> None:
        try:
            libc.mallinfo2.restype = _Heap
        except AttributeError:  # before glibc 2.33 nobody can tell
            libc.malloc_trim(0)
            return
        heap = libc.mallinfo2()
        if heap.free > max(most, heap.used // 2):
            libc.malloc_trim(0)

    try:
        for which in (trim_threshold, mmap_threshold):
            libc.mallopt(which, GIB)
        yield tidy
    finally:
        libc.mallopt(trim_threshold, 64 * MIB)  # what glibc's own tuning grows to
        libc.mallopt(mmap_threshold, 32 * MIB)
        libc.malloc_trim(0)


def total_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_cpu(refresh: bool = False) -> CpuSpeed:
    """The speed of this CPU with torch's present number of threads, from the cache unless `refresh`."""
    import torch

    name, threads = cpu_name(), torch.get_num_threads()
    path, key = cache_directory() / "cpu.json", f"{name} | {threads} threads | torch {torch.__version__}"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not refresh and key in known:
            return CpuSpeed(**known[key])
    except (OSError, json.JSONDecodeError, TypeError):  # no cache, or one we cannot read: measure and write it anew
        known = {}
    block = torch.ones(READ_BYTES // 4)
    read = _best_seconds(block.sum, time.perf_counter)
    torch.set_num_threads(1)
    try:
        bf16, fp32 = (threads * 2 * SIZE**3 / _matmul_seconds(dtype) for dtype in ("bfloat16", "float32"))
    finally:
        torch.set_num_threads(threads)
    speed = CpuSpeed(name, threads, total_memory(), bf16, fp32, READ_BYTES / read)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**known, key: asdict(speed)}, indent=1))
    return speed


@lru_cache
def resolve_precision(precision: str) -> str:
    """ "auto" -> "bf16" or "fp32", whichever multiplies matrices faster on this CPU; the others stay as they are."""
    if precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f'precision must be "auto", "bf16" or "fp32", not {precision!r}')
    return measure_cpu().faster if precision == "auto" else precision


def _matmul_seconds(dtype: str) -> float:
    import torch

    a, b = (torch.randn(SIZE, SIZE).to(getattr(torch, dtype)) for _ in range(2))
    return _best_seconds(lambda: a @ b, time.thread_time)


def _best_seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    work()
    best, end = float("inf"), time.perf_counter() + SECONDS_PER_RATE
    while time.perf_counter() < end:
        start = clock()
        work()
        best = min(best, clock() - start)
    return best
