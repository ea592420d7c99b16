"""Sampling parameters: what cannot be meant is refused in one line, what is not implemented is refused by name."""

import math
from typing import Any

import pytest

from sputnik.engine.params import SamplingParams
from sputnik.errors import ConfigError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1}, "temperature = -1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"temperature": 1e-9}, "0 .greedy. or 0.0001 to 1000000"),
        ({"temperature": 1e39}, "temperature = 1e.39"),
        ({"top_p": 0}, "0 < top_p <= 1"),
        ({"top_p": math.nan}, "0 < top_p <= 1"),
        ({"top_k": -1}, "top_k = -1"),
        ({"min_p": 1.5}, "0 <= min_p <= 1"),
        ({"presence_penalty": 3}, "presence_penalty <= 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty <= 2"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"logit_bias": {5: 101}}, "logit_bias must lie"),
        ({"logit_bias": {5: math.nan}}, "logit_bias must lie"),
        ({"logit_bias": {-5: 1}}, "are >= 0"),
        ({"stop_ids": (-1,)}, "are >= 0"),
        ({"stop": "text"}, "a tuple of texts"),
        ({"stop": ("",)}, "none of them empty"),
        ({"max_tokens": 0}, "max_tokens >= 1"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens <= max_tokens, got 5, 4"),
        ({"n": 0}, "1 <= n <= 16384, got 0"),
        ({"n": 10**9}, "got 1000000000"),
        ({"best_of": 10**9}, "or more than 16384"),
        ({"n": 4, "best_of": 2}, "best_of = 2 is less than n = 4"),
        ({"seed": 2**63}, "more than 64 bits"),
        ({"logprobs": -1}, "logprobs = -1"),
        ({"thinking_budget": -1}, "thinking_budget = -1"),
        ({"extend": -1}, "extend = -1"),
        ({"extend": 1, "logprobs": 0}, "leave out logprobs and penalties"),
        ({"extend": 1, "repetition_penalty": 1.1}, "leave out logprobs and penalties"),
        ({"max_tokens": 8, "answer_reserve": 8}, "leave room in max_tokens = 8"),
        ({"max_tokens": 2.5}, "max_tokens = 2.5: give int, not float"),
        ({"max_tokens": None}, "max_tokens = None: give int, not NoneType"),
        ({"temperature": "hot"}, "temperature = 'hot': give int \\| float, not str"),
        ({"seed": 1.5}, "seed = 1.5: give int \\| None, not float"),
        ({"ignore_eos": "no"}, "ignore_eos = 'no': give bool, not str"),
        ({"logit_bias": [5]}, r"logit_bias = \[5\]: give Mapping, not list"),
        ({"logit_bias": {"5": 1}}, "are >= 0"),
        ({"logit_bias": {5: "1"}}, "logit_bias must lie"),
        ({"stop_ids": 5}, "stop_ids = 5: give Collection, not int"),
        ({"stop": None}, "a tuple of texts"),
        ({"stop": (5,)}, "a tuple of texts"),
        ({"schema": 5}, "schema = 5: give"),
        ({"regex": "a", "schema": {}}, "one of schema, regex and grammar, not schema and regex"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**wrong)


def test_extremes_that_can_be_meant_are_taken() -> None:
    params = SamplingParams(
        temperature=0, top_p=1e-9, top_k=1, min_p=1, presence_penalty=-2, logit_bias={0: -100}, stop=("\n",),
        max_tokens=1, min_tokens=1, seed=-(2**63), n=2, best_of=2, logprobs=0, thinking_budget=0,
    )  # fmt: skip
    assert params.greedy and params.samples == 2


def test_ids_outside_the_vocabulary_are_named() -> None:
    SamplingParams(logit_bias={9: 1}, stop_ids=(9,), logprobs=10).check_vocabulary(10)
    with pytest.raises(ConfigError, match="token 10 is not in the vocabulary of 10"):
        SamplingParams(logit_bias={10: 1}).check_vocabulary(10)
    with pytest.raises(ConfigError, match="prompt_logprobs = 11 exceeds"):
        SamplingParams(prompt_logprobs=11).check_vocabulary(10)


def test_a_field_that_is_not_implemented_is_refused_by_name() -> None:
    SamplingParams(top_p=0.5, top_k=0, logit_bias={}).only({"top_p"}, "this")
    with pytest.raises(ConfigError, match="this does not implement top_k, logit_bias: leave it out"):
        SamplingParams(top_p=0.5, top_k=3, logit_bias={1: 1}).only({"top_p"}, "this")


def test_the_record_of_the_settings_holds_what_was_set() -> None:
    assert SamplingParams(seed=3, top_k=5).settings() == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 5, "max_tokens": 256, "seed": 3,
    }  # fmt: skip
