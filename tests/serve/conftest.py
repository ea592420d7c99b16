"""A real, tiny, untrained model with its tokenizer, in a process and in this one."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sputnik.engine.llm import LLM
from sputnik.model.checkpoint import save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.serve.beats import Beat, Ear
from sputnik.serve.worker import WorkerSettings
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
