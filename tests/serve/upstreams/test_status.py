"""The status page: what the board keeps, what the page may do, and a real gateway whose engine goes and comes back."""

import base64
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sputnik.serve.board import BUCKET, DAY, INCIDENTS, Board
from sputnik.serve.status import BARS, Fresh, bars, go_on, page

NOW = 1_800_000_000.0


def state(board: Board, now: float, name: str = "engine") -> dict[str, Any]:
    return board.report(now)["components"][name]


def test_what_was_not_probed_is_unknown_and_never_up() -> None:
    board = Board(NOW)
    found = state(board, NOW)
    assert found["state"] == "unknown" and found["uptime"] is None and set(found["day"]) == {None}
    board.note("engine", True, "", NOW)
    assert state(board, NOW)["state"] == "up" and state(board, NOW + 121)["state"] == "unknown"
    assert state(board, NOW, "API")["state"] == "unknown"
    assert len(state(board, NOW)["day"]) == DAY // BUCKET and state(board, NOW)["day"][-1] == 1.0


def test_uptime_is_the_share_of_good_probes_and_an_incident_has_two_ends() -> None:
    board = Board(NOW)
    for second in range(0, 1000, 10):
        board.note("engine", not 300 <= second < 400, "no token came in time", NOW + second)
    found = board.report(NOW + 1000)
    assert found["components"]["engine"]["uptime"] == pytest.approx(0.9)
    (incident,) = found["incidents"]
    assert (incident["began"], incident["ended"]) == (NOW + 300, NOW + 400)
    assert incident["reason"] == "no token came in time"
    board.note("engine", False, "gone", NOW + 1010)
    assert board.report(NOW + 1010)["incidents"][0]["ended"] is None and state(board, NOW + 1010)["reason"] == "gone"


def test_a_day_is_kept_and_no_more_however_long_it_runs() -> None:
    board = Board(NOW)
    for probe in range(4 * 2880):  # two days, twice a minute; the first of them bad
        board.note("engine", probe >= 2880, "bad", NOW + 15 * probe)
    end = NOW + 15 * 4 * 2880
    assert state(board, end)["uptime"] == 1.0 and state(board, end)["probes"] <= DAY / 15
    for flap in range(4 * INCIDENTS):
        board.note("API", bool(flap % 2), "flaps", end + flap)
    assert len(board.report(end + 1000)["incidents"]) == INCIDENTS


def test_another_process_goes_on_from_what_was_kept(tmp_path: Path) -> None:
    board = Board(NOW)
    for second in range(0, 3000, 10):
        board.note("engine", second < 2000, "no token came in time", NOW + second)
        board.note("API", True, "", NOW + second)
    (tmp_path / "kept").write_bytes(msgspec.json.encode(board.past()))
    next_one = Board(NOW + 4000)
    go_on(next_one, tmp_path / "kept", NOW + 4000)
    assert next_one.since == NOW and state(next_one, NOW + 4000)["state"] == "unknown", "nobody has probed yet"
    assert state(next_one, NOW + 4000)["day"] == state(board, NOW + 4000)["day"]
    next_one.note("engine", False, "still", NOW + 4010)
    (incident,) = next_one.report(NOW + 4010)["incidents"]
    assert (incident["began"], incident["ended"]) == (NOW + 2000, None), "the same one goes on"
    next_one.note("engine", True, "", NOW + 4020)
    assert next_one.report(NOW + 4020)["incidents"][0]["ended"] == NOW + 4020
    late = Board(NOW + 2 * DAY)
    go_on(late, tmp_path / "kept", NOW + 2 * DAY)
    assert state(late, NOW + 2 * DAY)["probes"] == 0 and late.since == NOW + DAY
    (tmp_path / "kept").write_bytes(b'{"since": "yesterday"}')
    go_on(anew := Board(NOW), tmp_path / "kept", NOW)
    assert anew.report(NOW) == Board(NOW).report(NOW)


