"""The Responses API over real sockets: what is streamed is the whole, what was cut is read on, what is kept is mine.

The public cases of Open Responses are in `test_open_responses.py`. The model is an untrained one that hardly ends by
itself, so those that want a completed answer get a schema, and those that want a call are made to call.
"""

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec
import openai
import pytest

from sputnik.serve.refusals import Refusal
from sputnik.serve.responses.routes import Replay
from sputnik.serve.responses.shelf import KEY_BYTES, PER_KEY, SECONDS, Record, Shelf
from sputnik.serve.schemas import ResponseObject

SCHEMA = {"type": "object", "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"], "additionalProperties": False}
FORM = {"format": {"type": "json_schema", "name": "sum", "schema": SCHEMA}}
PLACE = {"type": "object", "properties": {"location": {"enum": ["Rome", "Oslo"]}}, "required": ["location"]}
TOOL = {"type": "function", "name": "get_weather", "parameters": PLACE | {"additionalProperties": False}}
ONE = {"type": "function", "name": "get_weather"}
OFF = {"effort": "none"}
CALL: dict[str, Any] = {
    "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 400,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "thinking": {},
    "off": {"reasoning": OFF},
    "low": {"reasoning": {"effort": "low", "summary": "auto"}},
    "scores": {"reasoning": OFF, "top_logprobs": 2},
    "schema off": {"text": FORM, "reasoning": OFF, "max_output_tokens": 400},
    "tools": {"tools": [TOOL]},
    "call": CALL,
    "call off": CALL | {"reasoning": OFF, "tool_choice": ONE},
    "allowed": CALL
    | {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [ONE]}},
}  # fmt: skip


def body(**more: Any) -> dict[str, Any]:
    return {"model": "babbler", "input": "What is 1 + 2?", "max_output_tokens": 24, "temperature": 0} | more


def ask(server: Any, **more: Any) -> dict[str, Any]:
    status, found, _ = server.fetch("/v1/responses", body(**more))
    assert status == 200, found
    return dict(found)


@pytest.fixture(scope="module")
def long(server: Any) -> dict[str, Any]:
    """What this model, which ends when it likes, answers at length; a seed that does so is looked for."""
    options = {"reasoning": OFF, "temperature": 2.0, "max_output_tokens": 300}
    return next(
        options | {"seed": seed} for seed in range(50) if ask(server, seed=seed, **options)["status"] == "incomplete"
    )


class Events:
    """A stream of events by hand, so that it can be cut anywhere."""

    def __init__(self, server: Any, path: str, request: Any = None, **more: str) -> None:
        self._line = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        headers = {"authorization": f"Bearer {server.key}", "content-type": "application/json"}
        data = None if request is None else json.dumps(request)
        self._line.request("GET" if request is None else "POST", path, data, headers | more)
        self._reply = self._line.getresponse()
        assert self._reply.status == 200, self._reply.read()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        name = ""
        for line in self._reply:
            text = line.decode().rstrip("\n")
            if text.startswith("event: "):
                name = text[7:]
            elif text.startswith("data: ") and text != "data: [DONE]":
                event = json.loads(text[6:])
                assert event["type"] == name
                yield event

    def close(self) -> None:
        self._reply.close()
        self._line.close()


def stream(server: Any, **more: Any) -> list[dict[str, Any]]:
    events = Events(server, "/v1/responses", body(stream=True, **more))
    found = list(events)
    events.close()
    return found


