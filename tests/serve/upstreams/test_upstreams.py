"""A gateway before other servers: real processes, fake upstreams that do everything wrong, and one of our own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import openai
import pytest

SAID: Any = [{"role": "user", "content": "hi"}]
CANARY = "sk-upstream-canary"


def bad(fakes: list[Any], mode: str) -> None:
    for fake in fakes:
        fake.mode = mode


def streamed(stream: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"content": "", "reasoning": "", "reasoning_content": "", "usage": None, "finish": []}
    for piece in stream:
        for choice in piece.choices:
            for name in ("content", "reasoning", "reasoning_content"):
                found[name] += getattr(choice.delta, name, None) or ""
            found["finish"] += [choice.finish_reason] if choice.finish_reason else []
        found["usage"] = piece.usage or found["usage"]
    return found


def asked(*fakes: Any) -> list[dict[str, Any]]:
    """What came from our clients; the status page's probes ask something else."""
    return [body for fake in fakes for body in fake.asked if body["messages"][0].get("content") == "hi"]


@pytest.mark.parametrize("mode", ["good", "split"])
def test_a_stream_passes_with_thoughts_and_usage_completed(gateway: Any, fakes: list[Any], mode: str) -> None:
    bad(fakes, mode)
    chunks = list(gateway.ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.reasoning == "hm, 你", "the first chunk brings the first token"
    found = streamed(chunks)
    assert found["content"] == "ab" and found["finish"] == ["stop"]
    assert found["reasoning"] == found["reasoning_content"] == "hm, 你"
    usage = found["usage"].model_dump()
    assert (usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]) == (4, 3)
    assert streamed(gateway.ask(stream=True))["usage"] is None, "not asked for"


def test_a_whole_reply_passes_and_unknown_parameters_with_it(gateway: Any, fakes: list[Any]) -> None:
    thought = {"role": "assistant", "content": "c", "reasoning_content": "old"}
    reply = gateway.ask(messages=[*SAID, thought, *SAID], extra_body={"guided_regex": "[ab]+"})
    assert reply.choices[0].message.content == "ab" and reply.choices[0].message.reasoning_content == "hm"
    assert reply.usage.prompt_cache_hit_tokens == 4 and reply.model == "inner"
    (asked,) = [body for fake in fakes for body in fake.asked if "guided_regex" in body]
    assert asked["guided_regex"] == "[ab]+" and asked["messages"][1]["reasoning"] == "old"
    (headers,) = [headers for fake in fakes for headers in fake.headers]
    assert headers["authorization"] == f"Bearer {CANARY}" and "sk-test" not in str(headers)


def test_models_are_the_upstreams_and_others_are_not_found(gateway: Any) -> None:
    assert [model.id for model in gateway.client.models.list()] == ["inner"]
    assert gateway.client.models.retrieve("inner").model_dump()["max_model_len"] == 99
    with pytest.raises(openai.NotFoundError, match="there are inner"):
        gateway.ask(model="gpt-9")
    with pytest.raises(openai.NotFoundError, match="no such route"):
        gateway.client.embeddings.create(model="inner", input="x")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["die", "500", "429", "garbage", "not http", "huge", "error first"])
def test_what_fails_before_its_first_token_is_tried_elsewhere(
    gateway: Any, fakes: list[Any], mode: str, stream: bool
) -> None:
    fakes[0].mode = mode
    for sent in range(1, 21):  # sooner or later one of them goes to the bad one first
        found = gateway.ask(stream=stream)
        content = streamed(found)["content"] if stream else found.choices[0].message.content
        assert content == "ab" and len(asked(fakes[1])) == sent
        if asked(fakes[0]):
            return
        gateway.until_up(2)
    raise AssertionError("the bad one was never asked")


