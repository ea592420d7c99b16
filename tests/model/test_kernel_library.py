"""The library of our C++: one that is there and cannot be loaded, or cannot be built, says why."""

import sys
from pathlib import Path

import pytest

from sputnik.errors import SputnikError
from sputnik.model import kernels


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sputnik.so"
    file.write_bytes(b"no library")
    monkeypatch.setattr(kernels, "library_path", lambda: file)
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    try:
        kernels.load.cache_clear()
        with pytest.raises(SputnikError, match=r"sputnik.so cannot be loaded .*: delete it .* SPUTNIK_KERNELS=off"):
            kernels.load()
        file.unlink()
        assert not kernels.load()
    finally:
        kernels.load.cache_clear()


def test_what_keeps_it_from_being_built_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPUTNIK_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(kernels, "why_not", lambda: None)
    assert kernels.main() == 0
    assert str(tmp_path / "file") in capsys.readouterr().err
    script = "import sys; sys.exit('In file included from a.h,\\na.h:3: error: no such type')"
    with pytest.raises(SputnikError, match=r"do not compile: a.h:3: error: no such type"):
        kernels._run([[sys.executable, "-c", script]])
