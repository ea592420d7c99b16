"""Anthropic's Messages over real sockets: streamed is whole, prompts are those of chat completions."""

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import anthropic
import msgspec
import pytest

from sputnik.serve.messages.telling import MessagesTeller
from sputnik.serve.refusals import Refusal
from sputnik.serve.schemas import Message

QUESTION: Any = [{"role": "user", "content": "What is 1 + 2?"}]
SCHEMA = {"type": "object", "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"], "additionalProperties": False}
TOOL = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
THINK = {"thinking": {"type": "enabled", "budget_tokens": 8}}
VARIANTS: dict[str, dict[str, Any]] = {
    "off": {},
    "thinking": THINK,
    "adaptive": {"thinking": {"type": "adaptive"}},
    "effort": {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
    "schema": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}, "max_tokens": 300},
    "stop": {"stop_sequences": ["a", " ", "i"]},
    "tools": {"tools": [TOOL]},
    "any": {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 300},
    "tool": {
        "tools": [TOOL], "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
        "max_tokens": 300, **THINK,
    },
}  # fmt: skip


def body(**more: Any) -> dict[str, Any]:
    return {"model": "babbler", "messages": QUESTION, "max_tokens": 24, "temperature": 0} | more


def ask(server: Any, **more: Any) -> dict[str, Any]:
    status, found, headers = server.fetch("/v1/messages", body(**more))
    assert status == 200, found
    assert headers["request-id"] == found["id"].removeprefix("msg_")
    return dict(found)


