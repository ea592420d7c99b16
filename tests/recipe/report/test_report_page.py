"""The page in a real browser: it runs its own script under its own policy, logs no error and fits a phone."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sputnik.recipe.report import ReportPaths

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--dump-dom",
)  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; install it to test the page")


def browse(page: Path, profile: Path, width: int) -> tuple[str, list[str]]:
    """The document as the browser has it, and what its console said."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},2000", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_browser_runs_our_script_and_logs_nothing(finished: ReportPaths, tmp_path: Path) -> None:
    assert "data-controls hidden" in finished.html.read_text(encoding="utf-8")
    document, console = browse(finished.html, tmp_path / "profile", 1200)
    assert console == []
    assert document.count("<svg") == 20 and 'class="controls" data-controls=""' in document
    assert 'data-controls="" hidden' not in document  # only the page's own script shows the controls


def test_page_fits_a_phone(finished: ReportPaths, tmp_path: Path) -> None:
    measure = "<script>document.title = `${innerWidth} ${document.documentElement.scrollWidth}`</script></body>"
    source = finished.html.read_text(encoding="utf-8")
    probe = tmp_path / "probe.html"
    probe.write_text(source.replace("Content-Security-Policy", "off").replace("</body>", measure), encoding="utf-8")
    document, _ = browse(probe, tmp_path / "profile", 360)
    shown, needed = document.split("<title>")[1].split("</title>")[0].split()
    assert int(needed) <= int(shown) <= 500
