"""The batched draw: the right distribution, and rows that know nothing of each other."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sputnik.engine.params import SamplingParams
from sputnik.engine.sampling import (
    Drawn,
    Masks,
    Row,
    SamplingBatch,
    argmax,
    draw,
    sample,
    sample_seed,
    score,
    uniform,
)
from sputnik.model import kernels


@pytest.fixture(params=["native", "twin"], autouse=True)
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything here holds for the kernel and for its twin in torch."""
    name: str = request.param
    if name == "twin":
        monkeypatch.setattr(kernels, "load", lambda: False)
    elif not kernels.load():
        pytest.skip("the kernels are not built here")
    return name


EOS = 1
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.6},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 7},
    {"min_p": 0.2},
    {"top_k": 9, "top_p": 0.7, "min_p": 0.05},
    {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.4},
    {"temperature": 0, "repetition_penalty": 1.2, "min_tokens": 50},
    {"logit_bias": {3: 4.0, 5: -100.0}, "logprobs": 3, "min_tokens": 200},
    {"temperature": 0, "logprobs": 5},
]


def logits_of(rows: int, vocab: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def one(logits: Tensor, row: Row, position: int, **extra: Any) -> Drawn:
    batch = SamplingBatch([row], logits.shape[-1], [EOS])
    return sample(logits[None], batch, torch.tensor([position]), **extra)


def kept(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """The slow twin of the truncation: each token of (V,) compared with every other, in fp64."""
    weights = probabilities.double()
    likelier = weights[None, :] > weights[:, None]
    if params.top_k:
        weights = weights * (likelier.sum(1) < params.top_k)
    inside = weights > 0
    if params.top_p < 1:
        inside &= (likelier * weights).sum(1) < params.top_p * weights.sum()
    return inside & (weights >= params.min_p * weights.max())


def chi_square(tokens: Tensor, expected: Tensor) -> float:
    """Standardised excess of the chi-square statistic: about N(0, 1) if `tokens` follow `expected`."""
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0, "a token of probability 0 was drawn"
    wanted = expected[expected > 0] * len(tokens)
    statistic = ((counts[expected > 0] - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom)) if freedom else 0.0


@pytest.mark.parametrize("settings", KINDS[1:7], ids=str)
@pytest.mark.parametrize("vocab", [20, 300])
def test_draws_follow_the_truncated_distribution(settings: dict[str, Any], vocab: int) -> None:
    params = SamplingParams(**settings)
    logits = logits_of(1, vocab, seed=4)[0]
    probabilities = (logits / params.temperature).double().softmax(-1)
    expected = probabilities * kept(probabilities, params)
    draws = 20_000
    batch = SamplingBatch([Row(params, seed=11)] * draws, vocab, [EOS])
    drawn = sample(logits.expand(draws, vocab), batch, torch.arange(draws))
    assert chi_square(drawn.tokens, expected / expected.sum()) < 4
    assert drawn.logprobs is not None
    assert torch.allclose(drawn.logprobs.double(), probabilities.log()[drawn.tokens], atol=1e-5)


@pytest.mark.parametrize("vocab", [7, 300, 5000])
def test_kernel_and_twin_draw_the_same_tokens(vocab: int, side: str) -> None:
    if side == "twin":
        pytest.skip("compares the two")
    rows = [Row(SamplingParams(**KINDS[n % 7]), seed=n) for n in range(420)]
    ours = SamplingBatch(rows, vocab, [EOS])
    twin = SamplingBatch(rows, vocab, [EOS])
    twin._native = None
    for step in range(4):
        logits, positions = logits_of(420, vocab, seed=step), torch.arange(420) + step
        (tokens, values), (theirs, expected) = (each.choose(logits, positions) for each in (ours, twin))
        same = tokens == theirs
        assert (~same).sum() <= 1  # a number within rounding of where two tokens meet
        torch.testing.assert_close(values[same], expected[same], rtol=2e-5, atol=1e-9)


def test_different_seeds_at_one_position_are_independent_draws() -> None:
    """Consecutive seeds are what people use."""
    logits = logits_of(1, 16, seed=2)[0]
    rows = [Row(SamplingParams(), seed) for seed in range(20_000)]
    drawn = sample(logits.expand(len(rows), 16), SamplingBatch(rows, 16, [EOS]), torch.zeros(len(rows)).long())
    assert chi_square(drawn.tokens, logits.double().softmax(-1)) < 4
    pairs = drawn.tokens[:-1] * 16 + drawn.tokens[1:]
    shares = logits.double().softmax(-1)
    assert chi_square(pairs, (shares[:, None] * shares[None, :]).flatten()) < 4


def test_uniform_numbers_are_uniform_over_seeds_positions_and_attempts() -> None:
    seeds, positions = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(-200, 200), torch.arange(200), indexing="ij")
    )
    values = torch.cat([uniform(seeds, positions, attempt) for attempt in (0, 1)])
    assert values.min() > 0 and values.max() <= 1 and len(values.unique()) == len(values)
    assert chi_square((values * 1000).long().clamp(max=999), torch.full((1000,), 1e-3).double()) < 4
    grid = uniform(seeds, positions).view(400, 200) - 0.5
    for left, right in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[1:, :-1], grid[:-1, 1:])):
        assert abs(float((left * right).mean()) * 12) < 4 / math.sqrt(left.numel())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.sampled_from([2, 7, 128, 129, 300, 1000]),
    top_k=st.sampled_from([0, 1, 2, 5, 10_000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 5.0]),
)
def test_no_draw_leaves_what_truncation_keeps(
    seed: int, vocab: int, top_k: int, top_p: float, min_p: float, spread: float
) -> None:
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    logits = (logits_of(1, vocab, seed, spread)[0] * 4).round() / 4  # equals are the rule
    drawn = sample(logits.expand(200, vocab), SamplingBatch([Row(params, seed)] * 200, vocab, [EOS]), torch.arange(200))
    assert kept(logits.softmax(-1), params)[drawn.tokens].all()


