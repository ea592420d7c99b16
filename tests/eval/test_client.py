"""A real HTTP server with our own engine behind it: scores as at home, and every way to fail has its name."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.errors import ConfigError, TaskError
from sputnik.eval.client import Endpoint, EndpointConfig, Refused, read_reply, retry_after, split_tags
from sputnik.eval.harness import Written, examine
from sputnik.eval.models import Local
from sputnik.eval.records import Question
from sputnik.tasks.base import Problem, Task
from sputnik.tasks.verify import VerifierPool

PARAMS = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8, seed=3)
QUICK = EndpointConfig(concurrency=4, retries=3, timeout_s=20.0)
Fault = tuple[int, dict[str, str], bytes]


class Server:
    """An OpenAI-compatible API in a thread. `fault` may answer in its place: status, headers, body; a number is seconds
    of silence."""

    def __init__(self, checkpoint: Path) -> None:
        self.llm = LLM(checkpoint, precision="fp32", exact=True, cache_tokens=2048, max_running=8)
        self.reset()
        config = uvicorn.Config(self._app, port=0, log_level="error", lifespan="off", ws="none", interface="asgi3")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/v1"

    def reset(self) -> None:
        self.names, self.key, self.running, self.most = ["tiny"], "", 0, 0
        self.seen: list[dict[str, Any]] = []
        self.fault: Callable[[dict[str, Any], int], Fault | float | None] = lambda body, attempt: None
        self.attempts: Counter[str] = Counter()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    async def _app(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            await self._send(send, 401, {}, b'{"error": "bad key"}')
        elif scope["path"] == "/v1/models":
            await self._send(send, 200, {}, json.dumps({"data": [{"id": name} for name in self.names]}).encode())
        elif scope["path"] != "/v1/chat/completions":
            await self._send(send, 404, {}, b"no such path")
        else:
            message = await receive()
            content = message["body"]
            while message.get("more_body"):
                content += (message := await receive())["body"]
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await self._send(send, *await self._answer(json.loads(content)))
            finally:
                self.running -= 1

    async def _answer(self, body: dict[str, Any]) -> Fault:
        self.seen.append(body)
        prompt = body["messages"][0]["content"]
        self.attempts[prompt] += 1
        fault = self.fault(body, self.attempts[prompt])
        if isinstance(fault, tuple):
            return fault
        await asyncio.sleep(fault or 0.01)  # so that others come meanwhile
        params = SamplingParams(
            temperature=body["temperature"], top_p=body["top_p"], max_tokens=body["max_tokens"], seed=body.get("seed")
        )
        output = self.llm.chat(body["messages"], params).outputs[0]
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": len(output.ids),
            "completion_tokens_details": {"reasoning_tokens": 2},
        }
        finish = "stop" if output.finish.startswith("stop") else "length"
        said = {"role": "assistant", "content": output.answer, "reasoning_content": output.thinking}
        choice = {"index": 0, "message": said, "finish_reason": finish}
        return 200, {}, json.dumps({"id": "x", "choices": [choice], "usage": usage}).encode()

    async def _send(self, send: Any, status: int, headers: dict[str, str], body: bytes) -> None:
        headers = {"content-type": "application/json", **headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[Server]:
    server = Server(checkpoint)
    yield server
    server.close()


@pytest.fixture
def server(running: Server) -> Server:
    running.reset()
    return running


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts no more than a moment."""
    monkeypatch.setattr("sputnik.eval.client.FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("sputnik.eval.client.LONGEST_WAIT_S", 0.02)


@pytest.fixture(scope="module")
def problems(task: Task) -> list[Problem]:
    return task.problems("test", 6)


def ask(server: Server, problems: list[Problem], k: int = 1, config: EndpointConfig = QUICK) -> list[Any]:
    """All replies, by problem and sample."""
    questions = [Question(problem, tuple(range(k))) for problem in problems]
    found: Written = []
    for lot in Endpoint(server.url, config, PARAMS).ask(questions, k):
        found += lot
    assert len(found) == len(problems) * k
    return sorted(((problem.id, sample, reply) for problem, sample, reply in found), key=lambda each: each[:2])


def test_an_endpoint_scores_as_the_model_behind_it(
    server: Server, llm: LLM, task: Task, judges: VerifierPool, problems: list[Problem], tmp_path: Path
) -> None:
    greedy = replace(PARAMS, temperature=0)
    home = examine(Local(llm, greedy), task, judges, problems, k=1)
    away = examine(Endpoint(server.url, QUICK, greedy), task, judges, problems, k=1, samples_to=tmp_path / "a.jsonl")
    keys = ("problem_id", "thinking", "answer", "verdict", "length")
    assert [[s[key] for key in keys] for s in away.samples] == [[s[key] for key in keys] for s in home.samples]
    assert away.pass_at_1 == home.pass_at_1 and away.truncated == home.truncated
    assert (away.template, away.model) == ("endpoint", f"tiny at {server.url}")
    assert away.decoding == {"temperature": 0, "top_p": 0.95, "max_tokens": 8, "k": 1}
    assert away.usage == {
        "prompt_tokens": 42,
        "completion_tokens": sum(s["length"] for s in away.samples),
        "thinking": 12,
    }
    assert away.thinking_length == 2 and away.failed == 0


def test_requests_run_side_by_side_with_their_own_seeds_and_extra_fields(
    server: Server, problems: list[Problem]
) -> None:
    config = replace(QUICK, seeds=True, body=("chat_template_kwargs.thinking=true", "user='me'"))
    replies = ask(server, problems, 2, config)
    assert server.most == 4 and len(server.seen) == 12
    assert len({body["seed"] for body in server.seen}) == 12
    assert all(body["chat_template_kwargs"] == {"thinking": True} and body["user"] == "me" for body in server.seen)
    assert all(body["model"] == "tiny" and body["stream"] is False for body in server.seen)
    again = ask(server, problems, 2, config)
    assert [reply.text for _, _, reply in again] == [reply.text for _, _, reply in replies]
    server.reset()
    ask(server, problems[:1])
    assert "seed" not in server.seen[0]


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"retry-after": "1"}, b"full"),
        (503, {}, b"busy"),
        (500, {}, b"{}"),
        (200, {}, b"<html>"),
        (200, {}, b'{"choices": 3}'),
    ],
    ids=["full", "busy", "broken", "html", "wrong form"],
)
def test_what_passes_is_tried_again(server: Server, problems: list[Problem], fault: Fault) -> None:
    server.fault = lambda body, attempt: fault if attempt <= 2 else None
    assert [reply.error for _, _, reply in ask(server, problems[:3])] == [""] * 3
    assert set(server.attempts.values()) == {3}


