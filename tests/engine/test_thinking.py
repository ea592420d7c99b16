"""Reasoning controls: a thought ends where it should, an answer always follows, loops are told from long thoughts."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sputnik.engine.params import SamplingParams
from sputnik.engine.thinking import Finish, LoopDetector, ThoughtControl, ThoughtTokens
from sputnik.errors import ConfigError
from sputnik.text.chat import parse, render
from sputnik.text.tokenizer import Tokenizer

EOS, OPEN, CLOSE = 1, 2, 3
TAGS = ThoughtTokens(OPEN, CLOSE, before=(10,), after=(11, 12), wait=(13, 14))
CLOSING = [10, CLOSE, 11, 12]


def control(in_thought: bool = True, **params: Any) -> ThoughtControl:
    return ThoughtControl(SamplingParams(**params), TAGS, [EOS], in_thought)


def play(state: ThoughtControl, model: Iterator[int]) -> tuple[list[int], Finish]:
    """What is written when `model` draws wherever nothing is forced."""
    ids: list[int] = []
    while True:
        ids.append(state.instead(next(model)) if state.forced is None else state.forced)
        if finish := state.feed(ids[-1]):
            return ids, finish


def thinker(answer: int = 5) -> Callable[[ThoughtControl], Iterator[int]]:
    """A model that never ends its thought by itself, but answers once it is out of it."""

    def model(state: ThoughtControl) -> Iterator[int]:
        fresh = iter(range(100, 10**6))
        while state.in_thought:
            yield next(fresh)
        yield from (next(fresh) for _ in range(answer - 1))
        yield EOS

    return model


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thought_ends_at_its_budget_and_an_answer_follows(budget: int) -> None:
    state = control(thinking_budget=budget)
    ids, finish = play(state, thinker()(state))
    assert ids[budget : budget + 4] == CLOSING and CLOSE not in ids[:budget]
    assert (finish, state.closed_by, len(ids)) == ("stop", "budget", budget + 4 + 5)


@pytest.mark.parametrize("reserve", [1, 5, 20])
def test_the_reserve_is_kept_for_the_answer(reserve: int) -> None:
    state = control(max_tokens=40, answer_reserve=reserve)
    ids, finish = play(state, thinker(answer=100)(state))
    assert len(ids) - ids.index(12) - 1 == reserve and ids[-reserve - 4 : -reserve] == CLOSING
    assert (finish, state.closed_by) == ("length", "reserve")


def test_without_reserve_the_finish_says_that_the_thought_ate_the_answer() -> None:
    state = control(max_tokens=9)
    assert play(state, thinker()(state)) == (list(range(100, 109)), "length while thinking")
    assert state.closed_by is None


def test_a_short_thought_is_left_alone() -> None:
    state = control(thinking_budget=50, answer_reserve=20, max_tokens=100, break_loops=True)
    written = [20, 21, 22, CLOSE, 30, 31, EOS]
    assert play(state, iter(written)) == (written, "stop")
    assert (state.closed_by, state.thought, state.written) == ("model", 3, 7)


def test_ending_inside_the_thought_has_its_own_name() -> None:
    assert play(control(), iter([20, EOS])) == ([20, EOS], "stop while thinking")


def test_answer_now_closes_the_thought_at_the_next_token() -> None:
    state = control()
    for id in (20, 21):
        state.feed(id)
    assert state.answer_now()
    assert play(state, iter([30, EOS])) == ([*CLOSING, 30, EOS], "stop")
    assert state.closed_by == "request"


def test_answer_now_before_the_model_has_opened_its_thought_and_after_it() -> None:
    state = control(in_thought=False)
    assert state.answer_now()
    ids, _ = play(state, iter([OPEN, 30, EOS]))
    assert ids == [OPEN, *CLOSING, 30, EOS]
    state = control(in_thought=False)
    state.feed(30)
    assert not state.answer_now() and state.forced is None


def test_asking_twice_or_while_closing_forces_the_closing_once() -> None:
    state = control(thinking_budget=2)
    for id in (20, 21, 10):
        state.feed(id)
    assert state.answer_now() and state.answer_now()
    assert play(state, iter([EOS])) == ([CLOSE, 11, 12, EOS], "stop")
    assert state.closed_by == "budget"


@pytest.mark.parametrize("extend", [0, 1, 3])
def test_the_end_of_a_thought_gives_way_to_wait_as_often_as_asked(extend: int) -> None:
    state = control(extend=extend)
    drawn = [id for part in range(extend + 1) for id in (20 + part, CLOSE)]
    ids, finish = play(state, iter([*drawn, 30, EOS]))
    waits = [id for part in range(extend) for id in (20 + part, 13, 14)]
    assert (ids, finish) == ([*waits, 20 + extend, CLOSE, 30, EOS], "stop")
    assert (state.extended, state.closed_by, state.thought) == (extend, "model", 3 * extend + 1)


def test_a_thought_is_not_drawn_out_beyond_its_limits() -> None:
    """Budget, answer reserve and the wish for an answer now go before; a tag outside a thought is no end of one."""
    spent = control(extend=9, thinking_budget=4)
    assert play(spent, iter([20, CLOSE, 21, EOS]))[0] == [20, 13, 14, 21, *CLOSING, EOS]
    assert (spent.extended, spent.closed_by) == (1, "budget")
    tight = control(extend=9, max_tokens=12, answer_reserve=5)
    assert play(tight, iter([20, CLOSE, *range(30, 40)]))[0] == [20, 13, 14, *CLOSING, *range(30, 35)]
    hurried = control(extend=9)
    hurried.feed(20)
    hurried.answer_now()
    assert play(hurried, iter([30, EOS]))[0] == [*CLOSING, 30, EOS]
    assert control(in_thought=False, extend=9).instead(CLOSE) == CLOSE


def test_a_thought_the_model_opens_itself_has_the_budget_too() -> None:
    state = control(in_thought=False, thinking_budget=2)
    ids, finish = play(state, iter([40, OPEN, 20, 21, 30, EOS]))
    assert ids == [40, OPEN, 20, 21, *CLOSING, 30, EOS] and finish == "stop"


def test_a_constrained_answer_begins_where_the_template_lets_it_begin() -> None:
    """After a thought the model closed itself, what stands between tag and answer is not left to the grammar."""
    state = control(regex="a+")
    answering = []
    for id in (20, CLOSE, 11, 12, 30):
        answering.append(state.answering)
        assert state.forced in (None, id)
        state.feed(id)
    assert answering == [False, False, False, False, True]
    state = control()
    state.feed(CLOSE)
    assert state.answering and state.forced is None


def test_stops_wait_for_the_minimum_and_ends_may_be_ignored() -> None:
    state = control(in_thought=False, min_tokens=2, stop_ids=(7,))
    assert [state.feed(id) for id in (7, EOS, 7)] == [None, None, "stop"]
    state = control(in_thought=False, ignore_eos=True, max_tokens=3)
    assert [state.feed(EOS) for _ in range(3)] == [None, None, "length"]


def test_a_model_without_thoughts_only_stops() -> None:
    state = ThoughtControl(SamplingParams(max_tokens=2), None, [EOS])
    assert [state.feed(id) for id in (OPEN, CLOSE)] == [None, "length"] and state.thought == 0
    for wish in ({"thinking_budget": 0}, {"answer_reserve": 1}, {"extend": 1}):
        with pytest.raises(ConfigError, match="has no thoughts"):
            ThoughtControl(SamplingParams(**wish), None, [EOS])


def test_causes_from_outside_keep_their_names() -> None:
    state = control()
    assert [state.ended("aborted"), state.ended("deadline"), state.ended("failed")] == ["aborted", "deadline", "failed"]


@pytest.mark.parametrize("period", [1, 2, 3, 10, 100, 600])
def test_a_repeating_thought_is_closed_and_still_gives_an_answer(period: int) -> None:
    block = list(range(100, 100 + period))

    def model() -> Iterator[int]:
        yield from range(2000, 2300)
        while state.in_thought:
            for id in block:
                if not state.in_thought:
                    break
                yield id
        yield from (50, 51, EOS)

    state = control(break_loops=True, max_tokens=20_000)
    ids, finish = play(state, model())
    assert (finish, state.closed_by) == ("stop", "loop") and ids[-3:] == [50, 51, EOS]
    assert ids.index(CLOSE) - 301 == period + max(64, 3 * period), "found when the fourth round is complete"


def test_a_repeating_answer_ends_as_a_loop() -> None:
    state = control(in_thought=False, break_loops=True, max_tokens=10_000)
    ids, finish = play(state, iter([5, 6, 7] * 3000))
    assert finish == "loop" and len(ids) < 300


def test_loops_are_left_alone_unless_asked() -> None:
    state = control(max_tokens=2000)
    assert play(state, iter([5] * 3000))[1] == "length while thinking"


def test_a_loop_in_which_only_a_counter_moves_is_found() -> None:
    detector = LoopDetector(4, 64)
    text = [id for n in range(500) for id in (*range(100, 400), 1000 + n)]
    assert any(detector.feed(id) for id in text[:3000])
    detector = LoopDetector(4, 64)
    assert not any(detector.feed(id) for id in text[:2000])


def test_ordinary_text_is_no_loop() -> None:
    """Zipf-like words; lists whose lines begin alike; a row of dashes; a draft that is written out again."""
    chance = random.Random(1)
    words = [int(chance.paretovariate(0.4)) % 5000 for _ in range(20_000)]
    lines = [id for n in range(2000) for id in (7, 8, 9, 10, chance.randrange(300), chance.randrange(300), 11)]
    draft = [chance.randrange(5000) for _ in range(1800)]
    for text in (words, lines, [5] * 60 + words[:50], draft + words[:20] + draft):
        detector = LoopDetector(4, 64)
        assert not any(detector.feed(id) for id in text)


@settings(max_examples=100, deadline=None)
@given(
    drawn=st.lists(st.sampled_from([EOS, OPEN, CLOSE, 20, 21, 22]), min_size=60, max_size=60),
    in_thought=st.booleans(),
    budget=st.none() | st.integers(0, 20),
    reserve=st.integers(0, 20),
    asked_at=st.integers(0, 60),
    extend=st.integers(0, 3),
)
def test_no_model_gets_around_the_limits(
    drawn: list[int], in_thought: bool, budget: int | None, reserve: int, asked_at: int, extend: int
) -> None:
    """Whatever the model draws: thoughts keep to the budget, the tags nest, forced tokens come as one run."""
    state = control(in_thought, max_tokens=50, thinking_budget=budget, answer_reserve=reserve, extend=extend)
    inside, free, ids = in_thought, 0, []
    for step, id in enumerate(drawn):
        if step == asked_at:
            state.answer_now()
        forced = state.forced
        ids.append(state.instead(id) if forced is None else forced)
        tag = ids[-1] in (OPEN, CLOSE)
        free += inside and forced is None and not tag and ids[-1] != EOS
        finish = state.feed(ids[-1])
        if ids[-1] == (CLOSE if inside else OPEN):
            inside = not inside
        if finish is not None:
            break
        assert state.in_thought == inside
        assert state.forced is None or state.forced in (*CLOSING, *TAGS.wait)
    assert finish is not None and len(ids) <= 50 and ids.count(13) == state.extended <= extend
    assert budget is None or free <= budget
    if finish == "length while thinking":
        assert not reserve or OPEN in ids[-2:], "with a reserve only a thought that is opened last of all is left open"
    assert ("thinking" in finish) == inside


def test_the_closing_of_the_chat_template_is_what_parse_expects() -> None:
    tok = Tokenizer.train(["some text to learn from\n\n"] * 3, vocab_size=300)
    prompt = render(tok, [{"role": "user", "content": "?"}])
    state = ThoughtControl(
        SamplingParams(thinking_budget=3), ThoughtTokens.of(tok, "Time is up."), [tok.eos_id], prompt.in_thought
    )
    ids, finish = play(state, iter([*tok.encode("abc"), *tok.encode("so"), tok.eos_id]))
    completion = parse(tok, ids, in_thought=prompt.in_thought, finished=finish == "stop")
    assert (completion.thinking, completion.answer) == ("abcTime is up.", "so") and completion.well_formed
