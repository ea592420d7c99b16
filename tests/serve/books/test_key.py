"""The form of keys, the pepper's file, and what routes a key may use."""

import re
import stat
from pathlib import Path

import pytest

from sputnik.errors import ConfigError
from sputnik.serve.books.key import PATTERN, digest, id_of, new_key, read_pepper
from sputnik.serve.identity import PATHS, Identity


def test_a_key_has_its_form_and_a_typing_error_is_found() -> None:
    keys = [new_key() for _ in range(50)]
    assert len({id_of(key) for key in keys}) == 50
    for key in keys:
        assert re.fullmatch(PATTERN, key) and id_of(key) == key[3:23]
        for place in (3, 30, 71):
            other = "a" if key[place] != "a" else "b"
            assert id_of(key[:place] + other + key[place + 1 :]) is None
    assert id_of("sk-short") is None and id_of(keys[0] + "0") is None and id_of(keys[0].replace("sk-", "pk-")) is None


def test_what_is_kept_of_a_key_needs_the_pepper() -> None:
    key = new_key()
    assert digest(key, "00" * 32) != digest(key, "01" * 32)
    assert digest(key, "00" * 32) == digest(key, "00" * 32) and key[23:66] not in digest(key, "00" * 32)


def test_the_pepper_is_made_once_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    pepper, file = read_pepper({}), tmp_path / "sputnik" / "pepper"
    assert read_pepper({}) == pepper == file.read_text().strip() and len(pepper) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["pepper"]
    environment = {"SPUTNIK_PEPPER": "ab" * 32}
    assert read_pepper(environment) == "ab" * 32 and not environment, "no child finds it there"
    with pytest.raises(ConfigError, match="SPUTNIK_PEPPER holds no pepper"):
        read_pepper({"SPUTNIK_PEPPER": "salt"})
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_pepper({})


def test_a_key_may_use_the_routes_of_its_scopes_alone() -> None:
    chat = Identity("x", scopes=frozenset({"chat"}))
    for path in ("/v1/chat/completions", "/chat/completions", "/beta/chat/completions", "/v1/messages/count_tokens"):
        assert chat.may(path)
    for path in ("/v1/completions", "/v1/models", "/models/babbler", "/tokenize", "/v1/nothing", "/v1/chat"):
        assert not chat.may(path)
    for path in ("/v1/requests/a/cancel", "/user/balance", "/openapi.json"):
        assert chat.may(path), "of its own, or of nobody"
    assert Identity("x").may("/v1/nothing") and all(Identity("x").may(path) for path in PATHS)
