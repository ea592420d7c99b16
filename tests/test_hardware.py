"""What the system is asked for, and gets back."""

import platform
import resource

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other habits")
def test_freed_memory_stays_for_the_next_step_and_goes_at_the_end() -> None:
    with kept_memory():
        rounds = [fresh_pages(16) for _ in range(6)]
        held = psutil.Process().memory_info().rss
    assert rounds[-1] < 1000, rounds
    assert psutil.Process().memory_info().rss < held - 100 * MIB
