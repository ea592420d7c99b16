"""A real, tiny, untrained model with its tokenizer, in a process and in this one."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import openai
import psutil
import pytest
import torch

from benchmarks.serving.paced_engine import make_model
from sputnik.engine.llm import LLM
from sputnik.model.checkpoint import save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.serve.beats import Beat, Ear
from sputnik.serve.settings import WorkerSettings
from sputnik.text.tokenizer import Tokenizer

TEXTS = ["What is 1 + 2? The answer is 3, 你好 😀. [0, 1, 2, 3, 4, 5]"] * 4


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained; initialised widely, so that its answers vary."""
    folder: Path = tmp_path_factory.mktemp("model") / "babbler"
    tok = Tokenizer.train(TEXTS, vocab_size=400)
    shape = {"vocab_size": tok.vocab_size, "eos_token_id": tok.eos_id, "initializer_range": 0.15}
    model = Transformer(ModelConfig.preset("tiny", max_position_embeddings=2048, **shape))
    save_model(model.init_weights(torch.Generator().manual_seed(0)), folder, tokenizer=tok)
    return folder


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, precision="fp32", exact=True, cache_tokens=4096, max_running=9)


KEY = "sk-test"


class Server:
    """`sputnik serve` as a user starts it, and what it says."""

    def __init__(self, model: Path, *flags: str, program: tuple[str, ...] = ("sputnik", "serve")) -> None:
        self.model, self.port, self.operator_port = model, free_port(), free_port()
        self.url, self.key = f"http://127.0.0.1:{self.port}", KEY
        command = [sys.executable, "-m", *program, str(model), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--operator-port", str(self.operator_port), *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0,
            env=os.environ | {"SPUTNIK_API_KEY": f"{KEY},sk-other", "PYTHONUNBUFFERED": "1"}
            | {"XDG_STATE_HOME": str(model.parent / "state")},
        )  # fmt: skip
        self.said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.said.append(line)

    def wait(self, text: str, seconds: float = 120, times: int = 1) -> None:
        """Until it has said so."""
        end = time.monotonic() + seconds
        while sum(text in line for line in self.said) < times:
            assert time.monotonic() < end and self.process.poll() is None, "".join(self.said)
            time.sleep(0.02)

    def child(self, role: str) -> psutil.Process:
        """The process of a role, once it bears its name."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error):
                    if child.cmdline()[:1] and child.cmdline()[0].startswith(f"sputnik {role}"):
                        return child
            time.sleep(0.02)
        raise AssertionError(f"no {role}")

    def fetch(
        self, path: str, body: Any = None, key: str | None = KEY, method: str | None = None, **headers: str
    ) -> tuple[int, Any, Any]:
        """Status, JSON and headers of a plain request."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"{self.url}{path}", data, fields | headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read()), response.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read()), error.headers

    def engine(self) -> dict[str, float]:
        """The engine's figures, by way of the page of metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.operator_port}/metrics", timeout=30) as page:
            found = re.findall(r"^sputnik:(\w+) (\S+)$", page.read().decode(), re.MULTILINE)
        return {name: float(value) for name, value in found}

    def until_idle(self, seconds: float = 30) -> None:
        """Every slot and every block is free."""
        end = time.monotonic() + seconds
        while True:
            found = self.engine()
            busy = [found.get(f"engine_{name}", 1) for name in ("running", "queue", "runs", "cache_use")]
            if not any(busy) and not found["num_requests_running"] and not found["num_requests_waiting"]:
                return
            assert time.monotonic() < end, found
            time.sleep(0.02)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(90)
        self._listener.join(10)
        return code


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


@pytest.fixture(scope="session")
def start_server(checkpoint: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*flags: str) -> Server:
        started.append(Server(checkpoint, "--precision", "fp32", "--exact", "--cache-gib", "0.01", *flags))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    server = start_server("--slots", "8", "--per-key", "40")
    server.wait("stop     Ctrl-C")
    return server


@pytest.fixture(scope="session")
def start_paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """The same over an engine of fixed speed (benchmarks/serving/paced.py)."""
    model, started = make_model(tmp_path_factory.mktemp("model") / "paced"), list[Server]()

    def start(*flags: str) -> Server:
        started.append(Server(model, *flags, program=("benchmarks.serving.paced",)))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture(scope="session")
def paced(start_paced: Callable[..., Server]) -> Server:
    """20 tokens a second in each of 8 slots."""
    server = start_paced("--steps", "20", "--slots", "8", "--queue", "16", "--per-key", "20")
    server.wait("serving")
    return server


class Worker:
    """A worker process and what it beats."""

    def __init__(self, settings: WorkerSettings) -> None:
        ours, theirs = socket.socketpair()
        settings = msgspec.structs.replace(settings, beats=theirs.fileno())
        self.path = settings.socket
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sputnik.serve.worker"],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[theirs.fileno()], process_group=0,
        )  # fmt: skip
        theirs.close()
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(settings))
        self.process.stdin.close()
        self._ear = Ear(ours)
        self.beats = list[Beat]()

    def wait(self, wanted: Callable[[Beat], bool], seconds: float = 120) -> Beat:
        """The next beat that is as wanted."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            for beat in self._ear.hear():
                self.beats.append(beat)
                if wanted(beat):
                    return beat
            time.sleep(0.02)
        raise AssertionError(f"no such beat; exit code {self.process.poll()}, beats {self.beats[-3:]}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> str:
        """Wait for its end; what it said."""
        stderr, errors = self.process.stderr, ""
        assert stderr is not None
        if not stderr.closed:
            with stderr:
                errors = stderr.read().decode()
        self.process.wait(60)
        return errors

    def forget(self) -> None:
        """The supervisor is no more."""
        self._ear.close()


@pytest.fixture(scope="session")
def start_worker(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def start(**changes: Any) -> Worker:
        path = tmp_path_factory.mktemp("run") / "worker.sock"
        settings = WorkerSettings(
            str(checkpoint), str(path), name="babbler", precision="fp32", exact=True, slots=8, cache_bytes=1 << 23
        )
        started.append(Worker(msgspec.structs.replace(settings, **changes)))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.end()
        each.forget()
