"""The API over real sockets, with OpenAI's own client: what is streamed is the whole, and what is asked for is done."""

import json
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.text.tokenizer import TOOLS

QUESTION: Any = [{"role": "user", "content": "What is 1 + 2?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False,
        },
    },
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"], "additionalProperties": False}
JSON = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}
OFF = {"thinking": {"type": "disabled"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "thinking": {},
    "off": {"extra_body": OFF},
    "budget": {"extra_body": {"thinking": {"type": "enabled", "budget_tokens": 4}}},
    "two": {"n": 2},
    "scores": {"logprobs": True, "top_logprobs": 2},
    "scores off": {"logprobs": True, "extra_body": OFF},
    "stop": {"stop": ["a", " ", "o"], "extra_body": OFF},
    "schema": {"response_format": JSON, "max_tokens": 400, "extra_body": {"thinking_budget": 6}},
    "schema off": {"response_format": JSON, "extra_body": OFF, "max_tokens": 400},
    "tools": {"tools": [TOOL]},
    "call": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 400},
    "call off": {
        "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}, "extra_body": OFF,
        "max_tokens": 400, "parallel_tool_calls": False,
    },
}  # fmt: skip


def ask(server: Any, **more: Any) -> Any:
    options = {"model": "babbler", "messages": QUESTION, "max_tokens": 24, "seed": 5, "temperature": 1.0}
    return server.client.chat.completions.create(**(options | more))


