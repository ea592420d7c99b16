"""The sampler against plain full forward passes, row by row and without a cache."""

import pytest
import torch

from sputnik.engine.params import SamplingParams
from sputnik.engine.sampler import Sampler, autocast, draw, nucleus
from sputnik.errors import ConfigError, DataError
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer

EOS = 1
PROMPTS = [[0, 5, 9], [0, 7], [0, 3, 3, 3, 8, 20], [0]]


def small_model(seed: int = 3) -> Transformer:
    """A V3-shaped model with outputs peaked enough that greedy choices are no ties."""
    config = ModelConfig.preset(
        "tiny", vocab_size=48, hidden_size=64, num_hidden_layers=3, max_position_embeddings=64,
        initializer_range=0.3, num_nextn_predict_layers=0,
    )  # fmt: skip
    return Transformer(config).init_weights(torch.Generator().manual_seed(seed)).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model()


@torch.no_grad()
def greedy_without_cache(model: Transformer, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def test_greedy_equals_full_forward_passes(model: Transformer) -> None:
    groups = Sampler(model, EOS, "fp32").generate(PROMPTS, SamplingParams(temperature=0, max_tokens=20))
    assert [group[0].ids for group in groups] == [greedy_without_cache(model, prompt, 20) for prompt in PROMPTS]


def test_dense_attention_samples_through_the_same_code() -> None:
    config = ModelConfig(
        model_type="llama", vocab_size=48, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3, max_position_embeddings=64,
    )  # fmt: skip
    llama = Transformer(config).init_weights(torch.Generator().manual_seed(1)).eval()
    groups = Sampler(llama, EOS, "fp32").generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12))
    assert [group[0].ids for group in groups] == [greedy_without_cache(llama, prompt, 12) for prompt in PROMPTS]


def gaps(model: Transformer, precision: str) -> torch.Tensor:
    """|log-probability of the sampler - of one full forward pass|, over all tokens of some sampled answers."""
    found = []
    for group in Sampler(model, EOS, precision).generate(
        PROMPTS, SamplingParams(temperature=0.8, max_tokens=16, seed=5), n=3
    ):
        for answer in group:
            ids = torch.tensor([[*answer.prompt, *answer.ids]])
            with torch.no_grad(), autocast(precision):
                logprobs = (model(ids)[0] / 0.8).log_softmax(-1)
            own = logprobs[len(answer.prompt) - 1 : -1].gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
            found.append((torch.tensor(answer.logprobs) - own).abs())
    return torch.cat(found)


def test_logprobs_are_those_of_a_full_forward_pass(model: Transformer) -> None:
    assert float(gaps(model, "fp32").max()) < 1e-4


def test_bf16_stays_close_to_a_full_forward_pass() -> None:
    """Rounding moves a router now and then, so the bounds are on the middle and the mean of several models: this is the
    mismatch the trainer logs."""
    found = torch.cat([gaps(small_model(seed), "bf16") for seed in range(16)])
    assert float(found.median()) < 0.04 and float(found.mean()) < 0.1


def test_finished_rows_leave_and_the_others_go_on_unchanged(model: Transformer) -> None:
    """Stopping early on frequent tokens empties the batch in stages; each row still equals itself alone."""
    stops = tuple(range(24, 48))
    params = SamplingParams(temperature=0, max_tokens=24, stop_ids=stops)
    prompts = [[0, token] for token in range(2, 22)]
    sampler = Sampler(model, EOS, "fp32")
    together = [group[0] for group in sampler.generate(prompts, params)]
    alone = [sampler.generate([prompt], params)[0][0] for prompt in prompts]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert len({len(answer.ids) for answer in together}) > 3, "the rows must end at different times"
    assert all((answer.finish == "stop") == (answer.ids[-1] in {EOS, *stops}) for answer in together)


def test_same_seed_same_answers_other_seed_other_answers(model: Transformer) -> None:
    def answers(seed: int | None) -> list[list[int]]:
        params = SamplingParams(max_tokens=12, seed=seed)
        return [a.ids for group in Sampler(model, EOS, "fp32").generate(PROMPTS, params, n=4) for a in group]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    assert answers(None) != answers(None), "no seed: each call draws its own"


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    params = SamplingParams(temperature=0.7)
    chosen, _ = draw(logits.expand(40_000, 4), params, torch.Generator().manual_seed(0))
    shares = torch.bincount(chosen, minlength=4) / 40_000
    expected = (logits[0] / 0.7).softmax(-1)
    assert float((shares - expected).abs().max()) < 4 * 0.5 / 40_000**0.5


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    kept = nucleus(probabilities, 0.7) > 0
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]
    chosen, logprobs = draw(
        probabilities[:1].log().expand(2000, 4), SamplingParams(top_p=0.7), torch.Generator().manual_seed(0)
    )
    assert set(chosen.tolist()) == {1, 3}
    assert {round(value, 4) for value in logprobs.exp().tolist()} == {0.5, 0.25}, "of the whole distribution"


def test_one_token_limit_gives_one_token(model: Transformer) -> None:
    params = SamplingParams(temperature=0, max_tokens=1)
    sampler = Sampler(model, EOS, "fp32")
    assert [len(group[0].ids) for group in sampler.generate(PROMPTS, params)] == [1] * len(PROMPTS)


def test_a_step_of_the_optimiser_is_seen_by_the_next_call() -> None:
    model = small_model()
    sampler = Sampler(model, EOS)
    params = SamplingParams(temperature=0, max_tokens=8)
    before = sampler.generate(PROMPTS, params)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
        model.model.layers[0].self_attn.o_proj.weight.mul_(-1)
    assert sampler.generate(PROMPTS, params) != before


def test_what_cannot_be_sampled_is_refused_with_the_numbers(model: Transformer) -> None:
    sampler = Sampler(model, EOS)
    with pytest.raises(DataError, match="prompt of 60 tokens . max_tokens 10 exceed the context of 64"):
        sampler.generate([[0] * 60], SamplingParams(max_tokens=10))
    with pytest.raises(DataError, match="prompt is empty"):
        sampler.generate([[]], SamplingParams())
    with pytest.raises(ConfigError, match="0 < top_p <= 1"):
        SamplingParams(top_p=0)
    with pytest.raises(ConfigError, match="precision must be"):
        Sampler(model, EOS, "fp16").generate(PROMPTS, SamplingParams(max_tokens=1))
    with pytest.raises(ConfigError, match="contiguous sampler does not implement top_k, n: leave it out"):
        sampler.generate(PROMPTS, SamplingParams(top_k=4, n=2))
    assert sampler.generate([], SamplingParams()) == []


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_rarest_draws_give_a_token_of_the_nucleus(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, uniform))
    logits = torch.randn(200, 281, generator=torch.Generator().manual_seed(0)) * 3
    chosen, logprobs = draw(logits, SamplingParams(top_p=0.9), torch.Generator())
    kept = nucleus(logits.softmax(-1), 0.9)
    assert (kept.gather(1, chosen[:, None]) > 0).all() and torch.isfinite(logprobs).all()


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_logits_that_are_not_finite_are_seen_in_the_log_probabilities(top_p: float) -> None:
    logits = torch.zeros(2, 8)
    logits[0] = torch.nan
    tokens, logprobs = draw(logits, SamplingParams(top_p=top_p), torch.Generator().manual_seed(0))
    assert int(tokens.max()) < 8 and logprobs.isnan().tolist() == [True, False]
