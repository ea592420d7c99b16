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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other habits")
def test_what_lies_idle_between_steps_is_bounded() -> None:
    """Every other of many pieces is freed, as by tensors of another size each step."""

    def resident() -> int:
        return int(psutil.Process().memory_info().rss)

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
