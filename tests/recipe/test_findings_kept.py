"""What a card keeps of runs that are gone."""

import json
import shutil
from pathlib import Path

import pytest

from sputnik.__main__ import main
from sputnik.errors import ConfigError, DataError
from tests.recipe.test_findings import finished, once, rows, run

__all__ = ["finished", "once"]


def test_what_the_card_says_of_seeds_whose_runs_are_gone_stays(finished: Path) -> None:
    """One who redoes a claim seldom has the runs of the others."""
    before = json.loads((finished / "docs/findings.json").read_text())
    plot = (finished / "docs/findings-plots/two-grows.svg").read_bytes()
    shutil.rmtree(finished / "runs")
    facts, _ = run(finished, only=["one"], seeds=[1])
    found, old = rows(facts), rows(before)
    assert facts["summary"] == before["summary"] and facts["hardware"] and facts["code"]
    assert [found[name]["kept"] for name in found] == [[0, 2], [0, 2], [0, 1, 2], [0, 1, 2]]
    for name, row in found.items():
        assert sorted(row["values"], key=lambda v: v["seed"]) == old[name]["values"] and row["missing"] == []
        assert (row["interval"], row["show"]) == (old[name]["interval"], old[name]["show"])
    assert "The curves are of seeds 1." in (finished / "docs/findings.md").read_text()
    for place in ("docs", "runs/card"):
        assert (finished / place / "findings-plots/two-grows.svg").read_bytes() == plot
    assert [(cost["recipe"], cost["seeds"]) for cost in facts["runs"]] == [
        ("recipes/one.toml", [0, 1, 2]),
        ("recipes/one.toml", [1]),
        ("recipes/two.toml", [0, 1, 2]),
    ]
    again, _ = run(finished, only=["one"], seeds=[1])
    assert again == facts


def test_what_was_made_with_other_settings_or_measured_otherwise_does_not_stay(finished: Path) -> None:
    shutil.rmtree(finished / "runs")
    text = (finished / "recipes/one.toml").read_text().replace("value = 9.0", "value = 8.0")
    (finished / "recipes/one.toml").write_text(text.replace("above = 0.5", "above = 2.5"))
    facts, _ = run(finished, only=["two"], seeds=[0])
    found = rows(facts)
    assert found["one-grows"]["missing"] == [f"seed {seed}: not run" for seed in range(3)]
    assert found["one-higher"]["kept"] == [0, 1, 2] and found["one-higher"]["reproduced"] == "no"
    assert found["one-higher"]["rule_changed"] == ["above"]


def test_a_run_at_hand_counts_though_it_failed(finished: Path) -> None:
    shutil.rmtree(finished / "runs")
    recipe = finished / "recipes/one.toml"
    recipe.write_text(recipe.read_text().replace("value = 2.0", "value = 2.0\nfail_at_seed = 1"))
    with pytest.raises(DataError, match="one seed 1"):
        run(finished, only=["one"])
    found = rows(json.loads((finished / "docs/findings.json").read_text()))
    assert found["one-higher"]["missing"] == ["seed 1: second not run"] and found["one-higher"]["kept"] == []


@pytest.mark.parametrize("seeds", [[3], [-1]])
def test_a_seed_nobody_asks_for_is_refused(finished: Path, seeds: list[int]) -> None:
    with pytest.raises(ConfigError, match="no claim asks for it"):
        run(finished, seeds=seeds)


def test_seeds_of_a_recipe_that_is_no_card_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "recipes/sft.toml", "--seeds", "1"]) != 0
    assert "--set seed=N" in capsys.readouterr().err
    assert main(["run", "recipes/findings.toml", "--seeds", "x", "--runs", str(tmp_path)]) != 0
    assert "with commas between" in capsys.readouterr().err
