"""`--affinity`: conversations that begin alike stay with one server, as long as it lives and has not too much to do.

Three servers in processes of their own, which are killed and come back on their ports.
"""

import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("a", "b", "c")


class Servers:
    def __init__(self, new_port: Callable[[], int]) -> None:
        self._ports = {name: new_port() for name in NAMES}
        self.urls = [f"http://127.0.0.1:{port}" for port in self._ports.values()]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in NAMES:
            self.start(name)

    def start(self, name: str) -> None:
        program = Path(__file__).with_name("chat_process.py")
        self._processes[name] = subprocess.Popen([sys.executable, program, str(self._ports[name]), name])

    def kill(self, name: str) -> None:
        self._processes[name].kill()
        self._processes[name].wait()


@pytest.fixture(scope="module")
def servers(new_ports: Callable[[], int]) -> Iterator[Servers]:
    found = Servers(new_ports)
    yield found
    for name in NAMES:
        found.kill(name)


@pytest.fixture(scope="module")
def near(servers: Servers, start_gateway: Callable[..., Any]) -> Any:
    gateway = start_gateway(servers.urls, [], affinity=True, every=0.1)
    gateway.until_up(3)
    return gateway


def turns(number: int, count: int) -> list[dict[str, str]]:
    """The first turns of a conversation; all begin with the same instructions."""
    found = [{"role": "system", "content": "You are short."}, {"role": "user", "content": f"Of topic {number}."}]
    for turn in range(count):
        found += [{"role": "assistant", "content": f"It is {turn}."}, {"role": "user", "content": f"And {turn}?"}]
    return found


def answered_by(gateway: Any, number: int, count: int = 0) -> str:
    request = {"model": "inner", "messages": turns(number, count)}
    return str(gateway.post("/v1/chat/completions", request)["choices"][0]["message"]["content"])


def homes(gateway: Any, numbers: Iterable[int]) -> dict[int, str]:
    return {number: answered_by(gateway, number) for number in numbers}


@pytest.fixture(scope="module")
def found(near: Any) -> dict[int, str]:
    """Two conversations of each server."""
    found: dict[int, str] = {}
    for number in range(1000):
        home = answered_by(near, number)
        if list(found.values()).count(home) < 2:
            found[number] = home
        if len(found) == 2 * len(NAMES):
            return found
    raise AssertionError(f"one has none: {Counter(found.values())}")


def test_a_conversation_stays_where_it_began_as_it_grows(near: Any, found: dict[int, str]) -> None:
    for count in (1, 2, 30):
        assert {number: answered_by(near, number, count) for number in found} == found


def test_a_chain_of_responses_stays_too(near: Any, found: dict[int, str]) -> None:
    for number, home in found.items():
        system, first = turns(number, 0)
        options: dict[str, Any] = {"model": "inner", "instructions": system["content"]}
        one = near.post("/v1/responses", options | {"input": first["content"]})
        two = near.post("/v1/responses", options | {"input": "And?", "previous_response_id": one["id"]})
        for reply in (one, two):
            assert reply["output"][0]["content"][0]["text"] == home, "one home in every dialect"


def test_one_with_more_to_do_than_the_others_gets_no_new_one(near: Any, found: dict[int, str]) -> None:
    for name in NAMES:
        mine = [number for number, home in found.items() if home == name]
        waiting = [*turns(mine[0], 1)[:-1], {"role": "user", "content": "wait"}]
        stream = near.ask(messages=waiting, stream=True)
        assert next(iter(stream)).choices[0].delta.content == name
        assert name not in homes(near, mine).values()
        others = [number for number in found if number not in mine]
        assert homes(near, others) == {number: found[number] for number in others}
        stream.close()
        near.until(lambda: near.page()["num_requests_running"] == 0)
    assert homes(near, found) == found


def test_those_of_a_dead_server_move_and_come_back(near: Any, servers: Servers, found: dict[int, str]) -> None:
    for name in NAMES:
        servers.kill(name)
        moved = homes(near, found)  # at once: who finds it dead is sent elsewhere
        assert name not in moved.values()
        assert all(moved[number] == home for number, home in found.items() if home != name), "nobody else moves"
        near.until_up(2)
        assert homes(near, found) == moved
        servers.start(name)
        near.until_up(3)
        assert homes(near, found) == found


def test_without_it_the_servers_take_turns(servers: Servers, start_gateway: Callable[..., Any]) -> None:
    gateway = start_gateway(servers.urls, [], every=0.1)
    gateway.until_up(3)
    assert Counter(answered_by(gateway, 0) for _ in range(9)) == dict.fromkeys(NAMES, 3)


def test_the_servers_speak_chat_completions_alone(servers: Servers) -> None:
    for path in ("responses", "messages"):
        request = urllib.request.Request(f"{servers.urls[0]}/v1/{path}", b"{}", {"content-type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request, timeout=30)
