"""The public cases of Open Responses (2026-04-24) that apply to a model of text, against a served /v1/responses.

What the specification demands stands in `open_responses.py`, not taken from the package's own records. The model is
untrained: an answer in words that ends by itself is had by a seed, others by a schema, and one that calls is told to.
"""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.serve.open_responses import EVENTS, LAST, Response, fit


def whole(server: Any, request: dict[str, Any]) -> dict[str, Any]:
    status, found, headers = server.fetch("/v1/responses", {"model": "babbler", "stream": False} | request)
    assert status == 200 and headers["content-type"] == "application/json", found
    fit(found, Response)
    return dict(found)


def streamed(server: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The events, each checked by itself and all of them in their order; the wire form, too."""
    line = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    headers = {"authorization": f"Bearer {server.key}", "content-type": "application/json"}
    line.request("POST", "/v1/responses", json.dumps({"model": "babbler", "stream": True} | request), headers)
    reply = line.getresponse()
    text = reply.read().decode()
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream"), text
    line.close()
    *blocks, last, rest = text.split("\n\n")
    assert last == "data: [DONE]" and rest == "", "the stream ends so, literally"
    events = []
    for block in (each for each in blocks if not each.startswith(":")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        fit(event, EVENTS[event["type"].removeprefix("response.")])
        events.append(event)
    check_order(events)
    return events


def check_order(events: list[dict[str, Any]]) -> None:
    """Created, in progress, then item after item: begun, its part begun, filled, ended, ended; one last event."""
    names = [event["type"].removeprefix("response.") for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert names[:2] == ["created", "in_progress"] and names[-1] in LAST and not {*names[:-1]}.intersection(LAST)
    grammar = {
        "": ["output_item.added"],
        "output_item.added": ["content_part.added", "function_call_arguments.delta"],
        "content_part.added": ["output_text.delta", "reasoning.delta"],
        "output_text.delta": ["output_text.delta", "output_text.done"], "output_text.done": ["content_part.done"],
        "reasoning.delta": ["reasoning.delta", "reasoning.done"], "reasoning.done": ["content_part.done"],
        "function_call_arguments.delta": ["function_call_arguments.delta", "function_call_arguments.done"],
        "function_call_arguments.done": ["output_item.done"], "content_part.done": ["output_item.done"],
    }  # fmt: skip
    before, index, id = "", 0, ""
    for name, event in zip(names[2:-1], events[2:-1]):
        assert name in grammar[before], (before, name)
        assert event["output_index"] == index
        if name == "output_item.added":
            id = event["item"]["id"]
        assert event.get("item_id", id) == id == event.get("item", {"id": id})["id"]
        before = "" if name == "output_item.done" else name
        index += name == "output_item.done"
    if names[-1] != "failed":
        assert before == "" and index == len(events[-1]["response"]["output"])


def said(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


PLACE = {"properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"], "additionalProperties": False}
PARAMETERS = {"type": "object", **PLACE}
WEATHER = {"type": "function", "name": "weather", "parameters": PARAMETERS}
ONE = {"type": "function", "name": "weather"}
CALL: dict[str, Any] = {
    "input": [said("user", "How is the weather in Rome?")], "tools": [WEATHER], "parallel_tool_calls": False,
    "tool_choice": ONE, "reasoning": {"effort": "none"}, "max_output_tokens": 400,
}  # fmt: skip
FORM: dict[str, Any] = {
    "text": {"format": {"type": "json_schema", "name": "place", "schema": PARAMETERS}}, "max_output_tokens": 400,
    "reasoning": {"effort": "none"}, "temperature": 0,
}  # fmt: skip
"""An answer that ends, whatever the question."""
WORDS: dict[str, dict[str, Any]] = {
    "system-prompt": {"input": [said("system", "You are a sailor."), said("user", "Greet me.")]},
    "developer": {"input": [said("developer", "You are a sailor."), said("user", "Greet me.")]},
    "instructions": {"instructions": "You are a sailor.", "input": "Greet me."},
    "multi-turn": {
        "input": [said("user", "I am Ada."), said("assistant", "Hello Ada!"), said("user", "Who am I?")],
    },
    "parts": {"input": [
        said("user", [{"type": "input_text", "text": "I am "}, {"type": "input_text", "text": "Ada."}]),
        said("assistant", [{"type": "output_text", "text": "Hello Ada!", "annotations": []}]),
        said("user", "Who am I?"),
    ]},
    "assistant-phase": {"input": [
        said("assistant", "I look it up.") | {"phase": "commentary"},
        said("assistant", "It is four.") | {"phase": "final_answer"}, said("user", "Say it again."),
    ]},
}  # fmt: skip


def completed(server: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The same answer as a whole and as a stream, and what holds of every one that has come to its end."""
    found, events = whole(server, request), streamed(server, request)
    last = events[-1]["response"]
    assert (found["status"], last["status"], events[-1]["type"]) == ("completed", "completed", "response.completed")
    (message,) = found["output"]
    assert message["type"] == "message" and message["status"] == "completed"
    assert message["content"] == last["output"][0]["content"]
    assert found["completed_at"] >= found["created_at"] and found["error"] is found["incomplete_details"] is None
    assert found["tool_choice"] == "auto" and found["tools"] == []
    assert found["usage"]["total_tokens"] == found["usage"]["input_tokens"] + found["usage"]["output_tokens"]
    return found


def test_an_answer_in_words(server: Any) -> None:
    """basic-response and streaming-response, with a seed by which this model ends its answer itself."""
    request = {"input": [said("user", "Greet me.")], "reasoning": {"effort": "none"}, "temperature": 2}
    ends = (request | {"seed": seed, "max_output_tokens": 400} for seed in range(100))
    request = next(each for each in ends if whole(server, each)["status"] == "completed")
    assert completed(server, request)["text"]["format"] == {"type": "text"}


@pytest.mark.parametrize("name", WORDS)
def test_a_conversation(server: Any, name: str) -> None:
    found = completed(server, WORDS[name] | FORM)
    assert json.loads(found["output"][0]["content"][0]["text"])["place"] in ("Rome", "Oslo")
    assert found["instructions"] == WORDS[name].get("instructions")


def test_a_call(server: Any) -> None:
    found, events = whole(server, CALL), streamed(server, CALL)
    names = [event["type"].removeprefix("response.") for event in events]
    assert {"function_call_arguments.delta", "function_call_arguments.done"} <= {*names}
    for name in ("output_item.added", "output_item.done"):
        assert events[names.index(name)]["item"]["type"] == "function_call"
    assert events[names.index("output_item.added")]["item"]["name"] == "weather", "told when it begins"
    for output in (found["output"], events[-1]["response"]["output"]):
        (call,) = output
        assert call["type"] == "function_call" and json.loads(call["arguments"])["place"] in ("Rome", "Oslo")
        assert 1 <= len(call["call_id"]) <= 64 and call["status"] == "completed"
    assert found["tool_choice"] == ONE and found["tools"][0]["strict"] is None


def test_a_calls_round_trip(server: Any) -> None:
    """With previous_response_id the second request says neither the conversation nor the tools again."""
    first = whole(server, CALL)
    result = {"type": "function_call_output", "call_id": first["output"][0]["call_id"], "output": "64 degrees"}
    then = completed(server, {"previous_response_id": first["id"], "input": [result]} | FORM)
    assert then["previous_response_id"] == first["id"] and then["output"]


def test_a_thought_is_an_item_of_its_own(server: Any) -> None:
    events = streamed(server, {"input": "Think.", "max_output_tokens": 48, "temperature": 0, "top_logprobs": 1})
    thought, message = events[-1]["response"]["output"]
    assert (thought["type"], message["type"]) == ("reasoning", "message")
    assert thought["summary"] == [] and thought["content"][0]["text"] and thought["status"] == "completed"
    assert message["content"][0]["logprobs"], "asked for"
    if (last := events[-1]["response"])["status"] == "incomplete":
        assert message["status"] == "incomplete" and last["incomplete_details"]["reason"] == "max_output_tokens"


def test_previous_response_id(server: Any) -> None:
    first = whole(server, {"input": "The word is papaya."} | FORM)
    then = whole(server, {"input": "Which word?", "previous_response_id": first["id"]} | FORM)
    alone = whole(
        server, {"input": [said("user", "The word is papaya."), *first["output"], said("user", "Which word?")]} | FORM
    )
    assert then["usage"]["input_tokens"] == alone["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert then["output"][0]["content"] == alone["output"][0]["content"], "as if all had been sent"


@pytest.mark.parametrize(
    ("more", "format"),
    [
        ({"text": {"format": {"type": "json_object"}}}, "json_object"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS}}}, "json_schema"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "tools": [ONE]}}, "text"),
        ({"metadata": {"a": "b"}, "safety_identifier": "c", "prompt_cache_key": "d", "service_tier": "auto"}, "text"),
    ],
)  # fmt: skip
def test_what_was_asked_is_repeated(server: Any, more: dict[str, Any], format: str) -> None:
    found = whole(
        server, {"input": "Hi.", "max_output_tokens": 16, "reasoning": {"effort": "low"}, "store": False} | more
    )
    assert found["text"]["format"]["type"] == format and found["max_output_tokens"] == 16
    assert found["store"] is False and found["reasoning"] == {"effort": "low", "summary": None}
    for name in ("metadata", "safety_identifier", "prompt_cache_key"):
        assert found[name] == more.get(name, {} if name == "metadata" else None)


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
FILE = {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}
REFUSED: dict[str, tuple[int, dict[str, Any], str, str]] = {
    "image-input": (400, {"input": [said("user", [IMAGE])]}, "input_image is not offered", "input[0].content[0].type"),
    "file-input": (400, {"input": [said("user", [FILE])]}, "input_file is not offered", "input[0].content[0].type"),
    "file-search": (400, {"tools": [{"type": "file_search"}]}, "file_search", "tools[0].type"),
    "web-search": (400, {"tools": [{"type": "web_search"}]}, "web_search", "tools[0].type"),
    "no such model": (404, {"model": "gpt-9"}, "no model 'gpt-9'", "model"),
    "no input": (400, {"input": None}, "input", "input"),
    "hot": (400, {"temperature": 3}, "temperature", "temperature"),
    "truncation": (400, {"truncation": "auto"}, "truncation", "truncation"),
    "previous": (404, {"previous_response_id": "resp_0"}, "no response 'resp_0' is kept", "previous_response_id"),
    "result of no call": (400, {"input": [
        {"type": "function_call_output", "call_id": "call_0", "output": "x"}]}, "no function_call before it", "input"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_apply_is_refused_with_its_reason(server: Any, name: str) -> None:
    status, more, reason, param = REFUSED[name]
    for stream in (False, True):
        got, found, _ = server.fetch("/v1/responses", {"model": "babbler", "input": "Hi.", "stream": stream} | more)
        assert got == status and found["error"].keys() == {"message", "type", "param", "code"}
        assert reason in found["error"]["message"] and found["error"]["param"] == param
    if name == "previous":
        assert found["error"]["code"] == "previous_response_not_found"


def test_neither_compacted_nor_over_a_websocket(server: Any) -> None:
    status, found, _ = server.fetch("/v1/responses/compact", {"model": "babbler", "input": "Hi."})
    assert status == 501 and found["error"]["type"] == "not_implemented_error"
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "eA==",
    }
    status, found, headers = server.fetch("/v1/responses", **upgrade)
    assert status == 405 and headers["allow"] == "POST"
