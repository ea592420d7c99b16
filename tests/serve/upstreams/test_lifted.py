"""Responses and Messages before servers that are asked for chat completions alone: one of ours, and fakes."""

import json
from collections.abc import Callable
from typing import Any

import anthropic
import msgspec
import openai
import pytest

from sputnik.serve.messages.chat import as_chat
from sputnik.serve.messages.fields import MessagesRequest
from sputnik.serve.upstreams.lifted import lowered
from tests.serve.conftest import Server
from tests.serve.test_open_responses import CALL, FORM, WORDS, check_order, completed, streamed, whole
from tests.serve.test_responses import joined
from tests.serve.upstreams.conftest import chunk

NAMED = {"name": "weather", "input_schema": CALL["tools"][0]["parameters"]}
DONE = b"data: [DONE]\n\n"


class Front(Server):
    """The gateway, asked as a server of ours is."""

    def __init__(self, url: str) -> None:
        self.url, self.key = url, "sk-test"


@pytest.fixture(scope="module")
def front(server: Any, start_gateway: Callable[..., Any]) -> Front:
    gateway = start_gateway([server.url], [server.key], every=0.2)
    gateway.until(lambda: gateway.get("/ready")[0] == 200)
    return Front(gateway.url)


@pytest.fixture
def chat_only(gateway: Any, fakes: list[Any]) -> Front:
    return Front(gateway.url)


def give(fakes: list[Any], *pieces: bytes) -> None:
    for fake in fakes:
        fake.mode, fake.given = "given", list(pieces)


# --- before a server of ours ---


@pytest.mark.parametrize("name", ["system-prompt", "instructions", "multi-turn", "parts"])
def test_the_public_cases_hold_and_the_answer_is_that_of_the_server_itself(
    front: Front, server: Any, name: str
) -> None:
    found, direct = completed(front, WORDS[name] | FORM), whole(server, WORDS[name] | FORM)
    assert found["output"][0]["content"] == direct["output"][0]["content"]
    assert found["usage"]["total_tokens"] == direct["usage"]["total_tokens"]


def test_a_thought_streams_as_it_does_from_the_server_itself(front: Front, server: Any) -> None:
    request = {"input": "What is 1 + 2?", "max_output_tokens": 24, "temperature": 0}
    events, direct = streamed(front, request), streamed(server, request)
    last, own = events[-1]["response"], direct[-1]["response"]
    assert [item["type"] for item in last["output"]] == ["reasoning", "message"]
    for item, other in zip(last["output"], own["output"], strict=True):
        assert item["content"][0]["text"] == other["content"][0]["text"]
    assert last["status"] == own["status"] == "incomplete" and last["usage"]["output_tokens"] == 24
    assert last["usage"]["output_tokens_details"] == own["usage"]["output_tokens_details"]
    assert joined(events) == last["output"] and last["applied"]["temperature"] == 0


def test_a_calls_round_trip(front: Front) -> None:
    events = streamed(front, CALL)
    first = events[-1]["response"]
    (call,) = first["output"]
    assert call["type"] == "function_call" and json.loads(call["arguments"])["place"] in ("Rome", "Oslo")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "64 degrees"}
    then = completed(front, {"previous_response_id": first["id"], "input": [result]} | FORM)
    sent = whole(front, {"input": [*CALL["input"], call, result]} | FORM)
    assert then["output"][0]["content"] == sent["output"][0]["content"]
    assert then["usage"]["input_tokens"] == sent["usage"]["input_tokens"]


def test_messages_are_those_of_the_server_itself(front: Front, server: Any) -> None:
    question: Any = [{"role": "user", "content": "What is 1 + 2?"}]
    options: Any = {"model": "babbler", "messages": question, "max_tokens": 24, "extra_body": {"temperature": 0}}
    thinking: Any = {"type": "enabled", "budget_tokens": 8}
    replies = []
    for url in (front.url, server.url):
        with anthropic.Anthropic(base_url=url, api_key="sk-test", max_retries=0, timeout=60) as client:
            replies.append(client.messages.create(**options, thinking=thinking))
            with client.messages.stream(**options, thinking=thinking) as stream:
                replies.append(stream.get_final_message())
            replies.append(client.messages.create(**options))
            use = client.messages.create(**options | {"max_tokens": 400}, tools=[NAMED], tool_choice={"type": "any"})
            assert use.stop_reason == "tool_use" and use.content[-1].to_dict()["input"]["place"] in ("Rome", "Oslo")
    found, own = [[block.to_dict() for block in reply.content] for reply in replies[:3]], replies[3:]
    assert found == [[block.to_dict() for block in reply.content] for reply in own]
    assert found[0] == found[1] and found[0][0]["type"] == "thinking" and found[2][0]["type"] == "text"
    for reply, other in zip(replies[:3], own, strict=True):
        assert reply.stop_reason == other.stop_reason and reply.usage.output_tokens == other.usage.output_tokens
        read, others = (each.usage.cache_read_input_tokens or 0 for each in (reply, other))
        assert reply.usage.input_tokens + read == other.usage.input_tokens + others


