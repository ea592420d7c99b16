"""Strides against ordinary steps: the same text and books, whoever ends, waits, is steered or fails on the way."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sputnik.engine.config import EngineConfig
from sputnik.engine.engine import Engine
from sputnik.engine.params import SamplingParams
from sputnik.engine.rollouts import Rollouts
from sputnik.engine.sample import Request, Sample
from sputnik.engine.sampling import SamplingBatch
from sputnik.engine.thinking import ThoughtTokens
from sputnik.model import kernels
from sputnik.model.transformer import Transformer
from tests.engine.test_engine import EOS, make_engine, make_model, predicting, prompts


@pytest.fixture(params=["one call", "step by step"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are held to ordinary steps: strides in C++, and their twin."""
    if request.param == "one call" and not kernels.load():
        pytest.skip("the kernels are not built")
    if request.param == "step by step":
        monkeypatch.setattr(SamplingBatch, "native", None)


TAGS = ThoughtTokens(open=90, close=91, before=(92,), after=(93,), wait=(94, 95))
STRIDES = (2, 5, 16)


def found(model: Transformer, asked: list[Request], stride: int = 1, **changes: Any) -> list[list[tuple[Any, ...]]]:
    """Text, end and log-probabilities of each sample; the engine's books are looked into as well."""
    engine = make_engine(model, exact=True, **changes)
    groups = [engine.samples(engine.add(each)) for each in asked]
    while engine.busy:
        engine.step(stride)
    figures = engine.scheduler.figures
    assert (figures.used_blocks, figures.running, figures.queue) == (0, 0, 0)
    read = engine.metrics.read()
    assert read["drawn_tokens"] == sum(len(each.written) for group in groups for each in group)
    return [[_of(each) for each in group] for group in groups]


def _of(each: Sample) -> tuple[Any, ...]:
    routes = None if each.routes is None else each.routes.tolist()
    thought = None if each.control is None else (each.control.closed_by, each.control.thought, each.control.extended)
    return each.written, each.finish, each.logprobs, routes, thought


MIXED = [
    SamplingParams(max_tokens=30, temperature=0),
    SamplingParams(max_tokens=41, seed=3, n=3, logprobs=0),
    SamplingParams(max_tokens=17, seed=4, temperature=0.7, top_p=0.8, stop_ids=tuple(range(20, 40))),
    SamplingParams(max_tokens=50, seed=5, min_tokens=30, top_k=20, logit_bias={EOS: 4.0}),
    SamplingParams(max_tokens=1, seed=6),
    SamplingParams(max_tokens=25, seed=7, min_p=0.1, ignore_eos=True),
]


@pytest.mark.parametrize("name", ["mla", "gqa"])
@pytest.mark.parametrize("changes", [{}, {"max_running": 3}, {"cache_tokens": 132}, {"record_routes": True}])
def test_text_with_and_without_strides_is_the_same(name: str, changes: dict[str, Any]) -> None:
    model = make_model(name)
    asked = [Request(p, params) for p, params in zip(prompts(12, shared=6), MIXED * 2, strict=True)]
    slow = found(model, asked, **changes)
    for stride in STRIDES:
        assert found(model, asked, stride=stride, **changes) == slow


@pytest.mark.parametrize(
    "steer", [{"thinking_budget": 7}, {"answer_reserve": 20}, {"extend": 3}, {"break_loops": True}]
)
def test_thoughts_are_steered_at_the_same_places(steer: dict[str, Any]) -> None:
    model = make_model("gqa")
    asked = [
        Request(p, SamplingParams(max_tokens=44, seed=n, logit_bias={91: 3.0}, **steer), in_thought=True, thought=TAGS)
        for n, p in enumerate(prompts(6))
    ]
    slow = found(model, asked)
    assert any(91 in sample[0] for group in slow for sample in group)
    for stride in STRIDES:
        assert found(model, asked, stride=stride) == slow