def test_a_replica_that_hangs_gives_back_what_has_no_token(gateway: Any, fakes: list[Any]) -> None:
    fakes[0].mode = "hang"
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(gateway.ask(stream=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    gateway.until(lambda: len(asked(fakes[0])) > 0)
    fakes[0].alive = False  # probes notice
    for thread in threads:
        thread.join(60)
    assert [reply.choices[0].message.content for reply in found] == ["ab"] * 4
    gateway.until_up(1)
    fakes[0].reset()
    gateway.until_up(2)


@pytest.mark.parametrize("mode", ["die midway", "cut", "no end", "stall"])
def test_a_stream_that_is_lost_in_the_middle_ends_with_an_error_that_says_so(
    gateway: Any, fakes: list[Any], mode: str
) -> None:
    bad(fakes, mode)
    got = []
    with pytest.raises(openai.APIError, match="in the middle") as error:
        for piece in gateway.ask(stream=True):
            got += [choice.delta.content for choice in piece.choices]
    assert error.value.code == "upstream_lost" and "a" in got
    assert len(asked(*fakes)) == 1, "tokens were seen: it is not tried again"


def test_errors_of_the_client_are_the_clients_and_others_are_not(gateway: Any, fakes: list[Any]) -> None:
    bad(fakes, "400")
    with pytest.raises(openai.BadRequestError, match="said 400") as refused:
        gateway.ask()
    assert refused.value.param == "messages" and len(asked(*fakes)) == 1
    for mode, code in (("500", "upstream_failed"), ("429", "overloaded"), ("401", "upstream_key")):
        bad(fakes, mode)
        with pytest.raises(openai.InternalServerError) as failed:
            gateway.ask()
        assert (failed.value.status_code, failed.value.code) == (503, code)
        assert int(failed.value.response.headers["retry-after"]) > 0
        bad(fakes, "good")
        gateway.until_trusted()


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"model": "inner"}', b'{"model": "inner", "messages": []}', b'{"messages": [{}]}',
             b'{"model": "inner", "messages": [{}], "stream": 1}', b'{"model": "inner", "messages": [{}], "n": 99}',
             b'{"model": "inner", "model": "b", "messages": [{}]}'],
)  # fmt: skip
def test_a_malformed_request_reaches_no_upstream(gateway: Any, fakes: list[Any], body: bytes) -> None:
    request = urllib.request.Request(f"{gateway.url}/v1/chat/completions", data=body, method="POST")
    request.add_header("authorization", "Bearer sk-test")
    request.add_header("content-type", "application/json")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    with refused.value:
        error = json.loads(refused.value.read())["error"]
    assert refused.value.code == 400 and error["type"] == "invalid_request_error"
    seen = [each for fake in fakes for each in fake.asked]  # there may be probes, and what other tests asked
    assert not [each for each in seen if each.get("messages") in (None, [], [{}])]


def test_a_client_whose_requests_break_servers_takes_none_out(gateway: Any, fakes: list[Any]) -> None:
    bad(fakes, "poison")
    for _ in range(8):
        with pytest.raises(openai.InternalServerError, match="status 500"):
            gateway.ask(messages=[{"role": "user", "content": "poison"}])

    def probed(fake: Any) -> bool:
        return any(body["messages"][0]["content"] == "1" for body in fake.asked)

    gateway.until(lambda: all(map(probed, fakes)))  # each was asked for a token of ours
    assert gateway.page()["engine_replicas_up"] == 2
    assert gateway.ask().choices[0].message.content == "ab"


def test_a_client_that_goes_lets_its_upstream_go(gateway: Any, fakes: list[Any]) -> None:
    bad(fakes, "endless")
    stream = gateway.ask(stream=True)
    next(iter(stream))
    stream.close()
    gateway.until(lambda: any(fake.left.is_set() for fake in fakes))
    gateway.until(lambda: gateway.page()["num_requests_running"] == 0)