def events(server: Any, request: dict[str, Any], **headers: str) -> Iterator[dict[str, Any]]:
    fields = {"content-type": "application/json", "x-api-key": server.key} | headers
    call = urllib.request.Request(f"{server.url}/v1/messages", json.dumps(request).encode(), fields)
    with urllib.request.urlopen(call, timeout=60) as lines:
        name = ""
        for line in lines:
            text = line.decode().rstrip("\n")
            if text.startswith("event: "):
                name = text[7:]
            elif text:
                event = json.loads(text.removeprefix("data: "))
                assert event["type"] == name
                yield event


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream comes to."""
    start, *middle, last, stop = found
    assert (start["type"], last["type"], stop["type"]) == ("message_start", "message_delta", "message_stop")
    message, pieces = dict(start["message"]), list[str]()
    assert message["content"] == [] and message["usage"]["output_tokens"] == 0
    for event in middle:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                pieces = []
            case "content_block_delta":
                pieces.append(next(value for name, value in event["delta"].items() if name != "type"))
            case "content_block_stop":
                block, text = message["content"][event["index"]], "".join(pieces)
                name = {"text": "text", "thinking": "thinking", "tool_use": "input"}[block["type"]]
                block[name] = json.loads(text) if name == "input" else text
    return message | last["delta"] | {name: last[name] for name in ("usage", "finish_details", "applied")}


def plain(message: dict[str, Any]) -> Any:
    """Without what differs from one time to the next."""
    found = json.loads(json.dumps(message).replace(message["id"].removeprefix("msg_"), "ID"))
    usage = found["usage"]
    usage["input_tokens"] += usage.pop("cache_read_input_tokens")
    return found | {"applied": None}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_streamed_is_the_whole(server: Any, name: str) -> None:
    whole = ask(server, **VARIANTS[name])
    assert plain(joined(list(events(server, body(stream=True, **VARIANTS[name]))))) == plain(whole)
    msgspec.convert(whole, Message, strict=True)
    kinds = [block["type"] for block in whole["content"]]
    assert whole["usage"]["cache_creation_input_tokens"] == 0
    if name in ("thinking", "adaptive", "effort"):
        assert kinds[0] == "thinking" and whole["usage"]["output_tokens_details"]["thinking_tokens"] > 0
    else:
        assert name == "tool" or "thinking" not in kinds
    if name == "schema":
        assert json.loads(whole["content"][0]["text"])["sum"] in (1, 2) and whole["stop_reason"] == "end_turn"
    if name == "stop":
        assert whole["stop_reason"] == "stop_sequence" and whole["stop_sequence"] in ("a", " ", "i")
    if name in ("any", "tool"):
        assert kinds[-1] == "tool_use" and whole["stop_reason"] == "tool_use"
        assert whole["content"][-1]["input"]["sum"] in (1, 2)


def test_a_conversation_is_the_prompt_that_chat_completions_make_of_it(server: Any) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"sum": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "3"}]}
    said = {"type": "text", "text": "And", "cache_control": {"type": "ephemeral"}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, use]},
        {"role": "user", "content": [result, said, {"type": "text", "text": " now?"}]},
    ]
    call = {"type": "function", "function": {"name": "add", "arguments": '{"sum": 1}'}}
    chat = [
        {"role": "system", "content": "Be short."}, *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"}, {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    function = {"name": "add", "description": "Adds.", "parameters": SCHEMA}
    wanted = server.fetch("/tokenize", {"messages": chat, "tools": [{"type": "function", "function": function}]})[1]
    request = {
        "model": "babbler", "messages": messages, "system": [{"type": "text", "text": "Be short."}], "tools": [TOOL],
        "thinking": {"type": "enabled", "budget_tokens": 5},
    }  # fmt: skip
    status, found, _ = server.fetch("/v1/messages/count_tokens", request)
    assert status == 200 and found == {"input_tokens": wanted["count"]}
    answer = ask(server, **request | {"max_tokens": 12})
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == wanted["count"]
    again = ask(
        server, **request | {"messages": [*messages, {"role": "assistant", "content": answer["content"]}, *QUESTION]}
    )
    assert again["usage"]["output_tokens"] > 0, "what was answered is taken back"


def test_thinking_is_off_until_asked_for(server: Any) -> None:
    def thinks(**more: Any) -> bool:
        return bool(ask(server, **more)["applied"]["thinking"])

    assert not thinks() and not thinks(model="deepseek-chat") and not thinks(thinking={"type": "disabled"})
    assert thinks(**THINK) and thinks(model="deepseek-reasoner") and thinks(thinking={"type": "adaptive"})


def test_an_answer_goes_on_from_its_beginning(server: Any) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "The answer"}]
    chat = {"model": "babbler", "messages": [*QUESTION, messages[1] | {"prefix": True}], "max_tokens": 24}
    wanted = server.fetch("/v1/chat/completions", chat | {"temperature": 0, "thinking": {"type": "disabled"}})[1]
    assert ask(server, messages=messages)["content"][0]["text"] == wanted["choices"][0]["message"]["content"]


BAD = "invalid_request_error"
REFUSED: dict[str, tuple[int, str, Any, str]] = {
    "no JSON": (400, BAD, b"{", "not JSON"),
    "twice": (400, BAD, b'{"model": "a", "model": "b"}', "stands twice"),
    "too large": (413, "request_too_large", b" " * (1 << 20) + b"{}", "exceeds"),
    "model": (404, "not_found_error", body(model="claude"), "no model 'claude'"),
    "no length": (400, BAD, {"model": "babbler", "messages": QUESTION}, "max_tokens"),
    "warm": (400, BAD, body(temperature=1.5), "temperature"),
    "unknown": (400, BAD, body(stop=["x"]), "unknown parameter 'stop'"),
    "image": (400, "invalid_request_error",
              body(messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}]), "image is not offered"),
    "system role": (400, BAD, body(messages=[{"role": "system", "content": "x"}]), "system"),
    "budget": (400, BAD, body(thinking={"type": "enabled", "budget_tokens": 24}), "less than"),
    "no budget": (400, BAD, body(thinking={"type": "enabled"}), "budget_tokens"),
    "budget of none": (400, BAD, body(thinking={"type": "disabled", "budget_tokens": 3}), "without"),
    "choice": (400, BAD, body(tool_choice={"type": "tool", "name": "sub"}), "tool_choice"),
    "nameless": (400, BAD, body(tools=[TOOL], tool_choice={"type": "tool"}), "name goes with"),
    "result": (400, BAD, body(
        messages=[{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]), "no tool_use before"),
    "user's use": (400, BAD, body(messages=[{"role": "user", "content": [
        {"type": "tool_use", "id": "x", "name": "x", "input": {}}]}]), "assistant's"),
    "too long": (400, BAD, body(max_tokens=4000), "context has 2048"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_in_anthropics_shape(server: Any, name: str) -> None:
    status, kind, request, reason = REFUSED[name]
    code, found, _ = server.fetch("/v1/messages", request)
    assert code == status and found.keys() == {"type", "error", "request_id"} and found["type"] == "error"
    assert found["error"].keys() == {"type", "message"} and found["error"]["type"] == kind
    assert reason in found["error"]["message"]


def test_keys_overload_and_a_broken_stream_are_told_as_anthropic_does(server: Any) -> None:
    status, found, _ = server.fetch("/v1/messages", body(), "sk-wrong")
    assert status == 401 and found["error"]["type"] == "authentication_error"
    assert server.fetch("/v1/messages", body(), None, **{"x-api-key": "sk-other"})[0] == 200
    long: Any = {
        "model": "babbler", "messages": QUESTION, "stream": True, "max_tokens": 1900, "temperature": 1.5,
        "logit_bias": {"1": -100},
    }  # fmt: skip
    streams = [server.client.chat.completions.create(**long) for _ in range(8)]
    status, found, headers = server.fetch("/v1/messages", body(), **{"x-request-timeout": "0.3"})
    assert status == 529 and found["error"]["type"] == "overloaded_error" and headers["retry-after"]
    for stream in streams:
        stream.close()
    server.until_idle()
    many = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 900}
    endless = {"output_config": {"format": {"type": "json_schema", "schema": many}}, "max_tokens": 1900}
    line = events(server, body(stream=True, **endless), **{"x-request-id": "cut-1"})
    assert next(line)["type"] == "message_start"
    server.fetch("/v1/requests/cut-1/cancel", {})
    *_, last = line
    assert last["type"] == "error" and last["error"]["message"] == "the request was cancelled"
    assert last["request_id"] == "cut-1"


def test_silence_is_a_ping() -> None:
    teller = MessagesTeller.__new__(MessagesTeller)
    assert teller.silence("keep-alive") == b'event: ping\ndata: {"type":"ping"}\n\n'
    status, headers, _ = Refusal(503, "full", retry_after=3).told("/v1/messages", "x")
    assert status == 529 and (b"retry-after", b"3") in headers


def test_anthropics_client(server: Any) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0, timeout=60)
    options: Any = {"model": "babbler", "messages": QUESTION, "max_tokens": 24, "extra_body": {"temperature": 0}}
    reply = client.messages.create(**options, **THINK)
    with client.messages.stream(**options, **THINK) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in reply.content]
    assert final.usage.output_tokens == reply.usage.output_tokens == 24
    assert text == "".join(block.text for block in reply.content if block.type == "text")
    assert client.messages.count_tokens(model="babbler", messages=QUESTION).input_tokens > 5
    called = client.messages.create(**options | {"max_tokens": 300}, tools=[TOOL], tool_choice={"type": "any"})
    (use, *_) = [block for block in called.content if block.type == "tool_use"]
    assert use.input["sum"] in (1, 2) and re.fullmatch(r"toolu_\w+", use.id)
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "3"}
    messages: Any = [*QUESTION, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**options | {"messages": messages}, tools=[TOOL]).usage.output_tokens > 0
    with pytest.raises(anthropic.NotFoundError) as refused:
        client.messages.create(**options | {"model": "claude"})
    assert refused.value.request_id
    client.close()


def test_a_client_that_goes_gives_its_slot_back(server: Any) -> None:
    begun = time.monotonic()
    for _ in range(6):
        line = events(server, body(stream=True, max_tokens=1900, temperature=1))
        next(line)
        line.close()  # type: ignore[attr-defined]
    server.until_idle()
    assert time.monotonic() - begun < 30
