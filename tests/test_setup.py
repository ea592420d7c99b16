"""scripts/setup.sh finishes what an earlier run left half-made. A Python that only notes what it is asked stands in for
the real one: what pip would fetch is gigabytes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTING = """#!/bin/sh
echo "$*" >>"$NOTES"
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && touch .venv/pip ;;
  "-m pip --version") [ -e .venv/pip ] ;;
  *"import sys, torch"*) [ -e .venv/torch ] ;;
  *"import ensurepip"*) [ -z "$BARE" ] ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    clone = tmp_path / "a clone"
    (clone / "scripts").mkdir(parents=True)
    for name in ("scripts/setup.sh", "constraints.txt"):
        shutil.copy(ROOT / name, clone / name)
    (clone / "python").write_text(NOTING)
    (clone / "python").chmod(0o755)
    return clone


def set_up(clone: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The outcome, and what pip and venv were asked."""
    notes = clone / "notes"
    notes.write_text("")
    settings = {**os.environ, "PYTHON": str(clone / "python"), "NOTES": str(notes), "TORCH_INDEX": "", **environment}
    done = subprocess.run(["bash", clone / "scripts/setup.sh", "run"], capture_output=True, text=True, env=settings)
    asked = [line for line in notes.read_text().splitlines() if line.startswith(("-m venv", "-m pip install"))]
    return done, [line.split()[-1] for line in asked]


def test_first_run_second_run_and_another_torch(clone: Path) -> None:
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    done, asked = set_up(clone)
    assert (done.returncode, asked) == (0, [".venv", pinned, "."]), done.stderr
    assert (clone / ".venv/.ready-run").exists()
    (clone / ".venv/torch").touch()  # the one that constraints.txt names
    assert set_up(clone)[1] == ["."]
    (clone / ".venv/torch").unlink()  # or another: it is replaced before anything else could bring a build for GPUs
    assert set_up(clone)[1] == [pinned, "."]


def test_an_environment_without_pip_is_made_again(clone: Path) -> None:
    """What `python3 -m venv` leaves behind where python3-venv is missing, or when it is interrupted."""
    (clone / ".venv/bin").mkdir(parents=True)
    shutil.copy(clone / "python", clone / ".venv/bin/python")
    done, asked = set_up(clone)
    assert done.returncode == 0 and asked[0] == ".venv", done.stderr


@pytest.mark.skipif(os.getuid() == 0, reason="root installs the package")
def test_missing_python3_venv_is_named(clone: Path) -> None:
    done, asked = set_up(clone, BARE="yes")
    assert (done.returncode, asked) == (2, []) and "sudo apt-get install python3-venv" in done.stderr
    assert not (clone / ".venv").exists()
