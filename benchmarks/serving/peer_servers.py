"""Other servers beside ours, all with SmolLM2-135M in bf16, under the same open-loop load, each alone in its turn.

    rows = beside(Path(".peers"), rates=[0.5, 1.0], rounds=2, seconds=25, threads=1)

Prompts are token ids, so that no tokenizer decides; answers are greedy and of one length. Ours is `sputnik serve` as
users start it, llama.cpp's is `llama-server` in the environment's bin (its CMake target of that name), vLLM's its
OpenAI server. One that does not wait its turn is stopped (SIGSTOP), so that it takes no time from the others.
"""

import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.files import Files, save_folder
from benchmarks.serving.load import Answer, Ask, poisson, quantile
from benchmarks.serving.side import Absent
from sputnik.text.tokenizer import Tokenizer

TOKENS, PROMPT, SLOTS, CONTEXT, KEY = 48, 32, 16, 512, "sk-a"
WORDS = range(1000, 40000)
"""Ids that every tokenizer of the model has as plain text."""
READY = "/ready"
"""Of ours: 200 once a token has come out of the engine. Its /health is that of the gateway, which loads nothing."""


class PeerServer:
    """A server as a process: waited for until it can answer, stopped while it is not its turn."""

    def __init__(
        self, name: str, command: Sequence[str | Path], port: int, env: dict[str, str], ready: str = "/health"
    ) -> None:
        """`ready`: the path that is 200 once the model is loaded."""
        self.name, self.port, self._ready = name, port, ready
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=self._log, stderr=self._log, env=os.environ | env, process_group=0
        )

    def wait(self, seconds: float = 420) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self._ready}", timeout=10):
                    return
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError):  # it lives, and loads
                    error.close()
                time.sleep(0.5)
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").split()
        self.end()
        raise Absent(f"{self.name} did not come up: {' '.join(words)[-300:]}")

    def go(self, on: bool) -> None:
        """Of all of its processes."""
        for group in self._groups():
            os.killpg(group, signal.SIGCONT if on else signal.SIGSTOP)

    def _groups(self) -> set[int]:
        import psutil

        children = psutil.Process(self.process.pid).children(recursive=True)
        return {self.process.pid, *(os.getpgid(child.pid) for child in children)}

    def end(self) -> None:
        if self.process.poll() is None:
            self.go(True)
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._log.close()


def start(name: str, environments: Path, port: int, threads: int) -> PeerServer:
    """Raises Absent."""
    files, one = Files(environments, threads), {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    files.cache.mkdir(parents=True, exist_ok=True)
    model = files.gguf("smollm2", "bf16")
    if name == "ours":
        command: list[str | Path] = [sys.executable, "-m", "sputnik", "serve", model, "--port", str(port)]
        command += ["--name", "smollm2", "--precision", "bf16", "--slots", str(SLOTS), "--database", "none"]
        server = PeerServer(name, command, port, one | {"SPUTNIK_API_KEY": KEY}, READY)
    elif name == "llama.cpp":
        binary = environments / "llama" / "bin" / "llama-server"
        if not binary.exists():
            raise Absent(f"{binary} is not there: build llama.cpp's target llama-server, and put it there")
        command = [binary, "-m", model, "--port", str(port), "-np", str(SLOTS), "-c", str(SLOTS * CONTEXT)]
        command += ["-t", str(threads), "-tb", str(threads), "--alias", "smollm2", "--no-webui", "--api-key", KEY]
        server = PeerServer(name, command, port, one)
    else:
        folder = _folder(files, model)
        python, module = environments / "vllm" / "bin" / "python", "vllm.entrypoints.openai.api_server"
        if not python.exists():
            raise Absent("peer not installed: scripts/peers.sh vllm")
        command = [python, "-m", module, "--model", folder, "--port", str(port), "--api-key", KEY]
        command += ["--served-model-name", "smollm2", "--dtype", "bfloat16", "--max-model-len", str(CONTEXT)]
        command += ["--max-num-seqs", str(SLOTS), "--no-enable-prefix-caching"]
        more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(files.cache / "vllm")}
        server = PeerServer(name, command, port, one | more)
    server.wait()
    return server