def mixed_batch(vocab: int, rows: int) -> tuple[Tensor, list[Row], Tensor]:
    logits = logits_of(rows, vocab, seed=vocab)
    generator = torch.Generator().manual_seed(5)
    texts = torch.randint(vocab, (rows, 2, 40), generator=generator).tolist()
    kinds = itertools.cycle(KINDS)
    made = [Row(SamplingParams(**next(kinds)), n % 5, prompt, done) for n, (prompt, done) in enumerate(texts)]
    return logits, made, torch.randint(100, (rows,), generator=generator)


@pytest.mark.parametrize(("vocab", "rows"), [(61, 77), (512, 300), (49_152, 60), (50_001, 30)])
def test_a_row_does_not_depend_on_the_rest_of_its_batch(vocab: int, rows: int) -> None:
    """Bit for bit: token and log-probability, alone, in company, and with the company shuffled."""
    logits, made, positions = mixed_batch(vocab, rows)
    together = sample(logits, SamplingBatch(made, vocab, [EOS]), positions)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))[: rows - 1]
    shuffled = sample(logits[order], SamplingBatch([made[n] for n in order], vocab, [EOS]), positions[order])
    assert together.logprobs is not None and shuffled.logprobs is not None
    assert torch.equal(together.tokens[order], shuffled.tokens)
    assert torch.equal(together.logprobs[order], shuffled.logprobs)
    for n in range(0, rows, max(1, rows // 25)):
        alone = one(logits[n], made[n], int(positions[n]))
        assert int(alone.tokens) == int(together.tokens[n])
        if alone.logprobs is not None:
            assert float(alone.logprobs) == float(together.logprobs[n])


def test_a_row_draws_the_same_on_any_number_of_threads() -> None:
    logits, made, positions = mixed_batch(50_001, 12)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(sample(logits, SamplingBatch(made, 50_001, [EOS]), positions))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.tokens, results[0].tokens)
        assert other.logprobs is not None and results[0].logprobs is not None
        assert torch.equal(other.logprobs, results[0].logprobs)


def test_log_probabilities_are_the_models_own_whatever_edits_the_draw() -> None:
    logits, made, positions = mixed_batch(100, 44)
    forced = torch.full((44,), -1)
    forced[::3] = 9
    drawn = sample(logits, SamplingBatch(made, 100, [EOS]), positions, forced=forced)
    assert (drawn.tokens[::3] == 9).all()
    temperature = torch.tensor([row.params.temperature or 1.0 for row in made])
    own = (logits / temperature[:, None]).log_softmax(-1)
    assert drawn.logprobs is not None
    assert torch.allclose(drawn.logprobs, own.gather(1, drawn.tokens[:, None])[:, 0], atol=1e-5)
    for top, k in zip(drawn.top, (3, 5), strict=True):
        assert [made[n].params.logprobs for n in top.rows.tolist()] == [k] * 4
        assert torch.equal(top.ids, own[top.rows].topk(k).indices)
        assert torch.allclose(top.logprobs, own[top.rows].topk(k).values)


def openai_penalties(logits: Tensor, row: Row) -> Tensor:
    """The formulas of OpenAI's documentation (presence, frequency) and of CTRL (repetition), token by token."""
    result = logits.clone()
    for id in range(len(logits)):
        count, p = list(row.written).count(id), row.params
        value = float(logits[id]) + p.logit_bias.get(id, 0.0)
        if count or id in row.prompt:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        result[id] = value - p.frequency_penalty * count - p.presence_penalty * (count > 0)
    return result


def test_penalties_and_bias_follow_their_published_formulas() -> None:
    params = [
        SamplingParams(presence_penalty=0.5),
        SamplingParams(),
        SamplingParams(frequency_penalty=0.25, logit_bias={0: -3.0, 4: 2.0}),
        SamplingParams(repetition_penalty=1.7, presence_penalty=-0.5),
    ]
    rows = [Row(each, n, prompt=[2, 3, 3, 11], written=[4, 4, 5, n]) for n, each in enumerate(params)]
    logits = logits_of(4, 12)
    batch = SamplingBatch(rows, 12, [EOS])
    wanted = torch.stack([openai_penalties(line, row) for line, row in zip(logits, rows, strict=True)])
    assert torch.allclose(batch.edit(logits, torch.zeros(4).long()), wanted, atol=1e-6)


def test_observed_tokens_count_as_if_the_batch_were_built_anew() -> None:
    params = [SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2), SamplingParams(), SamplingParams(top_k=3)]
    params += [SamplingParams(presence_penalty=1.0)]
    written: list[list[int]] = [[], [3], [4], [5, 5]]
    batch = SamplingBatch([Row(p, 0, [7, 8], list(w)) for p, w in zip(params, written, strict=True)], 20, [EOS])
    logits = logits_of(4, 20)
    for tokens in torch.randint(20, (30, 4), generator=torch.Generator().manual_seed(3)):
        batch.observe(tokens)
        for row, token in zip(written, tokens.tolist(), strict=True):
            row.append(token)
        anew = SamplingBatch([Row(p, 0, [7, 8], w) for p, w in zip(params, written, strict=True)], 20, [EOS])
        positions = torch.tensor([len(row) for row in written])
        assert torch.allclose(batch.edit(logits, positions), anew.edit(logits, positions))
    assert batch.penalised