def plain(value: Any, id: str) -> Any:
    """A response without what differs from one time to the next."""
    text = json.dumps({**value, "applied": None, "created_at": 0, "completed_at": 0})
    found = json.loads(text.replace(id.removeprefix("resp_"), "ID"))
    if found["usage"] is not None:
        found["usage"]["input_tokens_details"] = None  # the second time the prompt may be in the cache
    return found


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a stream comes to, by its deltas alone."""
    items: list[dict[str, Any]] = []
    for event in events:
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
                items.append(event["item"])
            case "content_part.added":
                items[event["output_index"]]["content"].append(event["part"])
            case "reasoning.delta" | "output_text.delta":
                part = items[event["output_index"]]["content"][event["content_index"]]
                part["text"] += event["delta"]
                if "logprobs" in event:
                    part["logprobs"] += event["logprobs"]
            case "function_call_arguments.delta":
                items[event["output_index"]]["arguments"] += event["delta"]
            case "reasoning.done" | "output_text.done":
                part = items[event["output_index"]]["content"][event["content_index"]]
                assert part["text"] == event["text"] and part.get("logprobs") == event.get("logprobs")
            case "content_part.done":
                assert items[event["output_index"]]["content"][event["content_index"]] == event["part"]
            case "output_item.done":
                item = items[event["output_index"]]
                item["status"] = event["item"]["status"]
                assert item == event["item"] and item["id"] == event["item"]["id"]
    return items


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_streamed_is_the_whole(server: Any, name: str) -> None:
    whole, events = ask(server, **VARIANTS[name]), stream(server, **VARIANTS[name])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    first, second, *_, last = events
    assert (first["type"], second["type"]) == ("response.created", "response.in_progress")
    assert last["type"] == f"response.{last['response']['status']}" and first["response"]["output"] == []
    assert plain(last["response"], last["response"]["id"]) == plain(whole, whole["id"])
    assert joined(events) == last["response"]["output"]
    msgspec.convert(whole, ResponseObject, strict=True)
    kinds = [item["type"] for item in whole["output"]]
    if "off" in name:
        assert "reasoning" not in kinds and whole["usage"]["output_tokens_details"]["reasoning_tokens"] == 0
    if "schema" in name:
        assert json.loads(whole["output"][-1]["content"][0]["text"])["sum"] in (1, 2)
        assert whole["status"] == "completed" and whole["completed_at"] >= whole["created_at"]
    if "call" in name or name == "allowed":
        assert whole["output"][-1]["type"] == "function_call" and whole["status"] == "completed"
        assert json.loads(whole["output"][-1]["arguments"])["location"] in ("Rome", "Oslo")
    if name == "thinking":
        assert kinds == ["reasoning", "message"] and whole["incomplete_details"] == {"reason": "max_output_tokens"}
        assert [item["status"] for item in whole["output"]] == ["completed", "incomplete"]
    if name == "scores":
        assert len(whole["output"][0]["content"][0]["logprobs"]) == whole["usage"]["output_tokens"]


def test_a_response_goes_on_from_the_one_before_as_if_all_had_been_sent(server: Any) -> None:
    call = {"input": [{"role": "user", "content": "Weather?"}], **CALL, "reasoning": OFF}
    first = ask(server, **call)
    (item,) = first["output"]
    result = {"type": "function_call_output", "call_id": item["call_id"], "output": "rain"}
    more = {"tools": [TOOL], "max_output_tokens": 12, "instructions": "Be short."}
    chained = ask(server, previous_response_id=first["id"], input=[result], **more)
    sent = ask(server, input=[*call["input"], *first["output"], result], **more)
    assert chained["usage"]["input_tokens"] == sent["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert plain(chained, chained["id"])["output"] == plain(sent, sent["id"])["output"]
    third = ask(server, previous_response_id=chained["id"], input="And now?", tools=[TOOL])
    assert third["previous_response_id"] == chained["id"]
    status, found, _ = server.fetch("/v1/responses", body(input=[result | {"call_id": "call_no"}]))
    assert status == 400 and "no function_call before it" in found["error"]["message"]


def test_a_cut_stream_is_read_on_without_gap_or_double(server: Any) -> None:
    for cut in (1, 2, 7, 23, 60):
        first = Events(server, "/v1/responses", body(stream=True, background=True, max_output_tokens=80))
        found = [event for event, _ in zip(first, range(cut))]
        first.close()
        id = found[0]["response"]["id"]
        number = found[-1]["sequence_number"]
        rest = Events(server, f"/v1/responses/{id}?stream=true&starting_after={number}")
        found += list(rest)
        rest.close()
        again = Events(server, f"/v1/responses/{id}?stream=true")
        assert list(again) == found
        again.close()
        assert [event["sequence_number"] for event in found] == list(range(len(found)))
        assert found[0]["response"]["status"] == "queued" and found[-1]["type"] in (
            "response.completed",
            "response.incomplete",
        )
        assert joined(found) == found[-1]["response"]["output"] == server.fetch(f"/v1/responses/{id}")[1]["output"]
    server.until_idle()


def until(server: Any, id: str, *states: str) -> dict[str, Any]:
    end = time.monotonic() + 60
    while (found := server.fetch(f"/v1/responses/{id}")[1])["status"] not in states:
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return dict(found)


def test_who_leaves_ends_it_unless_it_was_to_be_kept(server: Any, long: Any) -> None:
    whole = ask(server, **long)
    for kept in (None, True):
        events = Events(server, "/v1/responses", body(stream=True, store=kept, **long))
        id = next(iter(events))["response"]["id"]
        events.close()
        found = until(server, id, "cancelled", "incomplete")
        assert found["status"] == ("incomplete" if kept else "cancelled")
        if kept:
            assert plain(found, id)["output"] == plain(whole, whole["id"])["output"]
        else:
            assert found["usage"]["output_tokens"] < whole["usage"]["output_tokens"]
    server.until_idle()


def test_in_the_background_it_is_the_same_answer(server: Any) -> None:
    begun = ask(server, background=True)
    assert begun["status"] in ("queued", "in_progress") and begun["background"] and begun["usage"] is None
    found = until(server, begun["id"], "completed", "incomplete")
    assert plain(found, found["id"])["output"] == plain(whole := ask(server), whole["id"])["output"]
    status, refused, _ = server.fetch(f"/v1/responses/{begun['id']}?stream=true")
    assert status == 400 and "stream: true" in refused["error"]["message"]
    status, refused, _ = server.fetch("/v1/responses", body(background=True, store=False))
    assert status == 400 and refused["error"]["param"] == "store"


def test_cancel_and_delete_and_nobody_elses(server: Any, long: Any) -> None:
    id = ask(server, background=True, **long)["id"]
    path = f"/v1/responses/{id}"
    for method, where in (("GET", path), ("POST", f"{path}/cancel"), ("DELETE", path)):
        status, found, _ = server.fetch(where, key="sk-other", method=method)
        assert status == 404 and found["error"]["code"] == "response_not_found"
    status, found, _ = server.fetch(f"{path}/cancel", method="POST")
    assert status == 200 and found["status"] == "cancelled" and found["usage"]["output_tokens"] < 300
    assert server.fetch(f"{path}/cancel", method="POST")[1] == found, "once more changes nothing"
    status, refused, _ = server.fetch("/v1/responses", body(previous_response_id=id))
    assert status == 400 and "no answer to go on from" in refused["error"]["message"]
    assert server.fetch(path, method="DELETE")[1] == {"id": id, "object": "response.deleted", "deleted": True}
    assert server.fetch(path)[0] == server.fetch(path, method="DELETE")[0] == 404
    running = ask(server, background=True, **long)["id"]
    assert server.fetch(f"/v1/responses/{running}", method="DELETE")[0] == 200
    server.until_idle()
    forgotten = ask(server, store=False)
    assert forgotten["store"] is False and server.fetch(f"/v1/responses/{forgotten['id']}")[0] == 404


def test_a_stream_that_breaks_says_so_in_its_last_event(server: Any, long: Any) -> None:
    events = Events(server, "/v1/responses", body(stream=True, **long), **{"x-request-id": "broken-1"})
    line = iter(events)
    assert next(line)["type"] == "response.created"
    assert server.fetch("/v1/requests/broken-1/cancel", {})[0] == 200
    *_, last = line
    events.close()
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "cancelled", "message": "the request was cancelled"}
    kept = server.fetch(f"/v1/responses/{last['response']['id']}")[1]
    assert kept == last["response"] and kept["usage"]["output_tokens"] > 0
    server.until_idle()


def test_a_stream_that_fails_before_its_first_event_ends_with_an_error() -> None:
    record = Record("resp_1", "a", [], None, None, True, True, False)
    replay = Replay(record, 0, "x", lambda: None, lambda: "keep-alive")
    name, data, _, done, *_ = replay.failed(Refusal(503, "full", code="overloaded")).decode().split("\n")
    assert (name, done) == ("event: error", "data: [DONE]")
    error = {"type": "overloaded_error", "code": "overloaded", "message": "full", "param": None}
    assert json.loads(data.removeprefix("data: ")) == {"type": "error", "sequence_number": 0, "error": error}


def test_what_is_asked_of_a_stream_that_is_none(server: Any) -> None:
    id = ask(server)["id"]
    for query in ("stream=maybe", "starting_after=3", "stream=true&starting_after=-1", "stream=true&x=1", "include=y"):
        assert server.fetch(f"/v1/responses/{id}?{query}")[0] == 400, query


def records(shelf: Shelf, owner: str, count: int, size: int, ended: float) -> None:
    """Put so many ended responses on it."""
    for number in range(count):
        record = Record(
            f"resp_{number}", owner, [], None, None, False, True, False, final=b"{}", ended=ended, size=size
        )
        shelf._records[owner, record.id] = record


def test_the_shelf_is_bounded_in_number_bytes_and_age() -> None:
    now = time.monotonic()
    shelf = Shelf()
    records(shelf, "a", PER_KEY + 10, 1000, now)
    records(shelf, "b", 40, KEY_BYTES // 16, now)
    shelf._trim()
    kept = [owner for owner, _ in shelf._records]
    assert kept.count("a") == PER_KEY and kept.count("b") == 16
    assert ("a", "resp_9") not in shelf._records and ("a", "resp_10") in shelf._records, "the oldest go first"
    for owner in "cdefgh":
        records(shelf, owner, 8, KEY_BYTES // 8, now)
    shelf._trim()
    kept = [owner for owner, _ in shelf._records]
    assert kept.count("a") == PER_KEY, "who has little keeps it"
    assert sum(record.size for record in shelf._records.values()) <= 64 << 20
    shelf = Shelf()
    records(shelf, "a", 3, 1000, now - SECONDS - 1)
    records(shelf, "b", 3, 1000, now)
    shelf._trim()
    assert {owner for owner, _ in shelf._records} == {"b"}


def test_openais_client_reads_streams_and_forms(server: Any) -> None:
    client: openai.OpenAI = server.client
    options: Any = {"model": "babbler", "input": "1 + 2?", "temperature": 0, "max_output_tokens": 400}
    with client.responses.stream(**options, text=FORM, reasoning={"effort": "low"}) as events:
        kinds = {event.type for event in events}
        final = events.get_final_response()
    assert {"response.reasoning.delta", "response.output_text.delta", "response.completed"} <= kinds
    assert json.loads(final.output_text)["sum"] in (1, 2)
    assert client.responses.retrieve(final.id).output_text == final.output_text
    read_on = client.responses.retrieve(final.id, stream=True, starting_after=4)
    assert next(iter(read_on)).sequence_number == 5
    read_on.close()
    client.responses.delete(final.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(final.id)
