"""A gateway before other servers: real processes, a fake upstream that does everything wrong, and one of our own."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import openai
import pytest

from sputnik.cli.serve import ServeConfig
from sputnik.errors import ConfigError
from sputnik.serve.identity import key_hash
from sputnik.serve.refusals import Refusal
from sputnik.serve.settings import GatewaySettings, UpstreamSettings
from sputnik.serve.upstreams.breaker import Breaker, Rules
from sputnik.serve.upstreams.events import LONGEST, Events
from sputnik.serve.upstreams.plain import completed, read

SAID = [{"role": "user", "content": "hi"}]
CANARY = "sk-upstream-canary"


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    frame = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "inner"}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps(frame | {"choices": [choice]} | more).encode() + b"\n\n"


USAGE = {
    "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}
}  # fmt: skip
STREAM = [
    chunk({"role": "assistant", "content": ""}),
    b": ping\n\n",
    chunk({"reasoning": "hm, 你"}),
    chunk({"content": "a"}),
    chunk({"content": "b"}, "stop"),
    b'data: {"id": "c1", "object": "chat.completion.chunk", "created": 1, "choices": [], "usage": '
    + json.dumps(USAGE).encode() + b"}\n\n",
    b"data: [DONE]\n\n",
]  # fmt: skip
WHOLE = {
    "id": "c1", "object": "chat.completion", "created": 1, "model": "inner", "usage": USAGE,
    "choices": [{"index": 0, "message": {"role": "assistant", "reasoning": "hm", "content": "ab"},
                 "finish_reason": "stop"}],
}  # fmt: skip


class Fake:
    """An upstream in a thread; `mode` says what it does with the next answer."""

    def __init__(self) -> None:
        self.mode, self.alive = "good", True
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.left = threading.Event()
        """A client went away in the middle of an answer."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                """Quiet."""

            def do_GET(self) -> None:
                if outer.alive:
                    self._whole(200, {"object": "list", "data": [{"id": "inner", "max_model_len": 99}]})
                else:
                    self.close_connection = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append(body)
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                try:
                    self._answer(outer.mode if outer.alive else "die", body)
                except OSError:
                    outer.left.set()
                    self.close_connection = True

            def _answer(self, mode: str, body: dict[str, Any]) -> None:
                self.close_connection = mode not in ("good", "split")
                match mode:
                    case "die":
                        return
                    case "hang":
                        while outer.mode == "hang":
                            time.sleep(0.02)
                    case "500" | "429" | "400" | "401":
                        self._whole(int(mode), {"error": {"message": f"said {mode}", "param": "messages"}})
                    case "good" | "split" if not body.get("stream"):
                        self._whole(200, WHOLE)
                    case "good":
                        self._events(STREAM)
                    case "split":
                        self._events([bytes([byte]) for byte in b"".join(STREAM)])
                    case "no usage":
                        self._events([*STREAM[:5], STREAM[6]])
                    case "cut":
                        self._events(STREAM[:4])
                    case "die midway":
                        self._events(STREAM[:4], end=False)
                    case "stall":
                        self._events(STREAM[:4], end=False, wait=30)
                    case "garbage":
                        self._events([b"data: {nonsense\n\n"])
                    case "not http":
                        self.wfile.write(b"\x00\x01\x02 nonsense\r\n\r\n")
                    case "huge":
                        self._events([b"data: " + b"x" * (LONGEST + 1000)])
                    case "error first":
                        self._events([b'data: {"error": {"message": "boom"}}\n\n'])
                    case "endless":
                        self._events([STREAM[3]] * 100_000, wait=0.001)

            def _whole(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _events(self, pieces: list[bytes], end: bool = True, wait: float = 0.0) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for piece in pieces:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    time.sleep(wait if len(pieces) > 100 else 0)
                self.wfile.flush()
                if end:
                    self.wfile.write(b"0\r\n\r\n")
                else:
                    until = time.monotonic() + wait
                    while time.monotonic() < until and outer.mode == "stall":
                        time.sleep(0.02)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def reset(self) -> None:
        self.mode, self.alive = "good", True
        self.asked.clear()
        self.headers.clear()
        self.left.clear()

    def end(self) -> None:
        self.mode = "good"
        self._server.shutdown()
        self._server.server_close()


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


class Gateway:
    """The gateway's own process, before upstreams."""

    def __init__(self, settings: UpstreamSettings, **more: Any) -> None:
        self.port, self.operator_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        whole = GatewaySettings(
            "none", "127.0.0.1", self.port, self.operator_port, "", [key_hash("sk-test")], upstreams=settings, **more
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sputnik.serve.gateway"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(whole))
        self.process.stdin.close()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="sk-test", max_retries=0, timeout=60)

    def get(self, path: str, port: int | None = None) -> tuple[int, bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{port or self.port}{path}")
        request.add_header("authorization", "Bearer sk-test")
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError:
            return 0, b""

    def until(self, wanted: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not wanted():
            assert time.monotonic() < end and self.process.poll() is None, self.page()
            time.sleep(0.02)

    def page(self) -> dict[str, float]:
        """Metrics without labels."""
        lines = [line.split() for line in self.get("/metrics", self.operator_port)[1].decode().splitlines()]
        return {line[0].removeprefix("sputnik:"): float(line[1]) for line in lines if len(line) == 2}

    def until_up(self, replicas: int) -> None:
        self.until(lambda: self.page().get("engine_replicas_up") == replicas)

    def ask(self, **more: Any) -> Any:
        return self.client.chat.completions.create(**({"model": "inner", "messages": SAID} | more))

    def end(self) -> str:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stderr is not None
        with self.process.stderr as pipe:
            said = pipe.read().decode()
        assert self.process.wait(60) == 0, said
        return said


@pytest.fixture(scope="module")
def fakes() -> Iterator[list[Fake]]:
    found = [Fake(), Fake()]
    yield found
    for fake in found:
        fake.end()


@pytest.fixture(scope="module")
def started(fakes: list[Fake]) -> Iterator[Gateway]:
    urls = [fake.url for fake in fakes]
    gateway = Gateway(UpstreamSettings(urls, [CANARY], every=0.05, first=20, stall=1.0), drain=2.0)
    yield gateway
    said = gateway.end()
    assert "Traceback" not in said and CANARY not in said and "sk-test" not in said, said


@pytest.fixture
def gateway(started: Gateway, fakes: list[Fake]) -> Gateway:
    for fake in fakes:
        fake.reset()
    started.until_up(2)
    for fake in fakes:
        fake.reset()
    return started


def bad(fakes: list[Fake], mode: str) -> None:
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


@pytest.mark.parametrize("mode", ["good", "split"])
def test_a_stream_passes_with_thoughts_and_usage_completed(gateway: Gateway, fakes: list[Fake], mode: str) -> None:
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


def test_a_whole_reply_passes_and_unknown_parameters_with_it(gateway: Gateway, fakes: list[Fake]) -> None:
    thought = {"role": "assistant", "content": "c", "reasoning_content": "old"}
    reply = gateway.ask(messages=[*SAID, thought, *SAID], extra_body={"guided_regex": "[ab]+"})
    assert reply.choices[0].message.content == "ab" and reply.choices[0].message.reasoning_content == "hm"
    assert reply.usage.prompt_cache_hit_tokens == 4 and reply.model == "inner"
    (asked,) = [body for fake in fakes for body in fake.asked if "guided_regex" in body]
    assert asked["guided_regex"] == "[ab]+" and asked["messages"][1]["reasoning"] == "old"
    (headers,) = [headers for fake in fakes for headers in fake.headers]
    assert headers["authorization"] == f"Bearer {CANARY}" and "sk-test" not in str(headers)


def test_models_are_the_upstreams_and_others_are_not_found(gateway: Gateway) -> None:
    assert [model.id for model in gateway.client.models.list()] == ["inner"]
    assert gateway.client.models.retrieve("inner").model_dump()["max_model_len"] == 99
    with pytest.raises(openai.NotFoundError, match="there are inner"):
        gateway.ask(model="gpt-9")
    with pytest.raises(openai.NotFoundError, match="no such route"):
        gateway.client.embeddings.create(model="inner", input="x")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["die", "500", "429", "garbage", "not http", "huge", "error first"])
def test_what_fails_before_its_first_token_is_tried_elsewhere(
    gateway: Gateway, fakes: list[Fake], mode: str, stream: bool
) -> None:
    fakes[0].mode = mode
    for _ in range(2):  # at least one of them goes to the bad one first
        found = gateway.ask(stream=stream)
        content = streamed(found)["content"] if stream else found.choices[0].message.content
        assert content == "ab"
    assert fakes[0].asked and len(fakes[1].asked) == 2


def test_a_replica_that_hangs_gives_back_what_has_no_token(gateway: Gateway, fakes: list[Fake]) -> None:
    fakes[0].mode = "hang"
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(gateway.ask(stream=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    gateway.until(lambda: len(fakes[0].asked) > 0)
    fakes[0].alive = False  # probes notice
    for thread in threads:
        thread.join(60)
    assert [reply.choices[0].message.content for reply in found] == ["ab"] * 4
    assert gateway.page()["engine_replicas_up"] == 1
    fakes[0].reset()
    gateway.until_up(2)


@pytest.mark.parametrize("mode", ["die midway", "cut", "stall"])
def test_a_stream_that_is_lost_in_the_middle_ends_with_an_error_that_says_so(
    gateway: Gateway, fakes: list[Fake], mode: str
) -> None:
    bad(fakes, mode)
    got = []
    with pytest.raises(openai.APIError, match="in the middle") as error:
        for piece in gateway.ask(stream=True):
            got += [choice.delta.content for choice in piece.choices]
    assert error.value.code == "upstream_lost" and "a" in got
    assert sum(len(fake.asked) for fake in fakes) == 1, "tokens were seen: it is not tried again"


def test_errors_of_the_client_are_the_clients_and_others_are_not(gateway: Gateway, fakes: list[Fake]) -> None:
    bad(fakes, "400")
    with pytest.raises(openai.BadRequestError, match="said 400") as refused:
        gateway.ask()
    assert refused.value.param == "messages" and sum(len(fake.asked) for fake in fakes) == 1
    for mode, code in (("500", "upstream_failed"), ("429", "overloaded"), ("401", "upstream_key")):
        bad(fakes, mode)
        gateway.until_up(2) if mode != "500" else None
        with pytest.raises(openai.InternalServerError) as failed:
            gateway.ask()
        assert (failed.value.status_code, failed.value.code) == (503, code)
        assert int(failed.value.response.headers["retry-after"]) > 0
        bad(fakes, "good")
        gateway.until_up(2)


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"model": "inner"}', b'{"model": "inner", "messages": []}', b'{"messages": [{}]}',
             b'{"model": "inner", "messages": [{}], "stream": 1}', b'{"model": "inner", "messages": [{}], "n": 99}',
             b'{"model": "inner", "model": "b", "messages": [{}]}'],
)  # fmt: skip
def test_a_malformed_request_reaches_no_upstream(gateway: Gateway, fakes: list[Fake], body: bytes) -> None:
    request = urllib.request.Request(f"{gateway.url}/v1/chat/completions", data=body, method="POST")
    request.add_header("authorization", "Bearer sk-test")
    request.add_header("content-type", "application/json")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    with refused.value:
        error = json.loads(refused.value.read())["error"]
    assert refused.value.code == 400 and error["type"] == "invalid_request_error"
    assert not any(fake.asked for fake in fakes)


