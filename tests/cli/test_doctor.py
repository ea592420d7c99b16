"""The doctor finds what is here, names what is not, and says so by its exit code."""

from pathlib import Path

import pytest

from sputnik.__main__ import main as sputnik
from sputnik.cli import doctor
from sputnik.cli.doctor import DoctorConfig, Finding, examine
from sputnik.hardware import CpuSpeed, resolve_precision


def found(what: str) -> Finding:
    return next(finding for finding in examine(DoctorConfig(quick=True)) if finding.what == what)


def test_this_machine_can_run_the_tests_it_is_running(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPUTNIK_CACHE", str(tmp_path / "new" / "cache"))
    assert sputnik(["doctor", "--quick"]) == 0
    assert "ready" in capsys.readouterr().out
    assert not any(finding.state == "missing" for finding in examine(DoctorConfig(quick=True)))


def test_missing_package_is_named_with_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("numpy", "no-such-package"))
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-extra": ("gym", "riddles")})
    assert found("numpy").state == "ok"
    assert found("no-such-package") == Finding(
        "no-such-package", "not installed", "missing", "pip install no-such-package"
    )
    extra = found("no-such-extra")
    assert extra.state == "note"
    assert extra.fix == "pip install 'sputnik[gym]'  (for riddles)"
    assert sputnik(["doctor", "--quick"]) == 1
    assert "missing: 1" in capsys.readouterr().out


def test_old_torch_is_missing_the_kernels_we_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("torch build").state == "ok"
    monkeypatch.setattr(doctor, "OLDEST_TORCH", (99, 0))
    assert found("torch build").state == "missing"


def test_little_memory_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEMORY_NEEDED", 1 << 60)
    assert found("memory").state == "note"


def test_processor_is_measured_unless_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPUTNIK_CACHE", str(tmp_path))
    monkeypatch.setattr("sputnik.hardware.SECONDS_PER_RATE", 0.01)
    monkeypatch.setattr("sputnik.hardware.READ_BYTES", 1 << 20)
    assert not any("GFLOP/s" in finding.found for finding in examine(DoctorConfig(quick=True)))
    assert not (tmp_path / "cpu.json").exists()
    assert any("GFLOP/s" in finding.found for finding in examine(DoctorConfig()))
    assert (tmp_path / "cpu.json").exists()


def test_a_cache_that_cannot_be_written_is_missing_and_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPUTNIK_CACHE", str(tmp_path / "file" / "cache"))
    assert sputnik(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "SPUTNIK_CACHE" in said and "missing: 1" in said and "GFLOP/s" not in said


@pytest.mark.parametrize(("bf16", "fp32", "faster"), [(1e11, 2e11, "fp32"), (4e11, 2e11, "bf16")])
def test_a_slow_bf16_asks_nothing_of_the_user(
    bf16: float, fp32: float, faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default precision already takes the faster one, and the doctor says which."""
    speed = CpuSpeed("Xeon", 2, 1 << 34, bf16, fp32, 1e10)
    monkeypatch.setattr(doctor, "measure_cpu", lambda refresh: speed)
    finding = next(finding for finding in examine(DoctorConfig()) if finding.what == "Xeon")
    assert finding.state == "ok" and finding.fix == "" and finding.found.endswith(f'precision = "auto" takes {faster}')
    monkeypatch.setattr("sputnik.hardware.measure_cpu", lambda: speed)
    resolve_precision.cache_clear()
    assert resolve_precision("auto") == faster
    resolve_precision.cache_clear()
