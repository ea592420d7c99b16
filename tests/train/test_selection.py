"""Which answers are kept, on answers whose likeness is plain to see."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sputnik.train.selection import Candidate, Prefer, choose, key, shingles_of, similarity

SUM = "7+5=12\n12-3=9"
SAME = " 7 + 5 = 12\n12 - 3 = 9\n"
LONG = "7+5=12\n12-3=9\nCheck: 7+5=12\n12-3=9"
OTHER = "7-3=4\n4+5=9"


def made(*thoughts: str) -> list[Candidate]:
    return [Candidate(thought, "9", len(thought), "Check" in thought) for thought in thoughts]


@pytest.mark.parametrize("prefer", ["short", "diverse", "any"])
def test_copies_are_found_whatever_their_spacing(prefer: Prefer) -> None:
    assert choose(made(SUM, SAME, OTHER), keep=3, prefer=prefer).count("duplicate") == 1
    assert Counter(choose(made(SUM, SUM, SUM), keep=3, prefer=prefer)) == {None: 1, "duplicate": 2}


def test_near_copies_are_those_of_the_similarity_asked_for() -> None:
    alike = similarity(shingles_of(SUM), shingles_of(LONG))
    assert 0.5 < alike < 1
    assert choose(made(SUM, LONG), keep=2, near=alike) == [None, "near duplicate"]
    assert choose(made(SUM, LONG), keep=2, near=alike + 0.01) == [None, None]


def test_what_is_preferred_is_kept() -> None:
    thoughts = made(LONG, SUM, OTHER)
    assert choose(thoughts, keep=1, prefer="any", near=1.0) == [None, "enough", "enough"]
    assert choose(thoughts, keep=1, prefer="short", near=1.0) == ["enough", "enough", None]
    assert choose(thoughts, keep=1, checks_first=True, near=1.0) == [None, "enough", "enough"]
    most_unlike = made(SUM, SUM + "\nso 9", OTHER + "\nand that was all there is to it")
    assert choose(most_unlike, keep=2, prefer="short") == [None, None, "enough"]
    assert choose(most_unlike, keep=2, prefer="diverse") == [None, "enough", None]


texts = st.lists(st.sampled_from(["7+5=12", "12-3=9", "so", "9", "check"]), max_size=6).map(" ".join)


@settings(deadline=None, max_examples=40)
@given(st.lists(texts, max_size=9), st.integers(1, 4), st.sampled_from(["short", "diverse", "any"]), st.floats(0.01, 1))
def test_no_two_kept_are_alike_and_never_more_than_asked_for(
    thoughts: list[str], keep: int, prefer: Prefer, near: float
) -> None:
    candidates = made(*thoughts)
    found = choose(candidates, keep, prefer, near)
    kept = [candidate for candidate, reason in zip(candidates, found, strict=True) if reason is None]
    assert min(len(candidates), 1) <= len(kept) <= keep
    assert all(
        similarity(shingles_of(a.thinking), shingles_of(b.thinking)) < near
        for place, a in enumerate(kept)
        for b in kept[:place]
    )
    assert "enough" not in found or len(kept) == keep


def test_the_order_of_samples_decides_nothing_but_ties() -> None:
    def kept(candidates: list[Candidate]) -> set[str]:
        found = choose(candidates, 2, "diverse")
        return {candidate.thinking for candidate, reason in zip(candidates, found, strict=True) if reason is None}

    candidates = made(SUM, LONG, OTHER, SUM + "\nnine", "the answer is clear")
    expected, rng = kept(candidates), random.Random(0)
    for _ in range(10):
        rng.shuffle(candidates)
        assert kept(candidates) == expected


def test_keys_of_different_texts_differ() -> None:
    assert key("7+5", "12") == key("7 + 5", " 12") != key("7+51", "2")
    assert key("a b") != key("ab")