def test_a_bar_shows_the_worst_of_its_time() -> None:
    day: list[float | None] = [None] * 288
    day[-1], day[-2], day[-4], day[-9] = 1.0, 0.5, 1.0, 0.0
    found = bars(day)
    assert len(found) == BARS and found[-4:] == ["unknown", "down", "up", "part"]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, [name for name, _ in attrs]))


def test_the_page_has_no_script_and_could_run_none() -> None:
    board = Board(NOW)
    board.note("engine", False, "<script>alert(1)</script>", NOW)
    found = board.report(NOW) | {"wait": {"requests": 3, "seconds": 7.4}, "state": "down"}
    text, headers = page(found, "<img src=x onerror=alert(1)>")
    tags = Tags()
    tags.feed(text)
    assert not {"script", "img", "iframe", "object", "form"} & {tag for tag, _ in tags.seen}
    assert not [names for _, names in tags.seen if any(name.startswith("on") or name == "style" for name in names)]
    assert "3 requests wait, about\n7 s" in text and "&lt;script&gt;" in text
    (style,) = re.findall(r"<style>(.*)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and f"style-src 'sha256-{digest}'" in policy and "unsafe" not in policy


def test_who_asks_often_is_sent_what_was_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter(range(9))
    shown = Fresh(lambda: next(made))
    monkeypatch.setattr("sputnik.serve.status.KEPT", 3600.0)
    assert [shown(), shown()] == [0, 0]
    monkeypatch.setattr("sputnik.serve.status.KEPT", 0.0)
    assert [shown(), shown()] == [1, 2]


def test_an_engine_that_goes_and_comes_back_is_an_incident(fakes: list[Any], start_gateway: Callable[..., Any]) -> None:
    for fake in fakes:
        fake.reset()
    gateway = start_gateway([fakes[0].url], [], probe=0.1, every=0.05)

    def engine(wanted: str) -> bool:
        status, body = gateway.get("/status.json")
        return status == 200 and json.loads(body)["components"]["engine"]["state"] == wanted

    gateway.until(lambda: engine("up"))
    fakes[0].alive = False
    gateway.until(lambda: engine("down"))
    fakes[0].reset()
    gateway.until(lambda: engine("up"))
    found = json.loads(gateway.get("/status.json")[1])
    (incident,) = found["incidents"]
    assert incident["component"] == "engine" and incident["began"] < incident["ended"]
    assert 0 < found["components"]["engine"]["uptime"] < 1 and found["components"]["API"]["uptime"] == 1
    with urllib.request.urlopen(f"{gateway.url}/status", timeout=30) as reply:  # without a key
        assert reply.headers["content-type"].startswith("text/html") and b"Everything works" in reply.read()


def test_what_probes_found_is_there_after_a_restart(
    fakes: list[Any], new_ports: Callable[[], int], tmp_path: Path
) -> None:
    fakes[0].reset()
    ports = new_ports(), new_ports()
    kept = tmp_path / "sputnik" / f"status-{ports[0]}.json"
    command = [sys.executable, "-m", "sputnik", "serve", "--upstream", fakes[0].url, "--database", "none"]
    found: list[dict[str, Any]] = []
    for turn in (1, 2):
        process = subprocess.Popen(
            [*command, "--port", str(ports[0]), "--operator-port", str(ports[1])], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=os.environ | {"SPUTNIK_API_KEY": "sk-x", "XDG_STATE_HOME": str(tmp_path)},
        )  # fmt: skip
        end = time.monotonic() + 120
        while len(found) < turn:
            assert time.monotonic() < end and process.poll() is None
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/status.json", timeout=30) as reply:
                    report = json.loads(reply.read())
                if report["components"]["API"]["state"] == "up" and kept.exists():
                    found.append(report)
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert found[0]["since"] == found[1]["since"] == json.loads(kept.read_bytes())["since"]
    assert found[1]["components"]["API"]["probes"] > found[0]["components"]["API"]["probes"] >= 1