def test_a_client_that_goes_lets_the_server_go(front: Front, server: Any) -> None:
    client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="sk-test", max_retries=0, timeout=60)
    for store in (None, True):
        options: Any = {"store": store, "temperature": 1.5, "max_output_tokens": 300}
        stream = client.responses.create(model="babbler", input="Count.", stream=True, **options)
        id = next(iter(stream)).response.id  # type: ignore[union-attr]
        stream.close()
        if store:
            assert client.responses.cancel(id).status in ("cancelled", "completed", "incomplete")
    server.until_idle()
    client.close()


# --- before fakes that do what no server of ours does ---


def test_nothing_but_chat_completions_is_asked_for(chat_only: Front, fakes: list[Any]) -> None:
    found = whole(chat_only, {"model": "inner", "input": "hi"})
    assert [part["text"] for item in found["output"] for part in item["content"]] == ["hm, 你", "ab"]
    assert found["usage"]["input_tokens_details"] == {"cached_tokens": 4} and found["usage"]["output_tokens"] == 3
    check_order(streamed(chat_only, {"model": "inner", "input": "hi"}))
    body = {"model": "inner", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    status, message, _ = chat_only.fetch("/v1/messages", body)
    assert status == 200 and [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert {path for fake in fakes for path in fake.paths} == {"/v1/chat/completions"}


PIECES = [
    {"index": 0, "id": "x", "type": "function", "function": {"name": "weather", "arguments": ""}},
    {"index": 0, "function": {"arguments": '{"place"'}},
    {"index": 0, "function": {"arguments": ': "Rome"}'}},
    {"index": 1, "id": "y", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}},
]


def test_calls_in_pieces_come_whole(chat_only: Front, fakes: list[Any]) -> None:
    give(fakes, *[chunk({"tool_calls": [piece]}) for piece in PIECES], chunk({}, "tool_calls"), DONE)
    request = {"model": "inner", "input": "hi", "tools": CALL["tools"]}
    events = streamed(chat_only, request)
    assert {tuple(body["tools"][0]["function"]) for fake in fakes for body in fake.asked if "tools" in body} == {
        ("name", "parameters")
    }, "llama.cpp takes no description that is null"
    calls = events[-1]["response"]["output"]
    assert [json.loads(call["arguments"]) for call in calls] == [{"place": "Rome"}, {"place": "Oslo"}]
    assert len({call["call_id"] for call in calls}) == 2 and events[-1]["type"] == "response.completed"
    body = {"model": "inner", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "tools": [NAMED]}
    message = chat_only.fetch("/v1/messages", body)[1]
    assert [block["input"] for block in message["content"]] == [{"place": "Rome"}, {"place": "Oslo"}]
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    "pieces",
    [
        [{"index": 0, "function": {"name": "weather", "arguments": '{"place": "Ro'}}],
        [{"index": 0, "function": {"name": "weather", "arguments": "[1]"}}],
        [{"index": -1, "function": {"name": "weather", "arguments": "rain"}}],
        [{"function": {"name": "weather", "arguments": "rain"}}, {"index": 7, "function": {"arguments": "y"}}],
    ],
)
def test_a_call_that_is_none_is_text_and_said_to_be(chat_only: Front, fakes: list[Any], pieces: Any) -> None:
    give(fakes, chunk({"tool_calls": pieces}), chunk({"tool_calls": [3, None]}), chunk({}, "tool_calls"), DONE)
    found = whole(chat_only, {"model": "inner", "input": "hi", "tools": CALL["tools"]})
    (item,) = found["output"]
    assert item["type"] == "message" and item["content"][0]["text"].startswith("weather")
    assert found["finish_details"]["broken_calls"][0]["text"] == item["content"][0]["text"]


