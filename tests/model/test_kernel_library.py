"""The library of our C++: one that is there and cannot be loaded says what to do."""

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