def test_a_client_that_goes_lets_its_upstream_go(gateway: Gateway, fakes: list[Fake]) -> None:
    bad(fakes, "endless")
    stream = gateway.ask(stream=True)
    next(iter(stream))
    stream.close()
    gateway.until(lambda: any(fake.left.is_set() for fake in fakes))
    gateway.until(lambda: gateway.page()["num_requests_running"] == 0)


def test_all_upstreams_dead_is_said_at_once_and_over_when_they_are_back(gateway: Gateway, fakes: list[Fake]) -> None:
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


def test_a_deadline_ends_an_answer(gateway: Gateway, fakes: list[Fake]) -> None:
    bad(fakes, "hang")
    begun = time.monotonic()
    with pytest.raises(openai.InternalServerError, match="deadline") as refused:
        gateway.ask(extra_headers={"x-request-timeout": "0.5"})
    assert refused.value.code == "deadline" and time.monotonic() - begun < 15


def test_without_usage_it_is_estimated_and_says_so(gateway: Gateway, fakes: list[Fake]) -> None:
    bad(fakes, "no usage")
    usage = streamed(gateway.ask(stream=True, stream_options={"include_usage": True}))["usage"].model_dump()
    assert usage["estimated"] and usage["completion_tokens"] == 3
    assert usage["prompt_cache_told"] is False and "prompt_cache_hit_tokens" not in usage