def test_ends_are_told_as_the_server_told_them(chat_only: Front, fakes: list[Any]) -> None:
    body: Any = {"model": "inner", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    body["stop_sequences"] = ["\n"]
    for more, reason in (({"stop_reason": "\n"}, "stop_sequence"), ({"stop_reason": 7}, "end_turn")):
        end = json.loads(chunk({}, "stop").removeprefix(b"data: "))
        end["choices"][0] |= more
        give(fakes, chunk({"content": "a"}), b"data: " + json.dumps(end).encode() + b"\n\n", DONE)
        assert chat_only.fetch("/v1/messages", body)[1]["stop_reason"] == reason
    for finish, state, why in (("length", "incomplete", "max_output_tokens"), ("content_filter", "incomplete", None)):
        give(fakes, chunk({"content": "a"}), chunk({}, finish), DONE)
        found = whole(chat_only, {"model": "inner", "input": "hi"})
        assert found["status"] == state and found["incomplete_details"]["reason"] == (why or finish)
        assert found["usage"]["estimated"] is True, "it sent no usage"
    assert chat_only.fetch("/v1/messages", body)[1]["stop_reason"] == "refusal"


@pytest.mark.parametrize("mode", ["die midway", "cut", "no end"])
def test_what_is_lost_in_the_middle_says_so_in_both(chat_only: Front, fakes: list[Any], mode: str) -> None:
    for fake in fakes:
        fake.mode = mode
    events = streamed(chat_only, {"model": "inner", "input": "hi"})
    assert events[-1]["type"] == "response.failed" and events[-1]["response"]["error"]["code"] == "upstream_lost"
    assert events[-1]["response"]["output"][-1]["status"] == "incomplete"
    body = {"model": "inner", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    status, found, _ = chat_only.fetch("/v1/messages", body)
    assert status == 529 and "in the middle" in found["error"]["message"]


def test_what_fails_before_a_token_is_tried_elsewhere_or_refused(chat_only: Front, fakes: list[Any]) -> None:
    fakes[0].mode = "500"
    for _ in range(2):
        assert whole(chat_only, {"model": "inner", "input": "hi"})["status"] == "completed"
    for fake in fakes:
        fake.mode = "400"
    status, found, _ = chat_only.fetch("/v1/responses", {"model": "inner", "input": "hi", "stream": True})
    assert status == 400 and "said 400" in found["error"]["message"] and found["error"]["param"] == "input"
    status, found, _ = chat_only.fetch("/v1/responses", {"model": "gpt-9", "input": "hi"})
    assert status == 404 and "there are inner" in found["error"]["message"]


def test_what_only_tokens_can_do_is_refused(chat_only: Front, fakes: list[Any]) -> None:
    status, found, _ = chat_only.fetch("/v1/responses", {"model": "inner", "input": "hi", "top_logprobs": 2})
    assert status == 400 and found["error"]["param"] == "top_logprobs" and found["error"]["code"] == "not_offered"
    body: Any = {"model": "inner", "messages": [{"role": "user", "content": "hi"}]}
    status, found, _ = chat_only.fetch("/v1/messages/count_tokens", body)
    assert status == 501 and "other servers" in found["error"]["message"]
    body["messages"].append({"role": "assistant", "content": "The answer"})
    status, found, _ = chat_only.fetch("/v1/messages", body | {"max_tokens": 8})
    assert status == 400 and "end with the user" in found["error"]["message"]
    assert not [each for fake in fakes for each in fake.asked if each["messages"][0]["content"] == "hi"]


def test_a_request_goes_out_as_any_server_reads_it() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"place": "Rome"}}
    request = msgspec.convert(
        {
            "model": "inner", "max_tokens": 9, "system": "Be short.", "stop_sequences": ["x"], "top_k": 4,
            "metadata": {"user_id": "ada"}, "tools": [NAMED | {"description": "Of a place."}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 5},
            "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {}}},
            "messages": [
                {"role": "user", "content": "Rome?"}, {"role": "assistant", "content": [use]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "rain"}]},
            ],
        },
        MessagesRequest,
    )  # fmt: skip
    function = {"name": "weather", "arguments": '{"place": "Rome"}'}
    tool = {"name": "weather", "description": "Of a place.", "parameters": NAMED["input_schema"]}
    assert lowered(as_chat(request)) == {
        "model": "inner", "max_tokens": 9, "stop": ["x"], "top_k": 4, "user": "ada", "stream": True,
        "tools": [{"type": "function", "function": tool}], "tool_choice": "required", "parallel_tool_calls": False,
        "thinking": {"type": "enabled", "budget_tokens": 5}, "reasoning_effort": "high",
        "chat_template_kwargs": {"thinking": True, "enable_thinking": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {}, "strict": True}},
        "messages": [
            {"role": "system", "content": "Be short."}, {"role": "user", "content": "Rome?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "t1", "type": "function", "function": function}]},
            {"role": "tool", "content": "rain", "tool_call_id": "t1"},
        ],
    }  # fmt: skip
