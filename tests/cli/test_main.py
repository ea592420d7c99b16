"""The command line: light until a verb is chosen, one line and exit code 2 for what a user can mend."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sputnik import __version__
from sputnik.__main__ import VERBS, main
from sputnik.errors import DataError


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in VERBS)


def test_no_verb_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: sputnik VERB" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sputnik {__version__}\n"


def test_help_version_and_ground_modules_load_no_torch() -> None:
    program = (
        "import sys; from sputnik.__main__ import main; main(['--help']); main(['--version']);"
        "import sputnik.config, sputnik.cost, sputnik.hardware, sputnik.text.chat, sputnik.tasks.arithmetic;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_flags(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: sputnik {verb}")
    assert f"\n`sputnik {verb}" in said  # what it does and how it is called: the docstring of its module


def test_a_wrong_verb_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qickstart"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no verb 'qickstart'") and error.count("\n") == 1


def test_errors_of_verbs_are_one_line_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text('[[stage]]\nname = "a"\nkind = "corpus"\ntoknes = 3\n')
    for args, words in (
        (("run", "bad.toml"), "unknown key 'toknes'; did you mean 'tokens'?"),
        (("run", "none.toml"), "no such file"),
        (("run", "."), ".: Is a directory; name a file, not a directory"),
        (("chat", "nowhere"), "neither a checkpoint directory nor a run"),
        (("report", "nowhere"), "no such run directory"),
        (("report", "."), ".: is no run: it has no lineage.json"),
    ):
        assert main(args) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.toml"]


def test_a_command_that_fails_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sputnik", "qickstart"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_errors_over_several_lines_become_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(verb: str, args: object) -> int:
        raise DataError("first\nsecond")

    monkeypatch.setattr("sputnik.__main__.run_verb", broken)
    assert main(["run"]) == 2
    assert capsys.readouterr().err == "error: first second\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "runs: Permission denied; change who may use it"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", ".x.7", None, "x"), "x: Is a directory; name a file"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/c/sputnik/a"), "set SPUTNIK_CACHE to a directory"),
        (FileExistsError(errno.EEXIST, "File exists", "/c"), "/c: File exists; set SPUTNIK_CACHE to a directory"),
    ],
)
def test_a_file_that_the_system_refuses_is_one_line_with_a_fix(
    error: OSError, words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(verb: str, args: object) -> int:
        raise error

    monkeypatch.setenv("SPUTNIK_CACHE", "/c/sputnik")
    monkeypatch.setattr("sputnik.__main__.run_verb", broken)
    monkeypatch.setattr("sputnik.__main__._discard_output", lambda: None)
    assert main(["run"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_an_error_of_a_socket_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(verb: str, args: object) -> int:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr("sputnik.__main__.run_verb", broken)
    with pytest.raises(ConnectionResetError):
        main(["run"])


def test_output_to_a_full_disk_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "sputnik", "--help"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.decode() == "error: No space left on device; make room and run the same command again\n"


@pytest.mark.parametrize(
    ("command", "buffered"),
    [("--help", True), ("--version", False), ("report --help", True), ("doctor --quick", True)],
)
def test_a_reader_who_goes_away_ends_us_quietly(command: str, buffered: bool, tmp_path: Path) -> None:
    """As in `sputnik doctor | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "SPUTNIK_CACHE": str(tmp_path / "cache"), "PYTHONUNBUFFERED": "" if buffered else "1"}
    words = [sys.executable, "-m", "sputnik", *command.split()]
    done = subprocess.run(words, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, env=environment, timeout=240)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(verb: str, args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("sputnik.__main__.run_verb", stopped)
    assert main(["run"]) == 130