def test_many_streams_share_the_replicas(gateway: Gateway, fakes: list[Fake]) -> None:
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(streamed(gateway.ask(stream=True))["content"])) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["ab"] * 16
    assert all(4 <= len(fake.asked) <= 12 for fake in fakes), [len(fake.asked) for fake in fakes]


# --- before another sputnik ---


def test_our_own_server_stands_behind_it(server: Any) -> None:
    gateway = Gateway(UpstreamSettings([server.url], [server.key], name="public", every=0.2))
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
    gateway.end()


# --- parts ---


def test_a_replica_falls_and_rises_with_hysteresis() -> None:
    breaker = Breaker(Rules(probes=2, answers=3, rises=2, most=8, calm=60))
    assert not breaker.up
    breaker.worked("probe", 0)
    assert breaker.up, "the first good probe is enough"
    breaker.failed("answer", 1)
    breaker.failed("answer", 1)
    breaker.worked("probe", 2)
    assert breaker.up
    breaker.failed("answer", 3)
    assert not breaker.up, "good probes do not excuse failing answers"
    needed = []
    for _ in range(5):
        goods = 0
        while not breaker.up:
            breaker.worked("probe", 4)
            goods += 1
        needed.append(goods)
        breaker.failed("probe", 5)
        breaker.failed("probe", 5)
    assert needed == [2, 4, 8, 8, 8]
    while not breaker.up:
        breaker.worked("probe", 6)
    breaker.failed("probe", 100)
    breaker.failed("probe", 100)
    breaker.worked("probe", 101)
    breaker.worked("probe", 101)
    assert breaker.up, "after calm, two are enough again"


