"""The findings card: rules that decide, runs that resume, a page that hides nothing. Stages here write one number."""

import io
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import xml.dom.minidom
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sputnik.errors import ConfigError, DataError
from sputnik.recipe.findings import read_card, run_card
from sputnik.recipe.findings_claim import Claim, Metric, decide, t_interval
from sputnik.recipe.findings_page import page, write_card
from sputnik.recipe.recipe import Kind, read_recipe
from sputnik.recipe.runner import StageContext

RECIPE = """
hardware = "cpu"

[[claim]]
name = "{name}-higher"
text = "The second is higher"
source = "V3 0.0"
ours = "second/value.json: deep.0.value"
against = "first/lineage: result.value"
above = {above}
minutes = 1

[[claim]]
name = "{name}-grows"
text = "It grows"
source = "R1 0.0"
ours = "third/metrics.jsonl: length"
compare = "value"
above = 6.0
tail = 0.5
labels = ["", "third"]
curves = ["third/metrics.jsonl: length"]
show = {{ "last length" = "third/metrics.jsonl: length" }}
note = "A toy."

[[stage]]
name = "first"
kind = "number"
value = 1.0

[[stage]]
name = "second"
kind = "number"
value = 2.0

[[stage]]
name = "third"
kind = "number"
parent = ""
value = 9.0
"""


@dataclass(frozen=True)
class NumberConfig:
    value: float = 0.0
    fail_at_seed: int = -1
    seed: int = 0


def write_number(config: NumberConfig, context: StageContext) -> dict[str, Any]:
    if config.seed == config.fail_at_seed:
        raise DataError("the text is not UTF-8: convert it")
    value = config.value + random.Random(config.seed).uniform(-0.1, 0.1)
    (context.directory / "value.json").write_text(json.dumps({"deep": [{"value": value}], "text": "x"}))
    lines = [json.dumps({"step": step, "length": config.value * step / 10}) + "\n" for step in range(11)]
    (context.directory / "metrics.jsonl").write_text("".join(lines) + '{"step": 11, "len')
    return {"value": value}


KINDS = {"number": Kind(NumberConfig, write_number)}


def make(folder: Path, names: tuple[str, ...] = ("one", "two"), above: float = 0.5) -> Path:
    recipes = folder / "recipes"
    recipes.mkdir(exist_ok=True)
    for name in names:
        (recipes / f"{name}.toml").write_text(RECIPE.format(name=name, above=above))
    listed = ", ".join(f'"{name}.toml"' for name in names)
    (recipes / "card.toml").write_text(f'name = "card"\nout = "../docs"\nrecipes = [{listed}]\n')
    return recipes / "card.toml"