def _folder(files: Files, model: Path) -> Path:
    """As Hugging Face has it, with a tokenizer: vLLM's server wants one."""
    target = files.cache / "smollm2-served"
    if not target.exists():
        partial = target.with_suffix(".partial")
        save_folder(model, partial)
        Tokenizer.load(model).save(partial)
        partial.rename(target)
    return target


async def loaded(server: PeerServer, rate: float, seconds: float, seed: int) -> list[Answer]:
    dice = random.Random(f"{rate} {seed}")  # no prompt twice: it would be in the cache of those that have one

    def make(number: int) -> Ask:
        more: dict[str, Any] = {
            "model": "smollm2", "prompt": dice.choices(WORDS, k=PROMPT), "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        return Ask(server.port, KEY, TOKENS, seed=number, more=more)

    return await poisson(make, rate, seconds, random.Random(seed))


def beside(environments: Path, rates: Sequence[float], rounds: int, seconds: float, threads: int) -> Iterator[Any]:
    """A row per rate and peer."""
    servers, why = list[PeerServer](), dict[str, str]()
    try:
        for place, name in enumerate(("ours", "llama.cpp", "vllm")):
            try:
                servers.append(start(name, environments, 8900 + 10 * place, threads))
                asyncio.run(loaded(servers[-1], 2.0, 3.0, 99))  # warm
                servers[-1].go(False)
            except Absent as absent:
                why[name] = str(absent)
        for rate in rates:
            found: dict[str, list[dict[str, float]]] = {each.name: [] for each in servers}
            for number in range(rounds):
                for each in servers:
                    each.go(True)
                    found[each.name].append(_figures(asyncio.run(loaded(each, rate, seconds, number))))
                    each.go(False)
            yield from _rows(rate, found)
        for name, reason in why.items():
            yield {"case": f"beside {name}", "ours": None, "theirs": None, "ratio": None, "why": reason}
    finally:
        for each in servers:
            each.end()


def _figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Of requests that were answered whole; the rate is of all tokens over the time from the first arrival on."""
    whole = [each for each in answers if each.done and each.first is not None]
    begun, ended = min(each.due for each in answers), max(each.ended for each in answers)
    first = [each.first - each.due for each in whole if each.first is not None]
    return {
        "ttft_p50_ms": 1e3 * quantile(first, 0.5), "ttft_p99_ms": 1e3 * quantile(first, 0.99),
        "tok_s": len(whole) * TOKENS / (ended - begun), "gap_p50_ms": 1e3 * quantile(_gaps(whole), 0.5),
        "asked": float(len(answers)), "answered": float(len(whole)),
    }  # fmt: skip


def _gaps(answers: Sequence[Answer]) -> list[float]:
    """Between the first piece and the last, a token's share: servers join tokens into pieces in different ways."""
    return [(each.times[-1] - each.times[0]) / (TOKENS - 1) for each in answers if len(each.times) > 1]


def _rows(rate: float, found: dict[str, list[dict[str, float]]]) -> Iterator[Any]:
    for name in found:
        if name == "ours" or "ours" not in found:
            continue
        row: dict[str, Any] = {"case": f"{rate}/s beside {name}"}
        for figure in found[name][0]:
            ours, theirs = ([each[figure] for each in found[who]] for who in ("ours", name))
            ratios = [one / other for one, other in zip(ours, theirs) if other]
            row[figure] = {
                "ours": round(statistics.median(ours), 1), "theirs": round(statistics.median(theirs), 1),
                "ratio": round(statistics.median(ratios), 2) if ratios else None,
                "range": [round(min(ratios), 2), round(max(ratios), 2)] if ratios else None,
            }  # fmt: skip
        yield row