def test_all_upstreams_dead_is_said_at_once_and_over_when_they_are_back(gateway: Any, fakes: list[Any]) -> None:
    for fake in fakes:
        fake.alive = False
    gateway.until_up(0)
    begun = time.monotonic()
    with pytest.raises(openai.InternalServerError, match="no upstream answers") as refused:
        gateway.ask()
    assert time.monotonic() - begun < 5 and int(refused.value.response.headers["retry-after"]) > 0
    assert gateway.get("/ready")[0] == 503 and gateway.get("/health")[0] == 200
    for fake in fakes:
        fake.reset()
    gateway.until_up(2)
    assert gateway.ask().choices[0].message.content == "ab" and gateway.get("/ready")[0] == 200


def test_a_deadline_ends_an_answer(gateway: Any, fakes: list[Any]) -> None:
    bad(fakes, "hang")
    begun = time.monotonic()
    with pytest.raises(openai.InternalServerError, match="deadline") as refused:
        gateway.ask(extra_headers={"x-request-timeout": "0.5"})
    assert refused.value.code == "deadline" and time.monotonic() - begun < 15


def test_without_usage_it_is_estimated_and_says_so(gateway: Any, fakes: list[Any]) -> None:
    bad(fakes, "no usage")
    usage = streamed(gateway.ask(stream=True, stream_options={"include_usage": True}))["usage"].model_dump()
    assert usage["estimated"] and usage["completion_tokens"] == 3
    assert usage["prompt_cache_told"] is False and "prompt_cache_hit_tokens" not in usage


def test_many_streams_share_the_replicas(gateway: Any, fakes: list[Any]) -> None:
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(streamed(gateway.ask(stream=True))["content"])) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["ab"] * 16
    assert all(4 <= len(asked(fake)) <= 12 for fake in fakes), [len(asked(fake)) for fake in fakes]


# --- before another sputnik ---


def test_our_own_server_stands_behind_it(server: Any, start_gateway: Callable[..., Any]) -> None:
    gateway = start_gateway([server.url], [server.key], name="public", every=0.2)
    options: dict[str, Any] = {"messages": SAID, "max_tokens": 12, "seed": 3, "temperature": 1.0}
    direct = server.client.chat.completions.create(model="babbler", **options)
    gateway.until(lambda: gateway.get("/ready")[0] == 200)
    through = gateway.client.chat.completions.create(model="public", **options)
    pieces = gateway.client.chat.completions.create(
        model="public", stream=True, stream_options={"include_usage": True}, **options
    )
    found = streamed(pieces)
    message, said = through.choices[0].message, direct.choices[0].message
    assert through.model == "public" and [model.id for model in gateway.client.models.list()] == ["public"]
    assert message.content == said.content == found["content"]
    assert getattr(message, "reasoning", "") == getattr(said, "reasoning", "") == found["reasoning"]
    assert through.usage.completion_tokens == direct.usage.completion_tokens == found["usage"].completion_tokens
    assert through.usage.prompt_cache_hit_tokens + through.usage.prompt_cache_miss_tokens == direct.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        gateway.client.chat.completions.create(model="public", top_logprobs=2, **options)
    with contextlib.closing(
        gateway.client.chat.completions.create(model="public", stream=True, **options | {"max_tokens": 1500})
    ) as stream:
        next(iter(stream))
    server.until_idle()


def test_the_command_serves_an_upstream_and_shows_its_key_to_nobody(
    fakes: list[Any], new_ports: Callable[[], int]
) -> None:
    fakes[0].reset()
    port = new_ports()
    command = [sys.executable, "-m", "sputnik", "serve", "--upstream", fakes[0].url, "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--operator-port", str(new_ports())], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"SPUTNIK_API_KEY": "sk-test", "SPUTNIK_UPSTREAM_KEY": CANARY, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    said = []
    with process.stdout as lines:
        for line in lines:
            said.append(line)
            if "Ctrl-C" in line:
                break
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-test", max_retries=0, timeout=60)
        with client:
            assert client.chat.completions.create(model="inner", messages=SAID).choices[0].message.content == "ab"
        process.send_signal(signal.SIGTERM)
        said += list(lines)
    assert process.wait(60) == 0 and CANARY not in "".join(said), "".join(said)
    assert fakes[0].headers[-1]["authorization"] == f"Bearer {CANARY}"
