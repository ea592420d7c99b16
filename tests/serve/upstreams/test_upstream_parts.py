"""The parts of the way to an upstream: who is trusted, bytes to events, what is read and completed, flags."""

import asyncio
import random
from typing import Any

import httpx2
import msgspec
import pytest

from sputnik.cli.serve import ServeConfig
from sputnik.errors import ConfigError
from sputnik.serve.books.books import tokens_of
from sputnik.serve.books.prices import Tokens
from sputnik.serve.refusals import Refusal
from sputnik.serve.settings import UpstreamSettings
from sputnik.serve.upstreams.breaker import Breaker, Rules
from sputnik.serve.upstreams.events import LONGEST, Events
from sputnik.serve.upstreams.fleet import Fleet, read_object
from sputnik.serve.upstreams.forward import Forward, _frame
from sputnik.serve.upstreams.plain import completed, read, wish_of


def test_a_replica_falls_and_rises_with_hysteresis() -> None:
    breaker = Breaker(Rules(probes=2, answers=3, rises=2, most=8, calm=60))
    assert not breaker.up
    breaker.worked("probe", 0)
    assert breaker.up, "the first good probe is enough"
    needed = []
    for _ in range(5):
        breaker.failed("probe", 1)
        assert not needed or breaker.up
        breaker.failed("probe", 1)
        goods = 0
        while not breaker.up:
            breaker.worked("probe", 2)
            assert not breaker.up, "only tokens bring it back"
            breaker.worked("token", 2)
            goods += 1
        needed.append(goods)
    assert needed == [2, 4, 8, 8, 8]
    breaker.failed("probe", 100)
    breaker.failed("probe", 100)
    breaker.worked("token", 101)
    breaker.failed("token", 101)
    breaker.worked("token", 101)
    assert not breaker.up, "in a row"
    breaker.worked("token", 101)
    assert breaker.up, "after calm, two are enough again"


def test_failed_answers_make_suspect_and_a_token_decides() -> None:
    breaker = Breaker(Rules(probes=2, answers=3))
    breaker.worked("probe", 0)
    for _ in range(2):
        breaker.failed("answer", 1)
    breaker.worked("answer", 1)
    for _ in range(2):
        breaker.failed("answer", 1)
    assert not breaker.suspect, "in a row"
    breaker.failed("answer", 1)
    breaker.worked("probe", 2)
    assert breaker.up and breaker.suspect, "a client's requests alone take no server out"
    breaker.worked("token", 2)
    assert breaker.up and not breaker.suspect
    for _ in range(3):
        breaker.failed("answer", 3)
    breaker.failed("token", 4)
    assert not breaker.up and breaker.doubted, "it has to show a token"
    breaker.failed("probe", 5)
    assert not breaker.doubted, "nothing is asked of what does not answer probes"


def test_events_are_the_same_however_they_are_split(events_of_a_stream: list[bytes]) -> None:
    text = b": ping\r\n\r\n" + b"".join(events_of_a_stream) + b"data: one\r\ndata:two\r\n\r\nevent: x\n\n"
    whole = Events().feed(text)
    assert whole[-1] == b"one\ntwo" and len(whole) == len(events_of_a_stream)
    dice = random.Random(0)
    for _ in range(50):
        events, found, at = Events(), list[bytes](), 0
        while at < len(text):
            size = dice.randint(1, 40)
            found += events.feed(text[at : at + size])
            at += size
        assert found == whole
    with pytest.raises(ValueError, match="more than"):
        Events().feed(b"data: " + b"x" * LONGEST)


def test_what_nests_without_end_is_nonsense_as_any_other() -> None:
    """And no error of ours: a list of models that is read so would end the gateway."""
    deep = b'{"data":' * 100_000
    with pytest.raises(ValueError, match="no JSON object"):
        _frame(deep)
    with pytest.raises(ValueError, match="not JSON"):
        asyncio.run(read_object(httpx2.Response(200, content=deep)))


def test_usage_never_makes_up_a_cache() -> None:
    assert completed({"prompt_tokens": 5})["prompt_cache_told"] is False
    found = completed({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 9}})
    assert (found["prompt_cache_hit_tokens"], found["prompt_cache_miss_tokens"]) == (5, 0)
    assert completed({"prompt_tokens": 5, "prompt_cache_hit_tokens": 2})["prompt_cache_miss_tokens"] == 3


def test_a_wish_is_guessed_by_its_length_and_its_limits() -> None:
    wish = read(b'{"model": "m", "messages": [{"role": "user", "content": "' + b"x" * 400 + b'"}], "n": 2}', "chat")
    assert wish.samples == 2 and wish.answer == 2 * 1024 and 100 <= wish.prompt <= 115
    several = read(b'{"model": "m", "prompt": ["x", "y", "z"], "n": 2, "best_of": 4, "max_tokens": 10}', "text")
    assert several.samples == 6 and several.answer == 3 * 4 * 10, "each prompt is answered"
    ids = read(b'{"model": "m", "prompt": [1, 2, 3], "max_tokens": 9, "max_completion_tokens": 5}', "text")
    assert ids.samples == 1 and ids.answer == 9
    for body in (b'"prompt": [%s"x"]' % (b'"x", ' * 16), b'"prompt": ["x", "x", "x", "x", "x"], "n": 8'):
        with pytest.raises(Refusal, match="at most"):
            read(b'{"model": "m", %s}' % body, "text")
    with pytest.raises(Refusal, match="stream_options"):
        read(b'{"model": "m", "prompt": "x", "stream_options": {}}', "text")


def test_whole_and_streamed_answers_cost_the_same(fakes: list[Any]) -> None:
    async def ask(fleet: Fleet, stream: bool) -> Tokens:
        body = {"model": "inner", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        forward = Forward(fleet, "/chat/completions", wish_of(body, "chat"), None)
        forward.start()
        while await forward.more():
            continue
        return tokens_of(forward.tally())

    async def run() -> list[Tokens]:
        fleet = Fleet(UpstreamSettings([fakes[0].url], []), lambda slots: None, lambda tokens: None)
        fleet.replicas[0].models = {"inner": {}}
        fleet.replicas[0].breaker.worked("probe", 0)
        found = [await ask(fleet, stream) for stream in (False, True)]
        fakes[0].mode = "slow"
        fleet.settings = msgspec.structs.replace(fleet.settings, first=0.02)
        found.append(await ask(fleet, False))  # its first token comes with the last
        await fleet._client.aclose()
        return found

    assert asyncio.run(run()) == [Tokens(hit=4, miss=3, output=3)] * 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"model": "m", "upstream": ("http://a",)}, "one of both"),
        ({"upstream": ("a:8000",)}, "an address such as"),
        ({"upstream": ("http://user:secret@a",)}, "SPUTNIK_UPSTREAM_KEY"),
        ({"upstream": ("http://a",), "weights": "int8"}, "--weights is for a model of ours"),
        ({"model": "m", "affinity": True}, "--affinity"),
        ({"port": 9000, "operator_port": 9000}, "--operator-port 9000: that is the port of the API"),
        ({"temperature": 3.0}, "--temperature 3.0: from 0 to 2"),
        ({"top_p": 0.0}, "--top-p"),
        ({"max_wait": -1.0}, "--max-wait -1.0: at least 0"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        ServeConfig(**flags)
    assert "secret" not in str(refused.value)
