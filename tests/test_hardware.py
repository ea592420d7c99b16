"""What the system is asked for, and gets back."""

import platform
import resource
import subprocess
import sys
from collections.abc import Callable

import psutil
import pytest
import torch

from sputnik.hardware import MIB, kept_memory


def fresh_pages(pieces: int) -> int:
    """Page faults of filling so many pieces of 8 MB, all freed in the end."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2 * MIB) for _ in range(pieces)]
    assert len(held) == pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def stays_and_goes() -> None:
    with kept_memory():
        rounds = [fresh_pages(16) for _ in range(6)]
        held = resident()
    assert rounds[-1] < 1000, rounds
    assert resident() < held - 100 * MIB


def is_bounded() -> None:
    with kept_memory(most=100 * MIB) as tidy:
        held = [torch.ones(MIB // 8) for _ in range(200)]
        before = resident()
        held = held[::2]
        tidy()
        assert resident() > before - 20 * MIB  # gaps of 50 MB may lie idle
        more = [torch.ones(3 * MIB // 2) for _ in range(200)]
        assert len(held) == 100 and len(more) == 200
        most = resident()
        del more
        tidy()
        assert resident() < most - 1000 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other habits")
@pytest.mark.parametrize("measured", [stays_and_goes, is_bounded])
def test_freed_memory_stays_for_the_next_step_within_bounds_and_goes_at_the_end(measured: Callable[[], None]) -> None:
    """In a process of its own: what other tests have left in the heap would be measured, too."""
    call = f"import runpy; runpy.run_path({__file__!r})[{measured.__name__!r}]()"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
