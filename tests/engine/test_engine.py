"""The engine against the contiguous sampler and against itself: company, pages, forks and aborts change no token."""

import itertools
import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from sputnik.engine.config import EngineConfig
from sputnik.engine.engine import Engine
from sputnik.engine.params import SamplingParams
from sputnik.engine.rollouts import Rollouts
from sputnik.engine.sample import Request, Sample
from sputnik.engine.sampler import Sampler
from sputnik.engine.thinking import ThoughtTokens
from sputnik.errors import ConfigError, DataError
from sputnik.hardware import hardware
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer

EOS = 1
SIZES: dict[str, dict[str, Any]] = {
    "mla": {
        "vocab_size": 97, "hidden_size": 40, "intermediate_size": 56, "moe_intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 20,
        "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "max_position_embeddings": 256, "initializer_range": 0.15,
    },
    "gqa": {
        "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
    },
}  # fmt: skip


@pytest.fixture(params=SIZES)
def model(request: pytest.FixtureRequest) -> Transformer:
    return make_model(request.param)


def make_model(name: str) -> Transformer:
    return Transformer(ModelConfig(**SIZES[name])).init_weights(torch.Generator().manual_seed(0)).eval()


def make_engine(model: Transformer, **changes: Any) -> Engine:
    settings = {"cache_tokens": 4096, "block_size": 4, "precision": "fp32"} | changes
    return Engine(model, (EOS,), EngineConfig(**settings))


