"""Keys and usage of a server as users have it; and nothing of what they wrote, nor a key, in anything it leaves."""

import json
import os
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from sputnik.__main__ import main

CANARY = "zebra crossing forty-two"


@pytest.fixture
def state(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the server's user."""
    monkeypatch.setenv("XDG_STATE_HOME", str(checkpoint.parent / "state"))
    return checkpoint.parent / "state"


def until_known(server: Any, key: str, status: int) -> float:
    """Seconds until the server answers this key so."""
    begun = time.monotonic()
    while server.fetch("/v1/models", key=key)[0] != status:
        assert time.monotonic() - begun < 20
        time.sleep(0.02)
    return time.monotonic() - begun


def run(capsys: pytest.CaptureFixture[str], line: str) -> str:
    assert main(line.split()) == 0
    return capsys.readouterr().out


def test_a_key_from_its_making_to_its_end(server: Any, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = run(capsys, "keys create canary --budget 1").split()[-1]
    until_known(server, key, 200)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)
    question: Any = [{"role": "user", "content": CANARY}]
    asked: Any = {"model": "deepseek-chat", "messages": question, "max_tokens": 16}
    replies = [client.chat.completions.create(**asked) for _ in range(2)]
    once = {"idempotency-key": "canary-order"}
    twice = [client.chat.completions.create(**asked, seed=3, extra_headers=once) for _ in range(2)]
    assert twice[0] == twice[1]
    client.close()
    usages = [each.usage.model_dump() for each in (*replies, twice[0])]
    end = time.monotonic() + 20
    while True:
        (row, _) = map(json.loads, run(capsys, "usage --json --key canary").splitlines())
        if row["requests"] == 3:
            break
        assert time.monotonic() < end
    assert row["hit"] == sum(each["prompt_cache_hit_tokens"] for each in usages)
    assert row["miss"] == sum(each["prompt_cache_miss_tokens"] for each in usages)
    assert row["output"] == sum(each["completion_tokens"] for each in usages)
    balance = server.fetch("/user/balance", key=key)[1]
    assert balance["is_available"] is True
    assert float(balance["balance_infos"][0]["total_balance"]) == pytest.approx(1 - float(row["cost"]), abs=1e-9)
    run(capsys, "keys revoke canary")
    assert until_known(server, key, 401) < 1 + 2, "a second, and what a busy machine adds"
    left = [path for path in state.rglob("*") if path.is_file()]
    assert any(path.name == "sputnik.db" for path in left)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.operator_port}/metrics", timeout=30) as page:
        outputs = [page.read(), "".join(server.said).encode(), *(path.read_bytes() for path in left)]
    words = [CANARY.encode(), key.encode(), key[23:66].encode(), server.key.encode(), b"canary-order"]
    for output in outputs:
        assert not [word for word in words if word in output]


def test_prices_that_are_wrong_and_databases_that_cannot_be_are_told_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    for flags, words in (
        (["--prices", "none.toml"], "--prices none.toml: No such file"),
        (["--database", "mysql://x"], "--database: give a path"),
        (["--database", f"postgresql+psycopg://u:secret@/x?host={tmp_path}"], "u:***@"),
    ):
        assert main(["serve", "babbler", "--port", str(port), *flags]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "secret" not in error
    assert "SPUTNIK_PEPPER" not in os.environ