@pytest.mark.parametrize(
    ("fault", "reason", "attempts"),
    [
        ((400, {}, b'{"error": "prompt too long"}'), 'HTTP 400: {"error": "prompt too long"}', 1),
        ((500, {}, b"always"), "HTTP 500: always", 4),
        ((200, {}, b'{"choices": []}'), "no answer: no choices", 1),
        ((200, {}, b'{"choices": [{"message": {}, "finish_reason": "content_filter"}]}'), "content_filter", 1),
    ],
    ids=["refused", "broken", "empty", "filtered"],
)
def test_a_failed_request_is_an_error_never_wrong_and_asked_again_by_the_next_run(
    server: Server, task: Task, judges: VerifierPool, problems: list[Problem], tmp_path: Path,
    fault: Fault, reason: str, attempts: int,
) -> None:  # fmt: skip
    path, bad = tmp_path / "answers.jsonl", problems[2].prompt
    server.fault = lambda body, attempt: fault if body["messages"][0]["content"] == bad else None
    result = examine(Endpoint(server.url, QUICK, PARAMS), task, judges, problems, k=1, samples_to=path)
    assert (result.failed, result.verdicts["error"], result.pass_at_1.n) == (1, 1, 5)
    assert reason in result.warnings[0] and "1 of 6 requests failed and are left out" in result.warnings[0]
    assert server.attempts[bad] == attempts
    kept = {s["problem_id"]: s["completion"] for s in result.samples if s["finish"] != "failed"}
    server.reset()
    whole = examine(Endpoint(server.url, QUICK, PARAMS), task, judges, problems, k=1, samples_to=path)
    assert [body["messages"][0]["content"] for body in server.seen] == [bad]
    assert (whole.failed, whole.pass_at_1.n, whole.verdicts["error"]) == (0, 6, 0)
    assert {s["problem_id"]: s["completion"] for s in whole.samples} | kept == {
        s["problem_id"]: s["completion"] for s in whole.samples
    }
    assert len(path.read_text().splitlines()) == 6


def test_silence_has_an_end(server: Server, problems: list[Problem]) -> None:
    silent = problems[1].prompt
    server.fault = lambda body, attempt: 5.0 if body["messages"][0]["content"] == silent else (200, {}, said("7"))
    replies = ask(server, problems, 1, replace(QUICK, timeout_s=1.5, retries=1))
    assert Counter(reply.error for _, _, reply in replies) == {"": 5, "no answer within 1.5 s": 1}
    assert server.attempts[silent] == 2


def test_nothing_but_failures_is_no_score(
    server: Server, task: Task, judges: VerifierPool, problems: list[Problem]
) -> None:
    server.fault = lambda body, attempt: (400, {}, b"never")
    with pytest.raises(TaskError, match="HTTP 400: never"):
        examine(Endpoint(server.url, QUICK, PARAMS), task, judges, problems, k=2)


