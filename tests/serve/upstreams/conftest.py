"""Upstreams that do everything wrong, and a gateway's process before them."""

import json
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

from sputnik.serve.identity import key_hash
from sputnik.serve.settings import GatewaySettings, UpstreamSettings
from sputnik.serve.upstreams.events import LONGEST

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


class Handler(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self.server.fake.alive:
            self._whole(200, {"object": "list", "data": [{"id": "inner", "max_model_len": 99}]})
        else:
            self.close_connection = True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.fake.asked.append(body)
        self.server.fake.paths.append(self.path)
        self.server.fake.headers.append({name.lower(): value for name, value in self.headers.items()})
        try:
            self._answer(self.server.fake.mode if self.server.fake.alive else "die", body)
        except OSError:
            self.server.fake.left.set()
            self.close_connection = True

    def _answer(self, mode: str, body: dict[str, Any]) -> None:
        self.close_connection = mode not in ("good", "split")
        match mode:
            case "die":
                return
            case "hang":
                while self.server.fake.mode == "hang":
                    time.sleep(0.02)
            case "slow":
                time.sleep(0.1)
                self._whole(200, WHOLE)
            case "500" | "429" | "400" | "401":
                self._whole(int(mode), {"error": {"message": f"said {mode}", "param": "messages"}})
            case "poison":
                poison = body["messages"][0]["content"] == "poison"
                self._whole(500, {"error": {}}) if poison else self._whole(200, WHOLE)
            case "good" | "split" if not body.get("stream"):
                self._whole(200, WHOLE)
            case "good":
                self._events(STREAM)
            case "given":
                self._events(self.server.fake.given)
            case "split":
                self._events([bytes([byte]) for byte in b"".join(STREAM)])
            case "no usage":
                self._events([*STREAM[:5], STREAM[6]])
            case "cut":
                self._events(STREAM[:4])
            case "no end":
                self._events([*STREAM[:4], STREAM[6]])
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
        if self.close_connection:  # said, or the next request may be written into a connection that is being closed
            self.send_header("connection", "close")
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
            while time.monotonic() < until and self.server.fake.mode == "stall":
                time.sleep(0.02)


class Fake:
    """An upstream in a thread; `mode` says what it does with the next answer."""

    def __init__(self) -> None:
        self.mode, self.alive = "good", True
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.given: list[bytes] = []
        """What mode "given" streams."""
        self.left = threading.Event()
        """A client went away in the middle of an answer."""
        self._server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.fake = self
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def reset(self) -> None:
        self.mode, self.alive = "good", True
        self.asked.clear()
        self.headers.clear()
        self.paths.clear()
        self.left.clear()

    def end(self) -> None:
        self.mode = "good"
        self._server.shutdown()
        self._server.server_close()


def new_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


class Gateway:
    """The gateway's own process, before upstreams."""

    def __init__(self, settings: UpstreamSettings, **more: Any) -> None:
        self.port, self.operator_port = new_port(), new_port()
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

    def post(self, path: str, body: Any) -> Any:
        fields = {"authorization": "Bearer sk-test", "content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), fields)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())

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

    def until_trusted(self) -> None:
        """Both are up, and neither has to show a token."""
        wanted = {"engine_replicas_up": 2.0, "engine_replicas_doubted": 0.0}
        self.until(lambda: self.page().items() >= wanted.items())

    def ask(self, **more: Any) -> Any:
        said = [{"role": "user", "content": "hi"}]
        return self.client.chat.completions.create(**({"model": "inner", "messages": said} | more))

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
    settings = UpstreamSettings(urls, [CANARY], every=0.05, first=20, stall=1.0)
    gateway = Gateway(settings, drain=2.0, probe=3600.0)  # a probe of the status page would count as a failure too
    yield gateway
    said = gateway.end()
    assert "Traceback" not in said and CANARY not in said and "sk-test" not in said, said


@pytest.fixture(scope="module")
def start_gateway() -> Iterator[Callable[..., Gateway]]:
    """Gateways of one's own, before these addresses."""
    started: list[Gateway] = []

    def start(urls: list[str], keys: list[str], log: str | None = None, probe: float = 15.0, **more: Any) -> Gateway:
        started.append(Gateway(UpstreamSettings(urls, keys, **more), log=log, probe=probe))
        return started[-1]

    yield start
    for gateway in started:
        gateway.end()


@pytest.fixture(scope="session")
def new_ports() -> Callable[[], int]:
    return new_port


@pytest.fixture(scope="session")
def events_of_a_stream() -> list[bytes]:
    return STREAM


@pytest.fixture
def gateway(started: Gateway, fakes: list[Fake]) -> Gateway:
    for fake in fakes:
        fake.reset()
    started.until_trusted()
    for fake in fakes:
        fake.reset()
    return started
