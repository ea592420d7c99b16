"""The log of a real gateway: one line per request with its figures, and nothing that anybody said."""

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from sputnik.errors import ConfigError
from sputnik.serve.logs import Journal, Sentence

CANARY = "CANARYx7"


def post(url: str, key: str, body: bytes, **headers: str) -> int:
    given = {"content-type": "application/json", "authorization": f"Bearer {key}"} | headers
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, given), timeout=30) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.fixture(scope="module")
def gateway(fakes: list[Any], start_gateway: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("log") / "requests.log"
    gateway = start_gateway([fake.url for fake in fakes], ["sk-upstream-" + CANARY], log=str(path), every=0.2)
    gateway.log = path
    gateway.until_up(2)
    return gateway


def lines(gateway: Any, wanted: int, **having: Any) -> list[dict[str, Any]]:
    """The lines with these values, once there are so many."""
    end = time.monotonic() + 60
    while True:
        found = [json.loads(line) for line in gateway.log.read_text().splitlines()]
        fitting = [line for line in found if all(line.get(name) == value for name, value in having.items())]
        if len(fitting) >= wanted:
            return fitting
        assert time.monotonic() < end, found
        time.sleep(0.02)


def test_a_line_has_the_figures_of_its_request(gateway: Any, fakes: list[Any]) -> None:
    list(gateway.ask(stream=True, extra_headers={"x-request-id": "first"}))
    (line,) = lines(gateway, 1, id="first")
    assert (line["event"], line["level"], line["route"], line["status"]) == (
        "request", "info", "/v1/chat/completions", 200,
    )  # fmt: skip
    assert line["key"].startswith("key-") and line["finish"] == ["stop"]
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (7, 4, 3)
    assert line["worker"] in [fake.url.removeprefix("http://") for fake in fakes]
    assert 0 <= line["queue"] <= line["ttft"] <= line["seconds"] < 60


def test_nothing_that_was_said_is_in_it(gateway: Any, fakes: list[Any]) -> None:
    said: Any = [{"role": "user", "content": CANARY}]
    gateway.ask(messages=said, extra_body={"user": CANARY})
    for body in (f'{{"{CANARY}": 1}}', f'{{"model": "{CANARY}", "messages": [{{}}]}}', CANARY, f'["{CANARY}"]'):
        assert post(f"{gateway.url}/v1/chat/completions", "sk-test", body.encode()) in (400, 404)
    assert post(f"{gateway.url}/v1/chat/completions", f"sk-{CANARY}", b"{}") == 401
    assert post(f"{gateway.url}/{CANARY}?{CANARY}", "sk-test", b"{}") == 404
    assert post(f"{gateway.url}/v1/completions", "sk-test", b"{}", **{"user-agent": CANARY}) == 400
    for fake in fakes:
        fake.mode = "error first"
    with pytest.raises(openai.APIError):
        list(gateway.ask(messages=said, stream=True))
    for fake in fakes:
        fake.reset()
    lines(gateway, 1, route="-", status=404)
    text = gateway.log.read_text()
    assert len(lines(gateway, 1, status=401)) == 1 and len(lines(gateway, 4, status=400)) >= 4
    for secret in (CANARY, "sk-test", "sk-upstream", "你", 'hi"', "boom"):
        assert secret not in text, secret


def test_a_flood_of_refusals_has_few_lines_and_their_number(gateway: Any) -> None:
    before = len(lines(gateway, 0, status=401))
    for _ in range(100):
        assert post(f"{gateway.url}/v1/models", "sk-wrong", b"{}") == 401
    time.sleep(1.1)  # the second is over
    post(f"{gateway.url}/v1/models", "sk-wrong", b"{}")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = lines(gateway, before + 1, status=401)[before:]
        if len(found) + sum(line.get("refused_without_a_line", 0) for line in found) == 101:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("some were neither told nor counted")
    assert all(line["key"] is None for line in found)


def test_a_client_that_goes_is_a_line_too(gateway: Any, fakes: list[Any]) -> None:
    for fake in fakes:
        fake.mode = "endless"
    stream = gateway.ask(stream=True, extra_headers={"x-request-id": "gone"})
    next(iter(stream))
    stream.close()
    for fake in fakes:
        fake.reset()
    (line,) = lines(gateway, 1, id="gone")
    assert line["finish"] == ["aborted"] and line["completion_tokens"] >= 1


def test_sentences_are_for_eyes() -> None:
    record = logging.makeLogRecord({"msg": "request"})
    record.__dict__["fields"] = {
        "status": 200, "route": "/v1/chat/completions", "key": "key-1", "prompt_tokens": 7, "cached_tokens": 4,
        "completion_tokens": 3, "finish": ["stop"], "ttft": 0.25, "seconds": 1.5,
    }  # fmt: skip
    told = "200 /v1/chat/completions key-1 7 (4 cached) tokens in, 3 out, stop first after 0.25 s 1.50 s"
    assert Sentence().format(record).endswith(told)


def test_a_log_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--log"):
        Journal(str(tmp_path / "no" / "such" / "log"), "info")


def test_what_the_writer_cannot_keep_up_with_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sputnik.serve.logs.WAITING", 1)
    journal, sent = Journal(str(tmp_path / "log"), "info"), 0
    end = time.monotonic() + 60
    try:
        while time.monotonic() < end:
            for _ in range(1 if sent else 500):
                logging.getLogger("sputnik").info("line", extra={"fields": {}})
                sent += 1
            found = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
            if len(found) + sum(line.get("lines_dropped", 0) for line in found) == sent:
                break
            time.sleep(0.02)
    finally:
        journal.close()
    assert len(found) < sent and len(found) + sum(line.get("lines_dropped", 0) for line in found) == sent