def test_what_no_retry_mends_ends_the_run_at_once(
    server: Server, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "right")
    mine = replace(QUICK, model="tiny", key_env="MY_KEY")
    server.key = "right"
    assert not ask(server, problems[:2], 1, mine)[0][2].error
    server.key = "other"
    with pytest.raises(ConfigError, match=r"HTTP 401.*the key in MY_KEY") as raised:
        ask(server, problems, 8, mine)
    assert "right" not in str(raised.value) and len(server.seen) == 2
    with pytest.raises(ConfigError, match="environment variable NOWHERE is empty"):
        Endpoint(server.url, replace(QUICK, key_env="NOWHERE"), PARAMS)
    for url in ("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1/chat/completions"):
        with pytest.raises(ConfigError, match=r"http://127.0.0.1:9/v1: .*is the server up\?"):
            list(Endpoint(url, replace(mine, retries=1), PARAMS).ask([Question(problems[0], (0,))], 1))
        with pytest.raises(ConfigError, match=r"cannot be reached .*is the server up\?"):
            Endpoint(url, QUICK, PARAMS)
    for url in ("localhost:8000/v1", "api.example.com/v1", "ftp://host/v1", "http://[::1", "http://host:99999/v1", ""):
        with pytest.raises(ConfigError, match="is no address of a server; write http://HOST:PORT/v1"):
            Endpoint(url, mine, PARAMS)


def test_the_only_model_of_a_server_needs_no_name(server: Server) -> None:
    assert Endpoint(server.url + "/chat/completions", QUICK, PARAMS).model == "tiny"
    server.names = ["a", "b"]
    with pytest.raises(ConfigError, match="name the model with --endpoint.model; it lists a, b"):
        Endpoint(server.url, QUICK, PARAMS)
    with pytest.raises(ConfigError, match="a model behind a URL does not implement thinking_budget"):
        Endpoint(server.url, QUICK, replace(PARAMS, thinking_budget=3))


def test_a_run_that_is_interrupted_leaves_no_request_behind(server: Server, problems: list[Problem]) -> None:
    server.fault = lambda body, attempt: 1.0 if attempt > 1 else None
    replies = Endpoint(server.url, QUICK, PARAMS).ask([Question(p, (0, 1)) for p in problems], 2)
    next(replies)
    began = time.monotonic()
    replies.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 0.9
    seen = len(server.seen)
    time.sleep(0.1)
    assert len(server.seen) == seen < 12


def body(message: dict[str, Any], finish: str = "stop", **beside: Any) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], **beside}).encode()


def said(answer: str) -> bytes:
    return body({"content": answer})


def test_thoughts_are_found_wherever_servers_put_them() -> None:
    for message in (
        {"content": "7", "reasoning_content": "so"},
        {"content": " 7\n", "reasoning": "so\n"},
        {"content": "<think>\nso\n</think>\n\n7"},
        {"content": "so</think>7"},
    ):
        reply, usage = read_reply(body(message, usage={"prompt_tokens": 2, "completion_tokens": 30}))
        assert (reply.completion.thinking, reply.completion.answer) == ("so", "7") and reply.completion.well_formed
        assert (reply.length, reply.thinking_length, usage["thinking"]) == (30, 20, 20)
    cut, _ = read_reply(body({"content": "<think>so"}, "length"))
    assert cut.completion.truncated and (cut.completion.thinking, cut.completion.answer) == ("so", "")
    open_one, _ = read_reply(body({"content": "<think>so"}))
    assert not open_one.completion.closed and not open_one.completion.well_formed
    plain, usage = read_reply(b"\n\n  " + body({"content": "7 < 8"}))  # empty lines keep a connection alive
    assert (plain.completion.thinking, plain.completion.answer, plain.length) == ("", "7 < 8", 0)
    with pytest.raises(Refused, match="cannot be read"):
        read_reply(body({"content": "x"})[:-1])


def test_tags_in_text_are_split_once() -> None:
    assert split_tags("<think>a</think>b</think>c") == ("a", "b</think>c", True)
    assert split_tags("</think>b") == ("", "b", True)
    assert split_tags("b") == ("", "b", True)


def test_retry_after_is_a_number_or_a_date_and_never_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sputnik.eval.client.LONGEST_WAIT_S", 300)
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    assert 30 < retry_after({"retry-after": soon}) <= 40
    values = {"7": 7, "99999": 300, "-3": 0, "nan": 0, "soon": 0, "": 0, "Wed, 01 Jan 2020 00:00:00 GMT": 0}
    assert {text: retry_after({"retry-after": text}) for text in values} == values
