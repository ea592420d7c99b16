"""Hostile requests, as one table: malformed, oversized, deep, doubled, contradictory, on every route that takes a body.

Each is refused with 4xx in its route's shape, in less than `MILLISECONDS`, and the engine has not heard of it. Time is
that of the gateway's threads on a processor: on a machine of its own it is what the client waits, and it does not
depend on what else a machine does.
"""

import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sputnik.engine.llm import LLM

MILLISECONDS = 100
"""Of each case, the best of three; the median of all is a fifth of it."""
Q: Any = [{"role": "user", "content": "hi"}]
CHAT, TEXT, RESPONSE, MESSAGE, COUNT, TOKENIZE, DETOKENIZE = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/tokenize", "/detokenize",
)  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "babbler", "messages": Q},
    TEXT: {"model": "babbler", "prompt": "hi"},
    RESPONSE: {"model": "babbler", "input": "hi"},
    MESSAGE: {"model": "babbler", "messages": Q, "max_tokens": 5},
    COUNT: {"model": "babbler", "messages": Q},
    TOKENIZE: {"prompt": "hi"},
    DETOKENIZE: {"tokens": [1]},
}
RAW: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[{}]",
    "a text": b'"model"',
    "null": b"null",
    "no UTF-8": b'{"model": "\xff"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "NUL": b'{"model": "\x00"}',
    "NaN": b'{"model": NaN}',
    "doubled key": b'{"model": "babbler", "model": "babbler"}',
    "doubled among many": b'{%s,"a1":0}' % b",".join([b'"a%d":0' % number for number in range(20_000)]),
    "a name of half a megabyte": b'{"%s": 1}' % (b"model" * 100_000),
    "doubled inside": b'{"model": "babbler", "x": [{"a": 1, "a": 2}]}',
    "half a surrogate": b'{"model": "\\ud800"}',
    "surrogate key": b'{"\\udfff": 1}',
    "deep": b'{"a":' * 70 + b"1" + b"}" * 70,
    "half a million brackets": b"[" * 500_000,
    "half a million quotes": b'"' * 500_001,
    "backslashes": b'{"a":"' + b"\\" * 500_001 + b'"}',
    "five thousand digits": b'{"model": ' + b"9" * 5000 + b"}",
    "keys": json.dumps(dict.fromkeys(map(str, range(50_000)))).encode(),
    "unknown": b'{"modle": "babbler"}',
    "no text": b'{"model": 3}',
}
TOOL = {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def said(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "n": (CHAT, {"n": 16384}),
    "stops": (CHAT, {"stop": ["x"] * 17}),
    "long stop": (CHAT, {"stop": "x" * 257}),
    "empty stop": (CHAT, {"stop": ""}),
    "biases": (CHAT, {"logit_bias": {str(id): 1 for id in range(301)}}),
    "bias of five thousand digits": (CHAT, {"logit_bias": {"9" * 5000: 1}}),
    "bias of no token": (CHAT, {"logit_bias": {"99999": 1}}),
    "scores": (CHAT, {"logprobs": True, "top_logprobs": 21}),
    "scores of nothing": (CHAT, {"top_logprobs": 2}),
    "messages": (CHAT, {"messages": Q * 2001}),
    "no messages": (CHAT, {"messages": []}),
    "a megabyte": (CHAT, said({"role": "user", "content": "x" * 1_000_000})),
    "parts": (CHAT, said({"role": "user", "content": [{"type": "text", "text": "x"}] * 65})),
    "image": (CHAT, said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]})),
    "role": (CHAT, said({"role": "root", "content": "x"})),
    "long role": (CHAT, said({"role": "image" * 100_000, "content": "x"})),
    "result without call": (CHAT, said({"role": "tool", "content": "x", "tool_call_id": "y"})),
    "assistant last": (CHAT, said(*Q, {"role": "assistant", "content": "x"})),
    "prefix first": (CHAT, said({"role": "assistant", "content": "x", "prefix": True}, *Q)),
    "template": (CHAT, {"chat_template": "{{ 7 * 7 }}"}),
    "template switches": (CHAT, {"chat_template_kwargs": {"tools": []}}),
    "tools": (CHAT, {"tools": [TOOL] * 129}),
    "tool twice": (CHAT, {"tools": [TOOL, TOOL]}),
    "tool's name": (CHAT, {"tools": [{"type": "function", "function": {"name": "../a"}}]}),
    "choice without tools": (CHAT, {"tool_choice": "required"}),
    "choice of another": (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "b"}}}),
    "call and form": (CHAT, {"tools": [TOOL], "tool_choice": "required", **form({})}),
    "two lengths": (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}),
    "no length": (CHAT, {"max_tokens": 0}),
    "length": (CHAT, {"max_tokens": 1 << 23}),
    "two minds": (CHAT, {"thinking": {"type": "disabled"}, "reasoning_effort": "high"}),
    "budget of nothing": (CHAT, {"thinking": {"type": "disabled"}, "thinking_budget": 5}),
    "usage of no stream": (CHAT, {"stream_options": {"include_usage": True}}),
    "stream as a number": (CHAT, {"stream": 1}),
    "hot": (CHAT, {"temperature": 1e308}),
    "cold": (CHAT, {"temperature": 1e-300}),
    "penalty near zero": (CHAT, {"repetition_penalty": 5e-324}),
    "seed": (CHAT, {"seed": 1 << 64}),
    "prompts": (TEXT, {"prompt": ["x"] * 17}),
    "mixed prompts": (TEXT, {"prompt": ["x", 1]}),
    "empty prompts": (TEXT, {"prompt": [[]]}),
    "token of another model": (TEXT, {"prompt": [1_000_000]}),
    "stop token": (TEXT, {"stop_token_ids": [1_000_000]}),
    "too many answers": (TEXT, {"prompt": ["x"] * 8, "n": 8}),
    "echo": (TEXT, {"echo": True}),
    "best of": (TEXT, {"best_of": 4}),
    "suffix of ids": (TEXT, {"prompt": [1], "suffix": "x"}),
    "no such before": (RESPONSE, {"previous_response_id": "resp_x"}),
    "image item": (RESPONSE, {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
    "output of no call": (RESPONSE, {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}),
    "built-in tool": (RESPONSE, {"tools": [{"type": "web_search"}]}),
    "background unkept": (RESPONSE, {"background": True, "store": False}),
    "truncated": (RESPONSE, {"truncation": "auto"}),
    "allowed unknown": (RESPONSE, {"tool_choice": {
        "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]}}),
    "item type": (RESPONSE, {"input": [{"type": "item_reference", "id": "x"}]}),
    "budget": (MESSAGE, {"thinking": {"type": "enabled", "budget_tokens": 5}}),
    "no budget": (MESSAGE, {"thinking": {"type": "enabled"}}),
    "use of the user": (MESSAGE, said({"role": "user", "content": [
        {"type": "tool_use", "id": "x", "name": "y", "input": {}}]})),
    "result of no use": (MESSAGE, said({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]})),
    "document": (MESSAGE, said({"role": "user", "content": [{"type": "document", "source": {}}]})),
    "warm": (MESSAGE, {"temperature": 1.1}),
    "any of no tools": (COUNT, {"tool_choice": {"type": "any"}}),
    "both": (TOKENIZE, {"messages": Q}),
    "neither": (TOKENIZE, {"prompt": None}),
    "negative": (DETOKENIZE, {"tokens": [-1]}),
    "beyond": (DETOKENIZE, {"tokens": [1 << 23]}),
}  # fmt: skip
HEADERS: dict[str, tuple[int, dict[str, str]]] = {
    "id": (400, {"x-request-id": "http://169.254.169.254/"}),
    "seconds": (400, {"x-request-timeout": "1e9"}),
    "type": (415, {"content-type": "text/plain"}),
    "encoding": (415, {"content-encoding": "gzip"}),
    "host": (421, {"host": "evil.example"}),
    "key": (401, {"authorization": "Basic c2s="}),
}


def check(path: str, status: int, found: Any) -> None:
    assert 400 <= status < 500, found
    if "/messages" in path:
        assert found["type"] == "error" and found["error"].keys() == {"type", "message"}, found
    else:
        assert found["error"].keys() == {"message", "type", "param", "code"}, found
    assert 0 < len(found["error"]["message"]) < 1000


@pytest.fixture(scope="module")
def clock(server: Any) -> Callable[[], float]:
    """Milliseconds that the gateway has been on a processor."""
    tasks = Path(f"/proc/{server.child('gateway').pid}/task")
    if not (next(tasks.iterdir()) / "schedstat").exists():
        pytest.skip("the kernel keeps no schedstat")
    return lambda: sum(int((each / "schedstat").read_text().split()[0]) for each in tasks.iterdir()) / 1e6


@pytest.fixture(scope="module")
def times(server: Any) -> list[float]:
    server.until_idle()
    return []


def best(server: Any, clock: Callable[[], float], path: str, body: Any, **headers: str) -> tuple[int, float]:
    """The status, and the shortest of three times."""
    times, status = [], 0
    for _ in range(3):
        begun = clock()
        status, found, _ = server.fetch(path, body, **headers)
        times.append(clock() - begun)
        check(path, status, found)
    return status, min(times)


COUNTED = ("finished", "failed", "aborted", "drawn_tokens", "computed_tokens")


class Untouched:
    """That the engine did nothing but the probes of the status page: a token for a prompt of two."""

    def __init__(self, server: Any) -> None:
        self._server, self._before = server, server.engine()

    def check(self) -> None:
        now = self._server.engine()
        for name in ("prompt_tokens_total", "e2e_request_latency_seconds_count"):
            assert now[name] == self._before[name], name
        more = {name: now[f"engine_{name}"] - self._before[f"engine_{name}"] for name in COUNTED}
        assert more["failed"] == more["aborted"] == 0
        assert more["finished"] == more["drawn_tokens"] == more["computed_tokens"] / 2, more


@pytest.fixture(scope="module")
def untouched(server: Any, times: list[float]) -> Untouched:
    return Untouched(server)


@pytest.mark.parametrize("path", GOOD)
def test_what_is_no_request(
    server: Any, clock: Callable[[], float], times: list[float], untouched: Untouched, path: str
) -> None:
    for name, body in RAW.items():
        status, took = best(server, clock, path, body)
        assert status in (400, 404), name
        assert took < MILLISECONDS, name
        times.append(took)
    status, took = best(server, clock, path, b" " * (1 << 20) + b"{}")
    assert status == 413 and took < MILLISECONDS
    for name, (wanted, headers) in HEADERS.items():
        status, took = best(server, clock, path, GOOD[path], **headers)
        assert status == wanted and took < MILLISECONDS, name
        times.append(took)


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_done(
    server: Any, clock: Callable[[], float], times: list[float], untouched: Untouched, name: str
) -> None:
    path, more = CASES[name]
    status, took = best(server, clock, path, GOOD[path] | more)
    assert status in (400, 404) and took < MILLISECONDS
    times.append(took)


def test_nobody_has_waited_and_the_engine_has_not_heard_of_it(times: list[float], untouched: Untouched) -> None:
    assert len(times) > 200 and statistics.median(times) < MILLISECONDS / 5
    untouched.check()


def test_a_long_text_is_encoded_beside_other_threads_to_the_same_ids(llm: LLM) -> None:
    """So that streams keep their pace while a megabyte is read."""
    text, gaps, done = "ab cd " * 30_000, [0.0], threading.Event()

    def breathe() -> None:
        last = time.perf_counter()
        while not done.wait(0.001):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    other = threading.Thread(target=breathe)
    other.start()
    begun = time.perf_counter()
    ids = llm.tok.encode(text)
    took = time.perf_counter() - begun
    done.set()
    other.join()
    assert max(gaps) < took / 2
    assert ids == llm.tok.encode(text[:6000]) * 30


SCHEMAS: dict[str, Any] = {
    "regex": {"type": "string", "pattern": "("},
    "regex that explodes": {"type": "string", "pattern": "(a+)+$" * 200},
    "no such type": {"type": "x"},
    "itself": {"$ref": "#"},
    "elsewhere": {"$ref": "http://127.0.0.1:1/x"},
    "nothing": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "below a number of 71 bits": {"type": "integer", "minimum": 1, "maximum": -(1 << 70)},
    "a list of a hundred thousand": {"enum": list(range(100_000))},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_that_is_none_is_refused_by_the_compiler_before_a_token(server: Any, name: str) -> None:
    drawn = server.engine()["engine_drawn_tokens"]
    for path, more in (
        (CHAT, form(SCHEMAS[name])),
        (RESPONSE, {"text": {"format": {"type": "json_schema", "schema": SCHEMAS[name]}}}),
        (MESSAGE, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMAS[name]}}}),
    ):
        status, found, _ = server.fetch(path, GOOD[path] | more)
        check(path, status, found)
        assert "schema" in found["error"]["message"]
    more = server.engine()["engine_drawn_tokens"] - drawn
    assert more <= 2, "a probe or two"
