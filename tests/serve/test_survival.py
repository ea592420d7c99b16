"""What dies is replaced and what was being said goes on: real processes, real signals."""

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from benchmarks.serving.load import Answer, Ask, send
from benchmarks.serving.paced import answer

KEY = "sk-test"
LONG: Any = {
    "model": "babbler", "messages": [{"role": "user", "content": "What is 1 + 2?"}], "stream": True, "max_tokens": 600,
    "temperature": 1.0, "logit_bias": {"1": -100},
}  # fmt: skip


def text(stream: Any) -> tuple[str, str, dict[str, Any]]:
    """Thought, answer and end of a whole stream."""
    thought, answer, details = "", "", {}
    for chunk in stream:
        for choice in chunk.choices:
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            answer += choice.delta.content or ""
            details = getattr(choice, "finish_details", None) or details
    return thought, answer, details


def all_at_once(server: Any, seeds: range, **more: Any) -> list[Any]:
    """Streams of all seeds, each in a thread of its own: their texts, or the errors they ended with."""
    found: list[Any] = [None] * len(seeds)

    def run(place: int, seed: int) -> None:
        try:
            found[place] = text(server.client.chat.completions.create(**LONG | more | {"seed": seed}))
        except openai.APIError as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(seeds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    return found


def ready(server: Any) -> bool:
    try:
        with urllib.request.urlopen(f"{server.url}/ready", timeout=20):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return False


def test_streams_go_on_over_the_death_of_the_engine(server: Any) -> None:
    whole = all_at_once(server, range(4))
    worker, gateway = server.child("worker"), server.child("gateway")
    stream = server.client.chat.completions.create(**LONG | {"seed": 0})
    first = [next(stream) for _ in range(20)]
    others = threading.Thread(target=lambda: found.extend(all_at_once(server, range(1, 4))))
    found: list[Any] = []
    others.start()
    while len(server.engine()) and server.engine().get("engine_runs", 0) < 4:
        time.sleep(0.01)
    worker.kill()
    thought, answer, details = text([*first, *stream])
    others.join(240)
    assert [(thought, answer, details), *found] == whole
    assert server.child("worker").pid != worker.pid and server.child("gateway").pid == gateway.pid
    assert server.engine()["workers_lost"] >= 1
    server.until_idle()
    assert ready(server)


def test_a_request_over_which_engines_die_ends_with_an_error(server: Any) -> None:
    """No token has come before each death: such a request is tried again once, and no more."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(server.client.chat.completions.create(**LONG | {"stream": False, "n": 8, "seed": 1}))
        except openai.APIStatusError as error:
            answers.append(error)

    worker = server.child("worker")
    worker.suspend()
    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.5)
    worker.kill()
    server.wait("worker: ready", times=sum("worker: ready" in line for line in server.said) + 1)
    thread.join(120)
    assert answers[0].usage.completion_tokens > 8, "it was tried again"


def test_sigterm_twice_lets_answers_finish_and_lets_nobody_in(start_paced: Callable[..., Any]) -> None:
    """Eight run and four wait when it comes; not one is cut short."""
    server = start_paced("--steps", "40", "--slots", "8", "--drain", "100")
    server.wait("serving")
    asks = [Ask(server.port, KEY, tokens=60, seed=seed) for seed in range(12)]
    late: list[Answer] = []

    async def run() -> list[Answer]:
        running = asyncio.gather(*map(send, asks))
        while (found := server.engine())["num_requests_waiting"] < 2 or not found["engine_runs"]:
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        while not late or late[-1].status == 200:  # the signal goes by way of the supervisor
            late.append(await send(Ask(server.port, KEY, tokens=1)))
        server.process.send_signal(signal.SIGTERM)
        return await running

    answers = asyncio.run(run())
    assert [each.text for each in answers] == [answer(seed, 60) for seed in range(12)]
    assert all(each.done and each.finish == "length" for each in answers)
    assert (late[-1].status, late[-1].error["code"]) == (503, "shutting_down")
    assert int(late[-1].headers["retry-after"]) > 0
    assert server.end() == 0, "".join(server.said)


def test_children_end_by_themselves_when_the_supervisor_is_killed(start_paced: Callable[..., Any]) -> None:
    server = start_paced("--drain", "1")
    server.wait("serving")
    children = [server.child(role) for role in ("worker", "gateway")]
    listens = [Path(str(each.laddr)) for each in children[0].net_connections("unix") if each.laddr]
    (directory,) = {path.parent for path in listens if path.name == "worker.sock"}
    server.process.kill()
    gone, alive = psutil.wait_procs(children, 60)
    assert not alive and len(gone) == 2
    assert not directory.exists(), "nor is anything left in the temporary folder"
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections may linger; a listener may not
        trial.bind(("127.0.0.1", server.port))


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly_and_twice_at_once(start_server: Callable[..., Any]) -> None:
    server = start_server()
    server.wait("stop     Ctrl-C")
    stream = server.client.chat.completions.create(**LONG | {"max_tokens": 1900})
    next(stream)
    server.process.send_signal(signal.SIGINT)
    server.wait("draining")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) == 1
    stream.close()
    assert not any("Traceback" in line for line in server.said), "".join(server.said)


@pytest.mark.slow
def test_a_stopped_engine_is_noticed_and_replaced(server: Any) -> None:
    whole = all_at_once(server, range(3))
    worker = server.child("worker")
    found: list[Any] = []
    streams = threading.Thread(target=lambda: found.extend(all_at_once(server, range(3))))
    streams.start()
    while server.engine().get("engine_runs", 0) < 3:
        time.sleep(0.01)
    worker.suspend()
    begun = time.monotonic()
    assert not ready(server) and time.monotonic() - begun < 8
    server.wait("no sign of life", 30)
    assert time.monotonic() - begun < 15
    streams.join(240)
    assert found == whole


@pytest.mark.slow
def test_fifty_deaths_at_random_moments_change_no_letter(server: Any) -> None:
    whole = all_at_once(server, range(4))
    dice = random.Random(0)
    for _ in range(50):
        victim = server.child("worker")
        killer = threading.Timer(dice.random() * 2, victim.kill)
        killer.start()
        found = all_at_once(server, range(4))
        killer.join()
        victim.wait(10)  # it has its name for a moment longer
        for mine, wanted in zip(found, whole, strict=True):
            if isinstance(mine, openai.APIError):
                assert mine.code == "engine_lost"
            else:
                assert mine == wanted
    server.until_idle()


@pytest.mark.slow
def test_a_dead_gateway_is_replaced(server: Any) -> None:
    gateway, worker = server.child("gateway"), server.child("worker")
    gateway.kill()
    server.wait("gateway: ready", times=2)
    assert server.child("worker").pid == worker.pid
    server.until_idle()
    assert text(server.client.chat.completions.create(**LONG))[2]


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "sputnik", "serve", "no/such", "--port", "1"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert found.returncode == 2 and "error: " in found.stderr and "Traceback" not in found.stderr
    assert json.dumps(found.stdout) == '""'
