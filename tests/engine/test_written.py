"""An answer that was begun elsewhere goes on as it would have there: same tokens, same end, whatever decides them."""

from dataclasses import replace

import pytest
import torch

from sputnik.engine.config import EngineConfig
from sputnik.engine.engine import Engine
from sputnik.engine.params import SamplingParams
from sputnik.engine.sample import Request
from sputnik.engine.sampling import sample_seed
from sputnik.engine.thinking import ThoughtTokens
from sputnik.errors import ConfigError, DataError
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer

PROMPT = [5, 9, 2, 14, 7, 3]
THOUGHT = ThoughtTokens(open=40, close=41, before=(20,), after=(21, 22))
VARIANTS = {
    "greedy": SamplingParams(max_tokens=20, temperature=0),
    "drawn": SamplingParams(max_tokens=20, seed=3, top_p=0.9),
    "penalties": SamplingParams(max_tokens=20, seed=4, presence_penalty=1.5, repetition_penalty=1.3),
    "budget": SamplingParams(max_tokens=24, seed=5, thinking_budget=6, logit_bias={41: -100}),
    "reserve": SamplingParams(max_tokens=24, seed=5, answer_reserve=8, logit_bias={41: -100}),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = Transformer(ModelConfig.preset("tiny", vocab_size=64, initializer_range=0.15))
    model.init_weights(torch.Generator().manual_seed(0))
    return Engine(model, (1,), EngineConfig(exact=True, precision="fp32", cache_tokens=2048))


@pytest.mark.parametrize("name", VARIANTS)
def test_an_answer_goes_on_after_any_of_its_tokens(engine: Engine, name: str) -> None:
    params = VARIANTS[name]
    request = Request(PROMPT, params, in_thought=True, thought=THOUGHT)
    ((whole,),) = engine.run([request])
    cuts = range(1, len(whole.written))
    for cut, (rest,) in zip(cuts, engine.run([replace(request, written=whole.written[:at]) for at in cuts])):
        assert (rest.written, rest.finish) == (whole.written, whole.finish), cut
        assert rest.control is not None and whole.control is not None
        assert rest.control.closed_by == whole.control.closed_by
    assert not engine.busy and engine.scheduler.figures.used_blocks == 0


def test_each_of_several_answers_goes_on_by_itself(engine: Engine) -> None:
    params = SamplingParams(max_tokens=12, n=3, seed=11, ignore_eos=True)
    (three,) = engine.run([Request(PROMPT, params)])
    assert len({tuple(each.written) for each in three}) == 3
    for index, each in enumerate(three):
        alone = replace(params, n=1, seed=sample_seed(11, index))
        ((rest,),) = engine.run([Request(PROMPT, alone, written=each.written[:5])])
        assert rest.written == each.written


def test_what_cannot_go_on_is_refused(engine: Engine) -> None:
    params = SamplingParams(max_tokens=4, seed=0)
    with pytest.raises(ConfigError, match="one sample"):
        engine.add(Request(PROMPT, replace(params, n=2), written=[3]))
    with pytest.raises(DataError, match="whole answer"):
        engine.add(Request(PROMPT, params, written=[3, 4, 5, 6]))
    with pytest.raises(DataError, match="token 64"):
        engine.add(Request(PROMPT, params, written=[64]))
    assert not engine.busy