def prompts(count: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    head = [numbers.randrange(3, 97) for _ in range(shared)]
    return [head + [numbers.randrange(3, 97) for _ in range(numbers.randint(1, 20))] for _ in range(count)]


def ids(groups: list[list[Sample]]) -> list[list[list[int]]]:
    return [[each.written for each in group] for group in groups]


GREEDY = SamplingParams(temperature=0, max_tokens=24)


def test_greedy_answers_are_the_contiguous_samplers(model: Transformer) -> None:
    asked = prompts(7)
    theirs = [[g.ids for g in group] for group in Sampler(model, EOS, "fp32").generate(asked, replace(GREEDY, seed=0))]
    for changes in ({}, {"chunk": 4, "max_running": 2}, {"cache_tokens": 64, "block_size": 4}):
        ours = make_engine(model, **changes).run([Request(prompt, GREEDY) for prompt in asked])
        assert ids(ours) == theirs


def test_log_probabilities_are_the_models(model: Transformer) -> None:
    params = SamplingParams(max_tokens=12, n=3, seed=5, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    asked = prompts(3)
    for prompt, group in zip(asked, make_engine(model).run([Request(p, params) for p in asked]), strict=True):
        for each in group:
            with torch.no_grad():
                logprobs = model(torch.tensor([[*prompt, *each.written]]))[0].log_softmax(dim=-1)
            wanted = [float(logprobs[len(prompt) - 1 + i, id]) for i, id in enumerate(each.written)]
            assert each.logprobs == pytest.approx(wanted, abs=1e-3)
            assert [len(top) for top in each.top] == [2] * 12
        wanted = [float(logprobs[i, id]) for i, id in enumerate(prompt[1:])]
        assert group[0].prompt_logprobs == pytest.approx(wanted, abs=1e-3)


def test_the_exact_mode_gives_a_request_the_same_tokens_in_any_company(model: Transformer) -> None:
    params = SamplingParams(max_tokens=20, seed=11, n=2, logprobs=0)
    alone = make_engine(model, exact=True).run([Request(prompts(1)[0], params)])[0]
    crowd = [Request(p, SamplingParams(max_tokens=30, top_p=0.9, seed=i)) for i, p in enumerate(prompts(9, seed=4))]
    for place, changes in ((0, {}), (5, {"chunk": 8, "max_running": 3}), (9, {"cache_tokens": 100})):
        engine = make_engine(model, exact=True, **changes)
        mixed = [*crowd[:place], Request(prompts(1)[0], params), *crowd[place:]]
        found = engine.run(mixed)[place]
        assert [each.written for each in found] == [each.written for each in alone]
        assert [each.logprobs for each in found] == [each.logprobs for each in alone]


def test_a_prefix_hit_changes_no_token_and_saves_its_prefill(model: Transformer) -> None:
    asked = prompts(4, shared=40)
    cold = [make_engine(model).run([Request(prompt, GREEDY)])[0][0].written for prompt in asked]
    engine = make_engine(model)
    warm = [engine.run([Request(prompt, GREEDY)])[0][0] for prompt in asked]
    assert [each.written for each in warm] == cold
    assert [each.sequence.cached >= 40 for each in warm] == [False, True, True, True]
    salted = engine.run([Request(asked[0], GREEDY, salt=b"another account")])[0][0]
    assert salted.sequence.cached == 0


def test_samples_of_one_prompt_differ_and_share_its_prefill(model: Transformer) -> None:
    engine = make_engine(model)
    prompt = prompts(1, shared=21)[0]
    group = engine.run([Request(prompt, SamplingParams(max_tokens=30, n=8, seed=3, ignore_eos=True))])[0]
    assert len({tuple(each.written) for each in group}) == 8
    assert engine.metrics.computed_tokens == len(prompt) + 8 * 29


@pytest.mark.parametrize("name", [*SIZES, "mtp"])
def test_a_thousand_random_aborts_leak_nothing_and_leave_the_others_answers_alone(name: str) -> None:
    mtp = SIZES["mla"] | {"num_nextn_predict_layers": 1}
    model = (
        make_model(name) if name in SIZES else Transformer(ModelConfig(**mtp)).init_weights(torch.Generator()).eval()
    )
    numbers = random.Random(0)
    asked = prompts(12, shared=6)
    params = [SamplingParams(temperature=0, max_tokens=8 + 2 * place, n=1 + place % 3) for place in range(12)]
    alone = [make_engine(model, exact=True).run([Request(p, q)])[0] for p, q in zip(asked, params, strict=True)]
    engine = make_engine(model, cache_tokens=256, max_running=6, exact=True, guesses=1, adaptive=False)
    alive: dict[int, tuple[int, list[Sample]]] = {}
    aborted = answered = 0
    while aborted < 1000:
        if len(alive) < 10 and numbers.random() < 0.7:
            place = numbers.randrange(12)
            number = engine.add(Request(asked[place], params[place]))
            alive[number] = place, engine.samples(number)
        if alive and numbers.random() < 0.4:
            engine.abort(victim := numbers.choice(list(alive)))
            del alive[victim]
            aborted += 1
        engine.step()
        for number in [n for n, (_, group) in alive.items() if all(each.finish for each in group)]:
            place, group = alive.pop(number)
            assert ids([group]) == ids([alone[place]])
            answered += 1
    for number in alive:
        engine.abort(number)
    assert answered > 100 and not engine.busy
    assert engine.scheduler.figures.used_blocks == 0
    assert not engine._requests and not engine._samples


def test_a_failing_request_takes_nobody_with_it(model: Transformer) -> None:
    class Nothing:
        def bits(self) -> Any:
            return np.zeros(4, dtype=np.int32)

        def accept(self, id: int) -> bool:
            raise AssertionError("nothing was allowed")

    good = prompts(2)
    alone = ids(make_engine(model).run([Request(prompt, GREEDY) for prompt in good]))
    engine = make_engine(model)
    found = engine.run(
        [Request(good[0], GREEDY), Request(good[1], GREEDY, matchers=[Nothing()]), Request(good[1], GREEDY)]
    )
    assert [group[0].finish == "failed" for group in found] == [False, True, False]
    assert [ids(found)[0], ids(found)[2]] == alone
    assert engine.metrics.read()["failed"] == 1


def test_a_thought_is_closed_when_its_budget_is_spent(model: Transformer) -> None:
    tags = ThoughtTokens(open=90, close=91, before=(92,), after=(93,))
    params = SamplingParams(max_tokens=40, thinking_budget=10, seed=0, logit_bias={91: -100, EOS: -100})
    sample = make_engine(model).run([Request(prompts(1)[0], params, in_thought=True, thought=tags)])[0][0]
    assert sample.written[10:13] == [92, 91, 93]
    assert sample.finish == "length"
    assert sample.control is not None and sample.control.closed_by == "budget"


@pytest.mark.parametrize("guesses", [0, 2])
def test_an_early_end_of_thought_is_replaced_and_the_model_goes_on_from_there(guesses: int) -> None:
    """What follows is what the model writes after a prompt that ends with the replaced tokens."""
    model = predicting(train=False)
    tags = ThoughtTokens(open=90, close=91, wait=(92, 93))
    bias = {91: 100.0, EOS: -100.0}
    prompt = prompts(1)[0]
    asked = Request(
        prompt, SamplingParams(max_tokens=6, temperature=0, extend=2, logit_bias=bias), in_thought=True, thought=tags
    )
    engine = make_engine(model, exact=True, guesses=guesses, adaptive=False)
    written = engine.run([asked])[0][0].written
    assert written[:5] == [92, 93, 92, 93, 91]
    plain = Request([*prompt, *written[:5]], SamplingParams(max_tokens=1, temperature=0, logit_bias=bias))
    assert make_engine(model, exact=True).run([plain])[0][0].written == written[5:]


def test_an_answer_can_be_asked_for_at_once(model: Transformer) -> None:
    tags = ThoughtTokens(open=90, close=91)
    engine = make_engine(model)
    params = SamplingParams(max_tokens=20, seed=0, logit_bias={91: -100, EOS: -100})
    number = engine.add(Request(prompts(1)[0], params, in_thought=True, thought=tags))
    written = [id for _ in range(5) for event in engine.step() for id in event.ids]
    engine.answer_now(number)
    written += [id for event in engine.step() for id in event.ids]
    assert len(written) == 6 and written[-1] == 91


def test_recorded_routes_are_those_of_the_model() -> None:
    model = make_model("mla")
    params = SamplingParams(max_tokens=9, n=2, seed=1, ignore_eos=True)
    rollouts = Rollouts(model, EOS, "fp32", record_routes=True)
    for prompt, group in zip(prompts(3, shared=9), rollouts.generate(prompts(3, shared=9), params, n=2), strict=True):
        for each in group:
            with torch.no_grad():
                routes = model.trunk(torch.tensor([[*prompt, *each.ids]])).routes
            theirs = torch.stack([route.chosen for route in routes], dim=1)[:-1]
            assert each.routes is not None and (each.routes[-1] == -1).all()
            ours = torch.from_numpy(each.routes[:-1]).long()
            assert torch.equal(ours.sort(dim=-1).values, theirs.sort(dim=-1).values)


def test_a_deadline_ends_a_request_wherever_it_is(model: Transformer) -> None:
    now = 0.0
    engine = Engine(model, (EOS,), EngineConfig(cache_tokens=256, max_running=1, precision="fp32"), clock=lambda: now)
    params = SamplingParams(max_tokens=50, seed=0, ignore_eos=True)
    engine.add(Request(prompts(1)[0], params, deadline=5.0))
    engine.add(Request(prompts(2)[1], params, deadline=5.0))
    for _ in range(3):
        engine.step()
    now = 6.0
    assert [event.finish for event in engine.step()] == ["deadline", "deadline"]
    assert not engine.busy and engine.scheduler.figures.used_blocks == 0
    assert engine.metrics.read()["finished"] == 2


def test_who_never_got_a_token_has_no_time_to_the_first(model: Transformer) -> None:
    now = 0.0
    engine = Engine(model, (EOS,), EngineConfig(cache_tokens=256, max_running=1, precision="fp32"), clock=lambda: now)
    engine.add(Request([5], SamplingParams(max_tokens=9, ignore_eos=True)))
    engine.add(Request([6], SamplingParams(max_tokens=9), deadline=5.0))
    engine.step()
    now = 6.0
    assert [event.finish for event in engine.step()] == ["deadline", None]
    assert engine.metrics.read()["ttft_p99"] == 0.0


def test_the_scores_of_a_prompt_survive_its_preemption(model: Transformer) -> None:
    prompt, params = [3 + n % 90 for n in range(60)], SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0)
    whole = make_engine(model).run([Request(prompt, params)])[0][0].prompt_logprobs
    engine = make_engine(model, chunk=8)
    other = engine.add(Request([5, 6], SamplingParams(max_tokens=200, ignore_eos=True)))
    engine.step()
    each = engine.samples(engine.add(Request(prompt, params)))[0]
    engine.step()
    assert 0 < len(each.prompt_logprobs) < 59
    engine.scheduler.preempt(each.sequence)
    engine.abort(other)  # its next piece is larger and begins anew
    while engine.busy:
        engine.step()
    assert each.prompt_logprobs == pytest.approx(whole, abs=1e-4)


def test_of_a_resumed_answer_the_prompt_alone_is_scored(model: Transformer) -> None:
    params = SamplingParams(max_tokens=6, temperature=0, prompt_logprobs=0, ignore_eos=True)
    whole, resumed = make_engine(model).run([Request([5, 9, 7], params), Request([5, 9, 7], params, written=(8, 4))])
    assert resumed[0].prompt_logprobs == pytest.approx(whole[0].prompt_logprobs, abs=1e-4)


@pytest.mark.parametrize("name", ["block_size", "max_running", "chunk", "guesses", "cache_bytes"])
def test_settings_that_cannot_be_meant_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = -1: at least"):
        EngineConfig(**{name: -1})


def test_a_cache_larger_than_memory_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"10{13} tokens takes \d+.\d+ GB, \d+.\d+ GB .* lower cache_tokens"):
        make_engine(make_model("gqa"), cache_tokens=10**13)