def test_the_end_waits_for_the_minimum_length() -> None:
    logits = torch.zeros(1, 10)
    logits[0, EOS], logits[0, 4] = 30.0, 20.0
    params = SamplingParams(temperature=0, min_tokens=3, stop_ids=(4,))
    chosen = [int(one(logits[0], Row(params, 0), position).tokens) for position in range(5)]
    assert EOS not in chosen[:3] and 4 not in chosen[:3] and chosen[3:] == [EOS, EOS]
    free = SamplingParams(temperature=0, min_tokens=3, ignore_eos=True)
    assert int(one(logits[0], Row(free, 0), 0).tokens) == EOS, "an ignored end does not end the text"


def test_only_allowed_tokens_are_drawn_and_masks_may_be_narrower_than_the_vocabulary() -> None:
    allowed = [0, 31, 32, 63]
    bits = [0, 0]
    for id in allowed:
        bits[id // 32] |= 1 << (id % 32)
    signed = torch.tensor([[word - 2**32 if word >= 2**31 else word for word in bits]], dtype=torch.int32)
    rows = [Row(SamplingParams(temperature=t), n) for n, t in enumerate([1.0, 0.0, 1.0] * 100)]
    logits = logits_of(300, 70)
    masked = torch.arange(0, 300, 2)
    drawn = sample(
        logits,
        SamplingBatch(rows, 70, [EOS]),
        torch.zeros(300).long(),
        masks=Masks(masked, signed.expand(len(masked), 2)),
    )
    assert set(drawn.tokens[masked].tolist()) == set(allowed)
    free = sample(logits, SamplingBatch(rows, 70, [EOS]), torch.zeros(300).long())
    assert torch.equal(drawn.tokens[1::2], free.tokens[1::2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("greedy", [True, False])
def test_broken_logits_spoil_their_own_row_only(bad: float, greedy: bool) -> None:
    """One NaN or infinity, or a row where nothing is allowed."""
    kinds = [{"temperature": 0}] if greedy else KINDS
    rows = [Row(SamplingParams(**kinds[n % len(kinds)]), n) for n in range(33)]
    logits = logits_of(33, 300)
    good = sample(logits, SamplingBatch(rows, 300, [EOS]), torch.zeros(33).long())
    logits[::4] = bad if bad < 0 else logits[::4]
    logits[::4, 200] = bad
    drawn = sample(logits, SamplingBatch(rows, 300, [EOS]), torch.zeros(33).long())
    assert (~drawn.sound).nonzero()[:, 0].tolist() == list(range(0, 33, 4)) and good.sound.all()
    assert torch.equal(drawn.tokens[drawn.sound], good.tokens[drawn.sound])
    assert ((drawn.tokens >= 0) & (drawn.tokens < 300)).all()


@pytest.mark.parametrize("fraction", [2.0**-53, 1e-9, 0.5, 1 - 1e-9, 1.0])
def test_the_rarest_numbers_draw_a_token_of_positive_weight(fraction: float) -> None:
    for vocab in (3, 128, 300, 50_001):
        weights = logits_of(20, vocab, spread=20.0).softmax(-1)
        weights[:, [0, 1, -1]] = 0.0
        if vocab > 3:
            tokens = draw(weights, torch.full((20,), fraction, dtype=torch.float64))
            assert (weights.gather(1, tokens[:, None]) > 0).all()


def test_a_draw_is_where_the_running_sum_reaches_the_number() -> None:
    """Beside one plain fp64 cumulative sum over the whole row."""
    weights = logits_of(2000, 777).softmax(-1)
    numbers = uniform(torch.arange(2000), torch.zeros(2000).long())
    reached = weights.double().cumsum(-1)
    plain = torch.searchsorted(reached, numbers[:, None] * reached[:, -1:])[:, 0]
    assert (draw(weights, numbers) == plain).float().mean() > 0.999


@pytest.mark.parametrize("rounded", [lambda x: x, torch.round], ids=["distinct", "equals"])
def test_argmax_is_the_first_of_the_largest(rounded: Callable[[Tensor], Tensor]) -> None:
    for vocab in (1, 2, 128, 129, 1000):
        logits = rounded(logits_of(50, vocab))
        assert torch.equal(argmax(logits), logits.argmax(-1))


def test_greedy_rows_cost_no_probabilities_unless_someone_asks() -> None:
    logits = logits_of(3, 50)
    silent = sample(logits, SamplingBatch([Row(SamplingParams(temperature=0), 0)] * 3, 50, [EOS]), torch.arange(3))
    asked = SamplingParams(temperature=0, logprobs=0)
    scored = sample(logits, SamplingBatch([Row(asked, 0)] * 3, 50, [EOS]), torch.arange(3))
    assert silent.logprobs is None and torch.equal(silent.tokens, scored.tokens)
    assert scored.logprobs is not None and torch.allclose(scored.logprobs, logits.log_softmax(-1).amax(-1), atol=1e-6)


def test_prompt_tokens_are_scored_at_temperature_one() -> None:
    logits, tokens = logits_of(6, 40), torch.tensor([3, 1, 4, 1, 5, 9])
    own, top = score(logits, tokens, k=2)
    assert torch.equal(own, logits.log_softmax(-1)[torch.arange(6), tokens])
    assert torch.equal(top.ids[:, 0], logits.argmax(-1)) and top.logprobs.shape == (6, 2)


def test_samples_of_one_request_have_seeds_of_their_own() -> None:
    seeds = [sample_seed(seed, index) for seed in range(50) for index in range(50)]
    assert len(set(seeds)) == 2500 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert sample_seed(7, 0) == 7
