"""A paced server as a process of its own, for benchmarks: started, asked for its pids, ended.

with Running(model, "--steps", "20") as server:
    server.target, server.socket, server.child("gateway").cpu_times()
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from benchmarks.serving.scenarios import Target
from sputnik.errors import SputnikError

KEYS = "sk-a,sk-b"


class Running:
    def __init__(self, model: Path, *flags: str, port: int = 8750) -> None:
        self.target = Target(port, port + 1)
        command = [sys.executable, "-m", "benchmarks.serving.paced", str(model), "--port", str(port), *flags]
        self._process = subprocess.Popen(
            command, env=os.environ | {"SPUTNIK_API_KEY": KEYS}, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Running":
        assert self._process.stderr is not None
        lines: IO[str] = self._process.stderr
        said = []
        for line in lines:
            said.append(line)
            if line.strip() == "serving":
                return self
        raise SputnikError("the server did not come up: " + " ".join("".join(said).split())[-500:])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def child(self, role: str) -> psutil.Process:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for child in psutil.Process(self._process.pid).children():
                if child.cmdline()[:1] and child.cmdline()[0].startswith(f"sputnik {role}"):
                    return child
            time.sleep(0.05)
        raise SputnikError(f"no {role} is running")

    @property
    def socket(self) -> str:
        """Of the worker."""
        found = [each.laddr for each in self.child("worker").net_connections("unix") if each.laddr]
        return next(str(each) for each in found if str(each).endswith("worker.sock"))

    def memory(self) -> int:
        """Bytes of the gateway that lie in memory."""
        return int(self.child("gateway").memory_info().rss)


def cpu(process: psutil.Process) -> float:
    """Seconds of processor it has had."""
    times = process.cpu_times()
    return float(times.user + times.system)