def test_rollouts_follow_the_weights(model: Transformer) -> None:
    rollouts = Rollouts(model, EOS, "fp32")
    params = SamplingParams(temperature=0, max_tokens=16, seed=0)
    rollouts.generate(prompts(3), params)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    theirs = Sampler(model, EOS, "fp32").generate(prompts(3), params)
    ours = rollouts.generate(prompts(3), params)
    assert [g[0].ids for g in ours] == [g[0].ids for g in theirs]
    assert ours[0][0].logprobs == pytest.approx(theirs[0][0].logprobs, abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([5] * 250, SamplingParams(max_tokens=20), "250 tokens .* 256"),
        ([], SamplingParams(), "empty"),
        ([3, 97], SamplingParams(), "token 97 .* 97"),
        ([3], SamplingParams(stop_ids=(99,)), "token 99"),
        ([3] * 80, SamplingParams(max_tokens=100), "180 tokens"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_the_engine_lives_on(
    prompt: list[int], params: SamplingParams, words: str
) -> None:
    engine = make_engine(make_model("gqa"), cache_tokens=128)
    with pytest.raises((DataError, ConfigError), match=words):
        engine.add(Request(prompt, params))
    assert not engine.busy
    assert engine.run([Request([3, 4], GREEDY)])[0][0].finish in ("stop", "length")


def test_the_share_of_the_roofline_is_the_least_time_over_the_time_taken() -> None:
    model = make_model("gqa")
    ticks = itertools.count()
    engine = Engine(model, (EOS,), EngineConfig(cache_tokens=512, precision="fp32"), clock=lambda: float(next(ticks)))
    engine.run([Request([5] * 10, SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))])
    weights = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    assert engine.metrics.steps == 3
    assert engine.metrics.bytes == 4 * (3 * weights + (10 + 11 + 12) * 2 * 2 * 2 * 8)
    slow = replace(hardware("H100"), bandwidth=1000.0, bf16=1e30)
    assert engine.metrics.roofline(slow) == pytest.approx(engine.metrics.bytes / 1000 / engine.metrics.busy_seconds)


# --- speculative decoding ---


@cache
def predicting(train: bool = True) -> Transformer:
    """A model with a prediction module; trained for some steps on a text that repeats, so that guesses can be right."""
    model = Transformer(ModelConfig(**SIZES["mla"], num_nextn_predict_layers=1))
    model.init_weights(torch.Generator().manual_seed(0))
    text = torch.tensor([[3 + (7 * i + i // 5) % 40 for i in range(120)]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80 if train else 0):
        trunk = model.trunk(text)
        ahead = model.mtp_hidden(trunk.residual, text).hidden[0]
        main = torch.nn.functional.cross_entropy(model.head(trunk.hidden[0, :-1]), text[0, 1:])
        further = torch.nn.functional.cross_entropy(model.head(ahead[0, :-1]), text[0, 2:])
        optimizer.zero_grad()
        (main + 0.3 * further).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("guesses", [1, 3])
def test_guesses_change_no_token_and_save_steps(guesses: int) -> None:
    model = predicting()
    learnt = [3 + (7 * i + i // 5) % 40 for i in range(30)]
    asked = [
        Request(learnt, SamplingParams(temperature=0, max_tokens=50)),
        Request(learnt[:11], SamplingParams(max_tokens=40, seed=3, top_p=0.9, logprobs=0)),
        Request(prompts(1)[0], SamplingParams(max_tokens=30, seed=4, n=2)),
        Request(learnt[5:], SamplingParams(temperature=0, max_tokens=20, frequency_penalty=0.5)),
    ]
    plain = make_engine(model, exact=True)
    guessing = make_engine(model, exact=True, guesses=guesses, adaptive=False)
    wanted, found = plain.run(asked), guessing.run(asked)
    assert ids(found) == ids(wanted)
    assert [[each.finish for each in group] for group in found] == [[each.finish for each in group] for group in wanted]
    assert found[1][0].logprobs == wanted[1][0].logprobs
    assert guessing.metrics.steps < 0.8 * plain.metrics.steps
    assert guessing.metrics.read()["acceptance_1"] > 0.5
    assert guessing.scheduler.figures.used_blocks == 0


def test_guesses_keep_the_distribution() -> None:
    """Of the third token, over many seeds, hot enough that guesses are often wrong."""
    model = predicting()
    learnt = [3 + (7 * i + i // 5) % 40 for i in range(30)]
    asked = [
        Request(learnt, SamplingParams(max_tokens=4, seed=seed, temperature=2.0, ignore_eos=True))
        for seed in range(1500)
    ]
    settings = {"max_running": 300, "cache_tokens": 1 << 15}
    engine = make_engine(model, guesses=2, adaptive=False, **settings)
    thirds = [group[0].written[2] for group in engine.run(asked)]
    expected = [group[0].written[2] for group in make_engine(model, **settings).run(asked)]
    assert 0.05 < engine.metrics.read()["acceptance_1"] < 0.9
    for token in set(expected):
        p = expected.count(token) / 1500
        assert abs(thirds.count(token) / 1500 - p) < 4 * (2 * p * (1 - p) / 1500) ** 0.5 + 1e-3


def test_guessing_is_switched_off_where_it_does_not_pay() -> None:
    """On a clock by which all steps take equally long: untrained guesses gain nothing, right ones double the speed."""
    for trained in (False, True):
        clock = itertools.count().__next__
        config = EngineConfig(cache_tokens=512, guesses=1, precision="fp32")
        engine = Engine(predicting(trained), (EOS,), config, clock=clock)
        text = [3 + (7 * i + i // 5) % 40 for i in range(30)]
        engine.add(Request(text, SamplingParams(max_tokens=120, temperature=0, ignore_eos=True)))
        while engine.busy:
            engine.step()
        assert engine.speculation is not None
        assert (engine.speculation.drafted[0] > 30) == trained