def test_guesses_in_strides_are_accepted_as_in_steps() -> None:
    """A sequence the model knows by heart, and one it does not: as many guesses made and right, or nearly."""
    model, text = predicting(), [3 + (7 * i + i // 5) % 40 for i in range(30)]
    asked = [
        Request(text, SamplingParams(max_tokens=90, temperature=0, ignore_eos=True)),
        Request(prompts(1)[0], MIXED[1]),
    ]
    made = {}
    for stride in (1, 2, 16):
        engine = make_engine(model, exact=True, guesses=2, adaptive=False)
        for each in asked:
            engine.add(each)
        while engine.busy:
            engine.step(stride)
        assert engine.speculation is not None
        made[stride] = engine.speculation.drafted[0], engine.speculation.accepted[0], engine.metrics.steps
    (drafted, accepted, steps), (drafted_16, accepted_16, steps_16) = made[1], made[16]
    assert accepted > 30
    assert abs(drafted - drafted_16) <= 10 and abs(accepted - accepted_16) <= 10 and abs(steps - steps_16) <= 10


def test_penalties_grammars_top_logprobs_and_prompt_scores_are_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = make_model("gqa"), SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    strides: list[int] = []
    real = Engine._stride
    monkeypatch.setattr(Engine, "_stride", lambda self, *given: strides.append(given[1]) or real(self, *given))
    for params in (
        replace(other, frequency_penalty=0.5),
        replace(other, logprobs=2),
        replace(other, prompt_logprobs=0),
    ):
        asked = [Request(p, each) for p, each in zip(prompts(2), (params, other), strict=True)]
        assert found(model, asked, stride=8) == found(model, asked)
    assert not strides
    found(model, [Request(p, other) for p in prompts(2)], stride=8)
    assert strides == [8, 8]  # the first token comes with the prompt; three of the last eight are none


def test_a_row_that_fails_takes_nobody_with_it() -> None:
    """Row 1 is the only one to write a token whose embedding is not finite: what follows it is no text."""
    model, params = make_model("mla"), SamplingParams(max_tokens=20, seed=2, ignore_eos=True, logprobs=0)
    asked = [Request(p, params) for p in prompts(3)]
    alone = found(model, asked)
    others = {id for n in (0, 2) for id in alone[n][0][0]} | {id for request in asked for id in request.prompt}
    place, token = next((place, id) for place, id in enumerate(alone[1][0][0]) if id not in others)
    assert place < 18
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    for stride in (1, *STRIDES):
        got = found(model, asked, stride=stride)
        assert [got[n] for n in (0, 2)] == [alone[n] for n in (0, 2)]
        (written, finish, logprobs, *_) = got[1][0]
        assert (written, finish, len(logprobs)) == (alone[1][0][0][: place + 1], "failed", place + 1)


def test_events_come_in_order_and_an_abort_between_strides_frees_at_once() -> None:
    model, params = make_model("mla"), SamplingParams(max_tokens=40, seed=2, ignore_eos=True)
    engine = make_engine(model)
    numbers = [engine.add(Request(p, params)) for p in prompts(3)]
    samples = [engine.samples(number)[0] for number in numbers]
    events = [*engine.step(8), *engine.step(8)]
    for number, each in zip(numbers, samples, strict=True):
        told = [id for event in events if event.request == number for id in event.ids]
        assert told == each.written and len(told) == 9
    engine.abort(numbers[1])
    while engine.busy:
        events += engine.step(8)
    assert [event.finish for event in events if event.finish] == ["length", "length"]
    assert engine.scheduler.figures.used_blocks == 0


def test_rollouts_with_routes_are_those_of_ordinary_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = make_model("mla"), SamplingParams(max_tokens=30, seed=3)
    made = {}
    for stride in (1, 16):
        monkeypatch.setattr("sputnik.engine.engine.STRIDE", stride)
        made[stride] = Rollouts(model, EOS, "fp32", record_routes=True).generate(prompts(4), params, n=4)
    for slow, fast in zip(made[1], made[16], strict=True):
        for a, b in zip(slow, fast, strict=True):
            assert (a.ids, a.finish) == (b.ids, b.finish)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
            assert a.routes is not None and b.routes is not None and np.array_equal(a.routes, b.routes)


def test_who_is_too_late_when_a_stride_begins_is_told_and_counted() -> None:
    now = 0.0
    config = EngineConfig(cache_tokens=1024, precision="fp32")
    engine = Engine(make_model("gqa"), (EOS,), config, clock=lambda: now)
    params = SamplingParams(max_tokens=20, seed=0, ignore_eos=True)
    late, other = (engine.add(Request(p, params, deadline=d)) for p, d in zip(prompts(2), (5.0, None), strict=True))
    engine.step(8)
    now = 6.0
    events = engine.step(8)
    assert [(event.request, event.finish, len(event.ids)) for event in events] == [
        (late, "deadline", 0),
        (other, None, 8),
    ]
    while engine.busy:
        engine.step(8)
    assert engine.metrics.read()["finished"] == 2