def joined(chunks: Iterable[Any]) -> dict[int, dict[str, Any]]:
    """What a stream comes to, by choice."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            so_far = found.setdefault(
                choice.index, {"content": "", "reasoning_content": "", "reasoning": "", "calls": [], "scores": ([], [])}
            )
            for name in ("content", "reasoning_content", "reasoning"):
                so_far[name] += getattr(choice.delta, name, None) or ""
            so_far["calls"] += [(call.function.name, call.function.arguments) for call in choice.delta.tool_calls or []]
            if choice.logprobs is not None:
                for mine, more in zip(so_far["scores"], scores(choice.logprobs)):
                    mine += more
            if choice.finish_reason is not None:
                assert "finish" not in so_far
                so_far["finish"] = choice.finish_reason, choice.finish_details
    return found


def scores(logprobs: Any) -> tuple[list[Any], list[Any]]:
    """Of the thought and of the answer: token, log-probability, and the likeliest in its place."""
    thought, answer = (
        [(each["token"], each["logprob"], [top["token"] for top in each["top_logprobs"]]) for each in found]
        for found in (logprobs.reasoning_content, [score.model_dump() for score in logprobs.content])
    )
    return thought, answer


def whole(reply: Any) -> dict[int, dict[str, Any]]:
    return {
        choice.index: {
            "content": choice.message.content or "",
            "reasoning_content": getattr(choice.message, "reasoning_content", ""),
            "reasoning": getattr(choice.message, "reasoning", ""),
            "calls": [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []],
            "scores": ([], []) if choice.logprobs is None else scores(choice.logprobs),
            "finish": (choice.finish_reason, choice.finish_details),
        }
        for choice in reply.choices
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_streamed_is_the_whole(server: Any, name: str) -> None:
    reply = ask(server, **VARIANTS[name])
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}, **VARIANTS[name]))
    assert joined(chunks) == whole(reply)
    *pieces, last = chunks
    assert last.choices == [] and last.usage is not None
    streamed, at_once = last.usage.model_dump(), reply.usage.model_dump()
    for each in (streamed, at_once):  # the second time the prompt may be in the cache
        hit, miss = each.pop("prompt_cache_hit_tokens"), each.pop("prompt_cache_miss_tokens")
        assert hit + miss == each["prompt_tokens"] and each.pop("prompt_tokens_details")["cached_tokens"] == hit
    assert streamed == at_once
    assert all(piece.usage is None for piece in pieces)
    assert len({chunk.id for chunk in chunks}) == 1
    details = [choice.finish_details for choice in reply.choices]
    if "call" in name:
        ((call, arguments),) = whole(reply)[0]["calls"]
        assert call == "add" and json.loads(arguments)["a"] in (1, 2)
        assert reply.choices[0].finish_reason == "tool_calls" and reply.choices[0].message.content is None
    if "schema" in name:
        assert json.loads(reply.choices[0].message.content)["sum"] in (1, 2)
    if "off" in name:
        assert not getattr(reply.choices[0].message, "reasoning_content", ""), "opened by itself or not"
    if name == "budget":
        assert details[0]["thought_closed_by"] == "budget" and reply.applied["thinking_budget"] == 4
    if name == "stop":
        assert reply.choices[0].finish_reason == "stop" and details[0]["stop"] in ("a", " ", "o")


def test_the_answer_is_that_of_the_engine_in_this_process(server: Any, llm: LLM) -> None:
    reply = ask(server, temperature=0, extra_body=OFF, max_tokens=16)
    params = SamplingParams(temperature=0, max_tokens=16, break_loops=True, top_p=0.95)
    assert reply.choices[0].message.content == llm.chat(QUESTION, params, thinking=False).text


def test_the_first_chunk_brings_role_and_token(server: Any) -> None:
    first = next(iter(ask(server, stream=True)))
    delta = first.choices[0].delta
    assert delta.role == "assistant" and (delta.content or delta.reasoning_content)


def test_thinking_is_switched_by_any_of_its_names(server: Any) -> None:
    def thinks(**more: Any) -> bool:
        return bool(ask(server, **more).applied["thinking"])

    assert thinks() and thinks(model="deepseek-reasoner") and thinks(reasoning_effort="low")
    assert not thinks(model="deepseek-chat") and not thinks(reasoning_effort="none")
    assert not thinks(extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert thinks(model="deepseek-chat", extra_body={"thinking": {"type": "enabled"}})
    with pytest.raises(openai.BadRequestError, match="disagree"):
        thinks(reasoning_effort="high", extra_body=OFF)


def test_a_conversation_takes_thoughts_and_calls_of_earlier_turns(server: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages: Any = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 2?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "reasoning": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3", "name": "add"},
    ]
    reply = ask(server, messages=messages, tools=[TOOL])
    assert reply.usage.completion_tokens > 0
    again = [*messages, reply.choices[0].message.model_dump(), *QUESTION]
    assert ask(server, messages=again, tools=[TOOL]).usage.prompt_tokens > reply.usage.prompt_tokens


def test_with_tools_and_a_form_the_model_calls_or_answers_in_the_form(server: Any, llm: LLM) -> None:
    begin, (close,) = str(llm.tok.control_id(TOOLS[0])), map(str, llm.encode("}")[-1:])
    found = {}
    for bias in (-100, 100):
        biases = {begin: bias, close: 100}
        asked = {"tools": [TOOL], "response_format": JSON, "logit_bias": biases, "parallel_tool_calls": False}
        found[bias] = ask(server, max_tokens=400, extra_body=OFF, **asked).choices[0]
    assert json.loads(found[-100].message.content)["sum"] in (1, 2) and found[-100].finish_reason == "stop"
    (call,) = found[100].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("add", "{}")
    assert found[100].finish_reason == "tool_calls"


def test_results_of_tools_stand_in_the_order_of_their_calls(server: Any) -> None:
    calls = [{"id": id, "function": {"name": "add", "arguments": '{"a": 1}'}} for id in ("one", "two", "three")]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": call["id"]} for call in calls]
    asked = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": calls}]

    def tokens(*order: int) -> Any:
        return fetch(server, "/tokenize", {"messages": [*asked, *[results[place] for place in order]]})[1]["tokens"]

    assert tokens(0, 1, 2) == tokens(2, 0, 1)
    assert tokens(0, 2) == tokens(2, 0)


def test_an_answer_goes_on_from_its_prefix(server: Any, llm: LLM) -> None:
    reply = ask(
        server, messages=[*QUESTION, {"role": "assistant", "content": "The answer", "prefix": True}], temperature=0,
        extra_body=OFF, max_tokens=8,
    )  # fmt: skip
    ids = [*llm.render(QUESTION, thinking=False).ids, *llm.tok.encode("The answer")]
    (wanted,) = llm.generate([ids], SamplingParams(temperature=0, max_tokens=8, top_p=0.95, break_loops=True))
    assert reply.choices[0].message.content == wanted.text.strip() or wanted.text.startswith(" ")
    thinking = [*QUESTION, {"role": "assistant", "content": "", "reasoning_content": "1 + 2", "prefix": True}]
    assert ask(server, messages=thinking).choices[0].message.reasoning_content


def test_completions_go_on_and_fill_in(server: Any, llm: LLM) -> None:
    client = server.client
    options: Any = {"model": "babbler", "max_tokens": 8, "temperature": 0, "seed": 1}
    prompts = ["What is", "The answer"]
    reply = client.completions.create(prompt=prompts, n=2, logprobs=1, **options)
    params = SamplingParams(temperature=0, max_tokens=8, top_p=0.95, break_loops=True)
    found = llm.generate(prompts, params)
    assert [choice.text for choice in reply.choices] == [result.text for result in found for _ in range(2)]
    assert len(reply.choices[0].logprobs.token_logprobs) == len(found[0].outputs[0].ids)
    chunks = list(client.completions.create(prompt=prompts, n=2, stream=True, **options))
    for index, choice in enumerate(reply.choices):
        assert choice.text == "".join(c.text for chunk in chunks for c in chunk.choices if c.index == index)
    ids = llm.encode("What is")
    assert client.completions.create(prompt=ids, **options).choices[0].text == found[0].text
    assert client.completions.create(prompt=[ids, ids], **options).choices[1].text == found[0].text
    tok = llm.tok
    fim = [
        *tok.text_start, tok.fim_begin_id, *tok.encode("1 + "), tok.fim_hole_id, *tok.encode(" = 3"), tok.fim_end_id,
    ]  # fmt: skip
    filled = client.completions.create(prompt="1 + ", suffix=" = 3", **options)
    assert filled.choices[0].text == llm.generate([fim], params)[0].text and filled.usage.prompt_tokens == len(fim)


def fetch(server: Any, *request: Any, **headers: str) -> tuple[int, Any, Any]:
    found: tuple[int, Any, Any] = server.fetch(*request, **headers)
    return found


def test_tokens_of_a_text_and_back(server: Any, llm: LLM) -> None:
    _, found, _ = fetch(server, "/tokenize", {"prompt": "What is 你好?"})
    assert found["tokens"] == llm.encode("What is 你好?") and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == llm.context
    _, text, _ = fetch(server, "/detokenize", {"tokens": found["tokens"][1:]})
    assert text == {"prompt": "What is 你好?"}
    _, chat, _ = fetch(server, "/tokenize", {"messages": QUESTION})
    assert tuple(chat["tokens"]) == llm.render(QUESTION).ids


def test_pages_beside_the_answers(server: Any) -> None:
    assert fetch(server, "/health", key=None)[:2] == (200, {"status": "ok"})
    assert fetch(server, "/ready", key=None)[:2] == (200, {"status": "ready"})
    assert fetch(server, "/version", key=None)[0] == 200
    names = [model.id for model in server.client.models.list()]
    assert names == ["babbler", "deepseek-chat", "deepseek-reasoner"]
    assert fetch(server, "/models")[1] == fetch(server, "/v1/models")[1]
    status, document, _ = fetch(server, "/openapi.json")
    assert status == 200 and "/v1/chat/completions" in document["paths"] and "/metrics" not in document["paths"]
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["messages"]["maxItems"] == 2000
    assert fetch(server, "/metrics")[0] == 404, "metrics are the operator's"


BAD_JSON = {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}
MESSAGES = {"model": "babbler", "messages": QUESTION}
REFUSED: dict[str, tuple[int, Any, str]] = {
    "no JSON": (400, b"{", "not JSON"),
    "a list": (400, b"[]", "JSON object"),
    "no UTF-8": (400, b'{"model": "\xff"}', "UTF-8"),
    "twice": (400, b'{"model": "babbler", "model": "x"}', "stands twice"),
    "deep": (400, b'{"a":' * 100 + b"1" + b"}" * 100, "nests deeper"),
    "NaN": (400, b'{"model": "babbler", "temperature": NaN}', "no JSON number"),
    "too large": (413, b" " * (1 << 20) + b"{}", "exceeds"),
    "unknown": (400, MESSAGES | {"max_token": 3}, "did you mean 'max_tokens'"),
    "type": (400, MESSAGES | {"stream": 0}, "stream: Expected `bool"),
    "model": (404, MESSAGES | {"model": "gpt-9"}, "no model 'gpt-9'"),
    "no messages": (400, {"model": "babbler"}, "messages"),
    "messages": (400, MESSAGES | {"messages": QUESTION * 2001}, "length <= 2000"),
    "role": (400, MESSAGES | {"messages": [{"role": "god", "content": "x"}]}, "god"),
    "image": (400, MESSAGES | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    "n": (400, MESSAGES | {"n": 9}, "n: Expected"),
    "stop": (400, MESSAGES | {"stop": ["x"] * 17}, "stop"),
    "bias": (400, MESSAGES | {"logit_bias": {"a": 1}}, "token ids"),
    "bias id": (400, MESSAGES | {"logit_bias": {"9999": 1}}, "not in the vocabulary"),
    "top": (400, MESSAGES | {"top_logprobs": 3}, "needs logprobs"),
    "too long": (400, MESSAGES | {"max_tokens": 2048}, "2048 tokens, but the prompt has 13 and 2048"),
    "two lengths": (400, MESSAGES | {"max_tokens": 3, "max_completion_tokens": 4}, "mean the same"),
    "budget": (400, MESSAGES | OFF | {"thinking_budget": 3}, "of no use"),
    "template": (400, MESSAGES | {"chat_template": "x"}, "unknown parameter 'chat_template'"),
    "kwargs": (400, MESSAGES | {"chat_template_kwargs": {"tools": 1}}, "unknown field"),
    "tool": (400, MESSAGES | {"tools": [{"type": "function"}]}, "tool 0"),
    "choice": (400, MESSAGES | {"tools": [TOOL], "tool_choice": "sub"}, "tool_choice"),
    "schema": (400, MESSAGES | {"response_format": BAD_JSON}, "schema"),
    "cold": (400, MESSAGES | {"temperature": 1e-9}, "temperature"),
    "store": (400, MESSAGES | {"store": True}, "store"),
    "usage": (400, MESSAGES | {"stream_options": {"include_usage": True}}, "stream_options"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_with_its_reason(server: Any, name: str) -> None:
    status, body, reason = REFUSED[name]
    code, answer, headers = fetch(server, "/v1/chat/completions", body)
    assert code == status and answer.keys() == {"error"}
    assert answer["error"].keys() == {"message", "type", "param", "code"} and reason in answer["error"]["message"]
    assert headers["content-type"] == "application/json"


def test_nobody_comes_in_without_a_key(server: Any) -> None:
    for key in (None, "sk-wrong", "", "sk-test2"):
        status, answer, headers = fetch(server, "/v1/chat/completions", MESSAGES, key)
        assert status == 401 and answer["error"]["type"] == "authentication_error"
        assert headers["www-authenticate"] == "Bearer"
    assert fetch(server, "/v1/models", None, None)[0] == fetch(server, "/openapi.json", None, None)[0] == 401
    assert fetch(server, "/v1/models", None, None, **{"x-api-key": "sk-other"})[0] == 200
    assert fetch(server, "/health", host="evil.example")[0] == 421
    assert fetch(server, "/nothing")[1]["error"]["type"] == "not_found_error"
    assert fetch(server, "/v1/chat/completions")[0] == 405


def test_who_waits_can_ask_for_the_place_and_the_thought_can_be_cut_short(server: Any) -> None:
    def begin(place: int) -> Any:
        return server.client.chat.completions.create(
            model="babbler", messages=QUESTION, stream=True, max_tokens=1900, temperature=1.5,
            logit_bias={"1": -100}, extra_headers={"x-request-id": f"long-{place}"},
        )  # fmt: skip

    worker = server.child("worker")
    begun = [begin(0), begin(1)]
    worker.suspend()  # no more tokens: a thought that fills its room is closed without being asked
    try:
        status, answer, _ = fetch(server, "/v1/requests/long-0")
        assert status == 200 and answer["status"] == "running" and answer["tokens"] > 0
        assert fetch(server, "/v1/requests/long-0", key="sk-other")[0] == 404, "nobody sees another's"
        assert fetch(server, "/v1/requests/long-1/cancel", {})[0] == 200
        with pytest.raises(openai.APIError, match="cancelled"):
            list(begun[1])
        with ThreadPoolExecutor(1) as pool:
            hurried, ends = pool.submit(begin, 2), time.monotonic() + 5
            while fetch(server, "/v1/requests/long-2/answer_now", {})[0] != 200:
                assert time.monotonic() < ends
            worker.resume()
            begun.append(hurried.result())
    finally:
        worker.resume()
    assert joined(begun[2])[0]["finish"][1].get("thought_closed_by") in ("request", "model")
    for stream in begun:
        stream.close()
    server.until_idle()


def test_a_client_that_goes_gives_slots_and_blocks_back(server: Any) -> None:
    begun = time.monotonic()
    for count in range(1, 13):
        stream = ask(server, stream=True, max_tokens=1900)
        for _, _chunk in zip(range(count % 4), stream):
            pass
        stream.close()
    server.until_idle()
    assert time.monotonic() - begun < 60
    assert ask(server).usage.completion_tokens > 0


def test_the_example_of_the_docs_runs(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", server.url).replace("sk-...", server.key)
    names: dict[str, Any] = {}
    code = code.replace('model="quickstart"', 'model="babbler", max_tokens=30')
    exec(code.replace("stream=", "max_tokens=9, stream="), names)
    names["client"].close()
    assert capsys.readouterr().out


def test_the_docs_name_every_module_and_every_route(server: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    modules = {path.name for path in (Path(__file__).parents[2] / "sputnik" / "serve").glob("[a-z]*.py")}
    assert set(re.findall(r"`(\w+\.py)`", page)) == modules
    paths = {path.replace("{id}", "ID") for path in fetch(server, "/openapi.json")[1]["paths"]}
    named = set(re.findall(r"(?:GET|POST) (/[\w/.]+)", page))
    assert paths - {"/v1/models/{model}"} <= named and named <= {*paths, "/openapi.json", "/status", "/status.json"}