def run(folder: Path, *overrides: str, **options: Any) -> tuple[dict[str, Any], str]:
    """(findings.json of the run directory, what the user saw)."""
    seen = io.StringIO()
    card = read_card(folder / "recipes/card.toml", overrides, options.pop("name", None))
    run_card(card, folder / "runs", KINDS.__getitem__, Console(file=seen, width=200), write_card, **options)
    return json.loads((folder / "runs" / card.name / "findings.json").read_text()), seen.getvalue()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A card that has been run, its JSON, and what the user saw."""
    folder = tmp_path_factory.mktemp("once")
    make(folder)
    return folder, *run(folder)


@pytest.fixture
def finished(once: tuple[Path, dict[str, Any], str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(once[0], tmp_path / "copy"))


def rows(facts: dict[str, Any]) -> dict[str, Any]:
    return {row["claim"]: row for row in facts["claims"]}


def claim(**changes: Any) -> Claim:
    values = {"name": "c", "text": "C", "source": "V3", "ours": "a/x.json: y", "against": "b/x.json: y", "above": 0.0}
    return Claim(**(values | changes))


# --- the rule ---


def test_the_interval_is_students() -> None:
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), rel=1e-3)
    assert t_interval([5.0]) is None
    rng = random.Random(0)
    for seeds in (3, 5):
        inside = 0
        for _ in range(4000):
            low, high = t_interval([rng.gauss(1, 2) for _ in range(seeds)]) or (0.0, 0.0)
            inside += low < 1 < high
        assert 0.94 < inside / 4000 < 0.96


@pytest.mark.parametrize(
    ("values", "above", "below", "answer"),
    [
        ([1.0, 1.1, 0.9], 0.0, None, "yes"),
        ([-1.0, -1.1, -0.9], 0.0, None, "no"),
        ([1.0, -0.5, 0.9], 0.0, None, "could not tell"),
        ([1.0, 1.1, 0.9], None, 2.0, "yes"),
        ([1.0, 1.1, 0.9], None, 0.5, "no"),
        ([0.001, 0.0011, 0.0009], -0.0025, 0.0025, "yes"),
        ([0.01, 0.011, 0.009], -0.0025, 0.0025, "no"),
        ([0.0024, 0.0026, 0.0025], -0.0025, 0.0025, "could not tell"),
        ([0.0, 0.0, 0.0], 0.0, None, "no"),
        ([1.0, 1.0, 1.0], 0.0, None, "yes"),
        ([1.0, 1.1], 0.0, None, "incomplete"),
        ([], 0.0, None, "incomplete"),
    ],
)
def test_the_rule_has_three_answers(values: list[float], above: float | None, below: float | None, answer: str) -> None:
    assert decide(claim(above=above, below=below), values) == answer


def test_no_effect_is_rarely_taken_for_one() -> None:
    rng = random.Random(1)
    answers = [decide(claim(), [rng.gauss(0, 1) for _ in range(3)]) for _ in range(4000)]
    assert 0.015 < answers.count("yes") / 4000 < 0.035


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ours": "a.json y"}, 'write "STAGE/FILE: KEY.KEY"'),
        ({"ours": "a/x.txt: y"}, 'write "STAGE/FILE: KEY.KEY"'),
        ({"above": None}, "no rule"),
        ({"above": 1.0, "below": 0.5}, "leaves nothing"),
        ({"against": ""}, "goes with `against`"),
        ({"compare": "value"}, "goes without `against`"),
        ({"seeds": 2}, "seeds >= 3"),
    ],
)
def test_a_claim_nobody_could_decide_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        claim(**change)
    assert "\n" not in str(error.value)


# --- reading the runs ---


def test_metrics_find_their_numbers(tmp_path: Path) -> None:
    stage = tmp_path / "a"
    stage.mkdir()
    (stage / "x.json").write_text('{"list": [{"y": 1, "at": 10}, {"y": 5, "at": 20}], "text": "7"}')
    (stage / "m.jsonl").write_text("".join(json.dumps({"step": n, "v": n if n % 2 else None}) + "\n" for n in range(9)))
    (tmp_path / "lineage.json").write_text('{"stages": [{"name": "a", "seconds": 3.5}]}')

    def value(text: str, tail: float = 0.0) -> float:
        return Metric.parse(text, "here").value(tmp_path, tail)

    assert value("a/x.json: list.1.y") == value("a/x.json: list.-1.y") == 5
    assert value("a/lineage: seconds") == 3.5
    assert value("a/m.jsonl: v") == 7 and value("a/m.jsonl: v", 0.5) == 6 and value("a/m.jsonl: v", 1.0) == 4
    assert Metric.parse("a/x.json: list.*.y", "here").curve(tmp_path, "list.*.at") == [(10, 1), (20, 5)]
    for broken in ("a/x.json: list.2.y", "a/x.json: text", "a/y.json: y", "a/m.jsonl: w", "b/lineage: seconds"):
        with pytest.raises(DataError):
            value(broken)


def test_sides_are_compared_as_told(tmp_path: Path) -> None:
    for stage, number in (("a", 6.0), ("b", 4.0)):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "x.json").write_text(json.dumps({"y": number}))
    found = {how: claim(compare=how).measure(tmp_path) for how in ("difference", "change", "ratio")}
    assert found == {"difference": (6, 4, 2), "change": (6, 4, 0.5), "ratio": (6, 4, 1.5)}
    assert claim(compare="value", against="").measure(tmp_path) == (6, None, 6)


# --- whole cards ---


def test_a_card_says_what_every_claim_came_to(once: tuple[Path, dict[str, Any], str]) -> None:
    folder, facts, seen = once
    found = rows(facts)
    assert list(found) == ["one-higher", "one-grows", "two-higher", "two-grows"]
    higher = found["one-higher"]
    assert (
        higher["rule_changed"] == []
        and higher["reproduced"] == "yes"
        and higher["seeds"] == 3
        and higher["recipe"] == "recipes/one.toml"
    )
    assert higher["ours"] == pytest.approx(1.0) and higher["interval"] == pytest.approx([1.0, 1.0])
    assert [value["seed"] for value in higher["values"]] == [0, 1, 2]
    assert len({value["ours"] for value in higher["values"]}) == 3
    assert found["one-grows"]["ours"] == pytest.approx(statistics.fmean([4.5, 5.4, 6.3, 7.2, 8.1, 9.0]))
    assert found["one-grows"]["show"] == {"last length": 9.0}
    assert facts["summary"] == {"yes": 4, "no": 0, "could not tell": 0, "incomplete": 0}
    assert facts["seconds"] >= 0 and facts["usd"] >= 0 and facts["code"] and facts["hardware"]
    assert "6 runs, about 6 min 00 s" in seen and "(6 of 6)" in seen and "left" in seen
    for place in (folder / "docs", folder / "runs/card"):
        assert (place / "findings.md").read_text() == page(json.loads((place / "findings.json").read_text()))
        plots = sorted(path.name for path in (place / "findings-plots").iterdir())
        assert plots == sorted([*(f"{name}.svg" for name in found), "overview.svg"])
        for plot in plots:
            xml.dom.minidom.parse(str(place / "findings-plots" / plot))
            assert f"findings-plots/{plot}" in (place / "findings.md").read_text()


def test_running_again_does_nothing_and_writes_the_same_card(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    _, seen = run(finished)
    assert "so far" not in seen
    assert before == {path: path.read_bytes() for path in before}


def test_only_what_a_claim_reads_is_run(tmp_path: Path) -> None:
    make(tmp_path)
    facts, _ = run(tmp_path, only=["one-grows"])
    assert {path.name for path in (tmp_path / "runs/card/one/seed-0").iterdir() if path.is_dir()} == {"third"}
    assert not (tmp_path / "runs/card/two").exists()
    found = rows(facts)
    assert found["one-grows"]["reproduced"] == "yes"
    assert found["one-higher"]["missing"] == [f"seed {seed}: second not run" for seed in range(3)]
    assert found["two-grows"]["missing"] == [f"seed {seed}: not run" for seed in range(3)]
    facts, _ = run(tmp_path)
    assert facts["summary"]["yes"] == 4
    with pytest.raises(ConfigError, match="no such claim or recipe; there are one, one-higher"):
        run(tmp_path, only=["three"])


def test_a_quick_look_decides_nothing_and_stays_out_of_the_docs(tmp_path: Path) -> None:
    make(tmp_path)
    facts, _ = run(tmp_path, "seeds=2", name="trial")
    assert facts["summary"] == {"yes": 0, "no": 0, "could not tell": 0, "incomplete": 4}
    assert rows(facts)["one-higher"]["seeds"] == 2 and not (tmp_path / "docs").exists()
    run(tmp_path, "seeds=1", f"out={tmp_path / 'here'}", name="other", only=["one-grows"])
    assert (tmp_path / "here/findings.md").is_file()


def test_one_that_fails_stops_no_other_and_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=r"1 of 6 runs failed \(one seed 1\)"):
        run(tmp_path, "one.second.fail_at_seed=1", name="broken")
    found = rows(json.loads((tmp_path / "runs/broken/findings.json").read_text()))
    assert found["one-higher"]["reproduced"] == "incomplete" and found["one-higher"]["seeds"] == 2
    assert found["one-higher"]["missing"] == ["seed 1: second not run"]
    assert found["two-higher"]["reproduced"] == "yes"
    text = (tmp_path / "runs/broken/findings.md").read_text()
    assert "missing: seed 1: second not run" in text


def test_other_settings_are_refused_with_a_way_out_that_works(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"value 2.0 -> 5.0.*--fresh one\.second"):
        run(finished, "one.second.value=5.0")
    facts, _ = run(finished, "one.second.value=5.0", fresh="one.second")
    assert rows(facts)["one-higher"]["ours"] == pytest.approx(4.0)
    facts, _ = run(finished, fresh="one")
    assert rows(facts)["one-higher"]["ours"] == pytest.approx(1.0)


def test_a_rule_changed_after_the_run_is_marked(finished: Path) -> None:
    make(finished, above=0.999)
    facts, _ = run(finished)
    assert rows(facts)["one-higher"]["rule_changed"] == ["above"]
    assert "the rule was changed after runs had begun: above" in (finished / "docs/findings.md").read_text()


def test_a_card_of_nothing_run_shows_its_rules(tmp_path: Path) -> None:
    path = make(tmp_path)
    card = read_card(path)
    text = write_card(card, tmp_path / "runs/none", KINDS.__getitem__).read_text()
    assert "Nothing has been run yet" in text and "| above +0.5 | … incomplete |" in text


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("recipes = []", [], "recipes must be a list"),
        ('recipes = ["none.toml"]', [], "no such file"),
        ('recipes = ["one.toml", "one.toml"]', [], "two recipes or claims are called"),
        ('recipe = ["one.toml"]', [], "unknown key 'recipe'"),
        ('recipes = ["one.toml"]', ["three.second.value=1"], "no recipe 'three'"),
        ('recipes = ["one.toml"]', ["seeds=0"], "a whole number"),
        ('recipes = ["one.toml"]', ["sedes=1"], "unknown key 'sedes'; did you mean 'seeds'?"),
        ('recipes = ["plain.toml"]', [], "no claims"),
    ],
)
def test_mistakes_in_a_card_are_one_line(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    make(tmp_path)
    (tmp_path / "recipes/plain.toml").write_text('[[stage]]\nname = "a"\nkind = "number"\n')
    (tmp_path / "recipes/card.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read_card(tmp_path / "recipes/card.toml", overrides)
    assert "\n" not in str(error.value)


def test_a_claim_about_a_stage_that_is_not_there_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = make(tmp_path)
    one = tmp_path / "recipes/one.toml"
    one.write_text(one.read_text().replace("second/value", "secnod/value"))
    with pytest.raises(ConfigError, match="claim 'one-higher' reads secnod/value.json: deep.0.value: no such stage"):
        run(tmp_path)
    assert not (tmp_path / "runs").exists() and path.is_file()


def test_a_recipe_with_claims_is_an_ordinary_recipe(tmp_path: Path) -> None:
    make(tmp_path)
    recipe = read_recipe(tmp_path / "recipes/one.toml", KINDS.__getitem__)
    assert [stage.name for stage in recipe.stages] == ["first", "second", "third"]


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_findings as t
def slow(config, context):
    if context.recipe.name == "seed-1" and context.directory.name.strip(".").startswith("second"):
        print("working", flush=True)
        time.sleep(60)
    return t.write_number(config, context)
t.KINDS["number"] = t.Kind(t.NumberConfig, slow)
t.run(Path(sys.argv[2]))
"""


def test_killed_in_the_middle_the_same_command_goes_on(tmp_path: Path) -> None:
    make(tmp_path)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    for doomed in ("one", "one.second"):
        with pytest.raises(DataError, match=rf"seed-1 is in use by process {process.pid}"):
            run(tmp_path, fresh=doomed)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    run_folder = tmp_path / "runs/card"
    kept = {path: path.stat().st_mtime_ns for path in run_folder.glob("one/seed-*/*/value.json")}
    assert {str(path.relative_to(run_folder)) for path in kept} == {
        *(f"one/seed-0/{stage}/value.json" for stage in ("first", "second", "third")), "one/seed-1/first/value.json",
    }  # fmt: skip
    assert rows(json.loads((run_folder / "findings.json").read_text()))["one-higher"]["seeds"] == 1
    facts, seen = run(tmp_path)
    assert facts["summary"]["yes"] == 4 and seen.count("so far") == 18 - 4
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
