"""Clients that go in the middle, that send a byte a second, that read nothing: nobody else notices, nothing is kept."""

import asyncio
import random
from typing import Any

import pytest

from benchmarks.serving.scenarios import Target, dawdlers, disconnects, unread, until_idle
from sputnik.serve.reading import Delta, Score, merged
from sputnik.text.tools import ToolCall


@pytest.fixture
def target(paced: Any) -> Target:
    target = Target(paced.port, paced.operator_port, "sk-test", "sk-other")
    asyncio.run(until_idle(target))
    return target


def test_clients_that_go_at_random_moments_leave_every_slot_and_block_free(target: Target) -> None:
    found = asyncio.run(disconnects(target, 60, 12, 0.5))
    assert found["gone"] == 60 and found["had_begun"] > 5
    assert found["free_after_s"] < 5, "0.5 s where nothing else runs: see the benchmark"


def test_pieces_that_wait_for_a_slow_reader_are_joined_and_say_the_same() -> None:
    dice = random.Random(0)
    deltas = [
        Delta(dice.randrange(3), dice.choice(["answer", "answer", "thinking"]), dice.choice(["", "a", "bc"]),
              scores=(Score(number, "answer", -1.0, []),) if dice.random() < 0.3 else ())
        for number in range(500)
    ]  # fmt: skip
    call = ToolCall("sum", "{}")
    deltas += [Delta(1, "answer", call=call), *(Delta(each, "answer", "end", finish="stop") for each in range(3))]
    joined = merged(deltas)

    def told(found: list[Delta], sample: int) -> Any:
        parts = [(each.channel, letter, None) for each in found if each.sample == sample for letter in each.text]
        scores = [score for each in found if each.sample == sample for score in each.scores]
        return parts, scores, [each.finish for each in found if each.sample == sample][-1]

    for sample in range(3):
        assert told(joined, sample) == told(deltas, sample)
    assert [each.call for each in joined if each.call] == [call] and len(joined) < len(deltas) / 2
    assert merged(joined) == joined


@pytest.mark.slow
def test_a_thousand_disconnects_leave_nothing(target: Target) -> None:
    found = asyncio.run(disconnects(target, 1000, 24, 0.4))
    assert found["gone"] == 1000 and found["free_after_s"] < 5


def test_slow_heads_and_bodies_hold_nobody_up(target: Target) -> None:
    """They are closed later, by their times of 10 and 12 seconds."""
    found = asyncio.run(dawdlers(target, 60, 8, 3, 10))
    assert found["good_p99_ms"] < 2000


@pytest.mark.slow
def test_slow_heads_and_bodies_are_closed(target: Target) -> None:
    found = asyncio.run(dawdlers(target, 100, 12, 20, 20))
    assert found["closed"] == found["slow"] and found["closed_s_max"] < 15


def test_who_reads_nothing_costs_little_and_is_let_go(target: Target, paced: Any) -> None:
    gateway = paced.child("gateway")
    found = asyncio.run(unread(target, 8, 60, 60, lambda: int(gateway.memory_info().rss)))
    assert found["free_after_s"] < 60 and found["kb_per_reader"] < 512
