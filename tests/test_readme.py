"""The README and the docs say only what is so: commands exist, links and files resolve, figures are those of a run."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from sputnik.__main__ import VERBS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "LOG.md", ROOT / "LEADERBOARD.md", *sorted((ROOT / "docs").glob("*.md"))]


def readme_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_targets_of_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.MULTILINE)}
    assert {"quickstart", "test", "check", "slow", "bench"} <= named <= targets


def test_every_verb_is_in_the_readme_and_every_verb_of_the_docs_exists() -> None:
    assert set(re.findall(r"\| `sputnik ([\w-]+)", README)) == set(VERBS)
    named = {verb for page in PAGES for verb in re.findall(r"`(?:\.venv/bin/)?sputnik ([a-z-]+)", page.read_text())}
    assert named <= set(VERBS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    named = re.findall(r"`((?:sputnik|tests|recipes|scripts|examples|benchmarks)/[\w/.-]+)`", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = README.split("sputnik/\n", 1)[1].split("```", 1)[0]
    folders = {path.parent.name for path in (ROOT / "sputnik").glob("*/__init__.py")}
    assert folders == set(re.findall(r"(\w+)/", tree)) - {"recipes", "benchmarks", "examples", "tests"}


def test_figures_and_transcript_are_those_of_the_committed_run() -> None:
    script = readme_script()
    if not script.FACTS.is_file():
        pytest.skip("no committed run yet: python scripts/readme.py runs/quickstart")
    assert script.render(README, json.loads(script.FACTS.read_text(encoding="utf-8"))) == README


def test_transcript_and_figures_are_written_between_their_markers() -> None:
    script = readme_script()
    score = {"mean": 0.25, "low": 0.2, "high": 0.3, "n": 200, "k": 8}
    facts = {
        "headline": {"base_pass_at_1": score, "zero_pass_at_1": score, "seconds": 600.0, "price_usd": 0.0167},
        "transcript": [{"question": "1 + 2?", "thought": "1 + 2 = 3", "answer": "3"}],
    }
    text = script.render(README, facts)
    assert "> 1 + 2?\n| 1 + 2 = 3\n3\n" in text
    assert "25.0 % [20.0, 30.0]" in text and "10 minutes" in text and "$0.02" in text
    assert text.startswith("# Sputnik") and text.endswith(README[-200:])
