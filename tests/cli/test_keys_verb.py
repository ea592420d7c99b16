"""`sputnik keys` and `sputnik usage`, as a user types them, and the example of docs/keys.md."""

import json
import re
import time
from pathlib import Path

import pytest

from sputnik.__main__ import main
from sputnik.serve.books import ledger
from sputnik.serve.books.access import Issued, changes, open_keys
from sputnik.serve.books.key import PATTERN, id_of, read_pepper
from sputnik.serve.books.prices import Price, Tokens

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "sputnik"


def run(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> str:
    assert main(line.split()) == code, line
    found = capsys.readouterr()
    return found.out if code == 0 else found.err


def use(url: str, key: str, tokens: Tokens, sent: int | None = None) -> None:
    """A request that has been answered."""
    database, _ = open_keys(url, {})
    account, price = id_of(key), Price(140_000, 550_000, 2_190_000)
    assert account is not None
    with database.writing() as connection:
        name, now = f"request{time.monotonic_ns()}", int(time.time()) if sent is None else sent
        ledger.reserve(connection, ledger.Reservation(name, account, "m", "g", now, price, 1000))
        ledger.settle(connection, name, tokens, "finished")
    database.close()


def test_a_key_is_shown_once_listed_and_revoked(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    said = run(capsys, "keys create ci --scope chat --scope models --budget 5 --expires 30d --priority batch")
    key = said.split()[-1]
    assert re.fullmatch(PATTERN, key) and said.count("\n") == 1
    listed = run(capsys, "keys list")
    assert key not in listed and key[:9] in listed
    assert all(word in listed for word in ("ci", "chat,models", "batch", "5.00", "never", "to 20"))
    assert key.encode() not in (state / "sputnik.db").read_bytes() + (state / "pepper").read_bytes()
    assert "there is a key 'ci' already" in run(capsys, "keys create ci", code=2)
    assert "is revoked" in run(capsys, f"keys revoke {key[:9]}...")
    assert "revoked" in run(capsys, "keys list")
    assert "no valid key 'ci'" in run(capsys, "keys revoke ci", code=2)
    again = run(capsys, "keys create ci").split()[-1]
    database, pepper = open_keys("", {})
    issued = Issued(pepper)
    with database.reading() as connection:
        issued.learn(changes(connection))
    database.close()
    identity = issued.find(again)
    assert again != key and identity is not None and identity.name == "ci"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("keys create ci --budget -1", "an amount such as 5"),
        ("keys create ci --budget 1e9", "an amount such as 5"),
        ("keys create ci --expires yesterday", "30d, 12h, 2w or a date"),
        ("keys create ci --expires 2020-01-01", "over already"),
        ("keys create ci --scope everything", "choose of chat, completions, models"),
        ("keys create a,b", "up to 64 letters"),
        ("keys list --database mysql://x", "give a path"),
        ("keys list --database no.db", "there is none"),
        ("keys revoke ci --database sqlite:///no.db", "there is none"),
        ("usage --database no.db", "there is none"),
        ("usage --since soon", "--since soon"),
        ("usage --prices none.toml", "No such file"),
    ],
)
def test_what_makes_no_sense_is_one_line(capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    said = run(capsys, line, code=2)
    assert words in said and said.count("\n") == 1


def test_usage_by_key_and_day(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = str(tmp_path / "books.db")
    one, other = (run(capsys, f"keys create {name} --database {url}").split()[-1] for name in ("one", "other"))
    yesterday = int(time.time()) - 86_400
    use(url, one, Tokens(64, 36, 20, 12))
    use(url, one, Tokens(0, 10, 5))
    use(url, one, Tokens(0, 1, 1), sent=yesterday)
    use(url, other, Tokens(0, 100, 100, 90))
    rows = [json.loads(line) for line in run(capsys, f"usage --json --database {url}").splitlines()]
    today, before = time.strftime("%Y-%m-%d", time.gmtime()), time.strftime("%Y-%m-%d", time.gmtime(yesterday))
    assert [(row["key"], row["day"], row["requests"]) for row in rows] == [
        ("one", before, 1), ("one", today, 2), ("other", today, 1), (None, None, 4),
    ]  # fmt: skip
    assert [rows[1][name] for name in ("hit", "miss", "output", "reasoning")] == [64, 46, 25, 12]
    assert [row["cost"] for row in rows] == ["0.000003", "0.000089", "0.000274", "0.000366"]
    assert {row["currency"] for row in rows} == {"USD"}
    few = [json.loads(line) for line in run(capsys, f"usage --json --key one --since 1h --database {url}").splitlines()]
    assert few[-1]["requests"] == 2 and len(few) == 2
    table = run(capsys, f"usage --database {url}")
    assert "other" in table and "0.000366" in table and "USD" in table
    run(capsys, f"keys revoke one --database {url}")
    assert "one" in run(capsys, f"usage --database {url}"), "what was used stays"


def test_another_pepper_than_that_of_the_keys_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, "keys create ci")
    assert read_pepper({})
    monkeypatch.setenv("SPUTNIK_PEPPER", "ab" * 32)
    assert "not the one this database's keys were made with" in run(capsys, "keys list", code=2)


def test_the_commands_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^sputnik ((?:keys|usage).*?)(?:  +#.*)?$", page, re.MULTILINE)
    assert len(lines) >= 5 and PATTERN in page
    for line in lines:
        run(capsys, line)