def test_events_are_the_same_however_they_are_split() -> None:
    text = b": ping\r\n\r\n" + b"".join(STREAM) + b"data: one\r\ndata:two\r\n\r\nevent: x\n\n"
    whole = Events().feed(text)
    assert whole[-1] == b"one\ntwo" and len(whole) == len(STREAM)
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


def test_usage_never_makes_up_a_cache() -> None:
    assert completed({"prompt_tokens": 5})["prompt_cache_told"] is False
    found = completed({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 9}})
    assert (found["prompt_cache_hit_tokens"], found["prompt_cache_miss_tokens"]) == (5, 0)
    assert completed({"prompt_tokens": 5, "prompt_cache_hit_tokens": 2})["prompt_cache_miss_tokens"] == 3


def test_a_wish_is_guessed_by_its_length_and_its_limits() -> None:
    wish = read(b'{"model": "m", "messages": [{"role": "user", "content": "' + b"x" * 400 + b'"}], "n": 2}', "chat")
    assert wish.samples == 2 and wish.answer == 2 * 1024 and 100 <= wish.prompt <= 115
    with pytest.raises(Refusal, match="stream_options"):
        read(b'{"model": "m", "prompt": "x", "stream_options": {}}', "text")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "one of both"),
        ({"model": "m", "upstream": ("http://a",)}, "one of both"),
        ({"upstream": ("a:8000",)}, "an address such as"),
        ({"upstream": ("http://user:secret@a",)}, "SPUTNIK_UPSTREAM_KEY"),
        ({"upstream": ("http://a",), "weights": "int8"}, "--weights is for a model of ours"),
        ({"model": "m", "affinity": True}, "--affinity"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        ServeConfig(**flags)
    assert "secret" not in str(refused.value)


def test_the_command_serves_an_upstream_and_shows_its_key_to_nobody(fakes: list[Fake]) -> None:
    fakes[0].reset()
    port = free_port()
    command = [sys.executable, "-m", "sputnik", "serve", "--upstream", fakes[0].url, "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--operator-port", str(free_port())], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
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
            assert client.chat.completions.create(model="inner", messages=SAID).choices[0].message.content == "ab"  # type: ignore[arg-type]
        process.send_signal(signal.SIGTERM)
        said += list(lines)
    assert process.wait(60) == 0 and CANARY not in "".join(said), "".join(said)
    assert fakes[0].headers[-1]["authorization"] == f"Bearer {CANARY}"
