"""The committed claims: every one can be decided, says what it costs, and runs through at toy size."""

import json
import re
from pathlib import Path

import pytest

from sputnik.__main__ import main
from sputnik.recipe.findings import Card, Source, read_card
from sputnik.recipe.findings_page import page
from sputnik.recipe.stages import kind_of
from sputnik.tasks.base import load_task, self_check
from sputnik.text.quality import language_share

ROOT = Path(__file__).parent.parent.parent
CARD = ROOT / "recipes/findings.toml"
TOY = {
    "corpus": {"texts": '["python-topics"]', "tokens": 150_000, "vocab_size": 700, "examples": 800},
    "pretrain": {"tokens": 24_000, "length": 128, "batch": 8, "held_out_rows": 4, "evaluations": 2},
    "rl": {"steps": 2, "prompts_per_step": 4, "samples_per_prompt": 4, "eval_questions": 4, "eval_samples": 1},
    "traces": {"questions": 200, "samples": 8},
    "sft": {"epochs": 1, "batch": 4},
    "eval": {"questions": 6, "samples": 2},
    "speed": {"questions": 2, "rounds": 1},
    "readability": {},
}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    monkeypatch.chdir(ROOT)
    return read_card(CARD)


def source(name: str) -> Source:
    return next(source for source in read_card(CARD).sources if source.name == name)


def test_every_claim_reads_stages_that_are_there(card: Card) -> None:
    for each in card.sources:
        recipe = each.recipe(0, kind_of)
        assert recipe.hardware == "cpu"
        unused = {stage.name for stage in recipe.stages} - {stage.name for stage in each.stages(recipe, 0)}
        assert not unused, f"{each.name}: no claim reads {unused}"


def test_every_recipe_is_in_the_card() -> None:
    listed = {each.path.name for each in read_card(CARD).sources}
    assert listed == {path.name for path in (ROOT / "recipes/findings").glob("*.toml")}


def test_what_a_seed_takes_stands_in_the_head_of_its_recipe() -> None:
    for each in read_card(CARD).sources:
        head = re.sub(r"\s*#\s*", " ", each.path.read_text().split("\nname =")[0])
        (minutes,) = re.findall(r"[Aa]bout (\d+) minutes a seed", head)
        assert int(minutes) == pytest.approx(each.minutes(0), abs=1), each.name


def test_claims_are_sentences_with_a_source() -> None:
    for each in read_card(CARD).sources:
        for claim in each.claims:
            assert claim.text[0].isupper() and not claim.text.endswith("."), claim.name
            assert re.match(r"(V2|V3|R1|ISCA|DeepSeek-R1's model card)", claim.source) and claim.published, claim.name


def test_the_committed_card_is_of_these_claims() -> None:
    facts = json.loads((ROOT / "docs/findings.json").read_text())
    assert (ROOT / "docs/findings.md").read_text() == page(facts)
    claims = {claim.name: (each, claim) for each in read_card(CARD).sources for claim in each.claims}
    assert [row["claim"] for row in facts["claims"]] == list(claims)
    for row in facts["claims"]:
        each, claim = claims[row["claim"]]
        assert row["rule"] == json.loads(json.dumps(claim.rule)) and (ROOT / row["recipe"]) == each.path
        assert set(row) >= {"claim", "source", "ours", "interval", "seeds", "reproduced", "recipe"}
        assert row["seeds"] == claim.seeds >= 3 or row["reproduced"] == "incomplete"


def test_the_bilingual_task_is_sound_and_mixes_languages(card: Card) -> None:
    task = load_task("recipes/findings/tongues.py", {"non_negative": True})
    self_check(task)
    shown = task.demonstrations(2000, 0)
    shares = {
        style: [language_share(each.thinking or "", "en") for each in shown if each.style == style]
        for style in ("english", "chinese", "mixed")
    }
    assert set(shares["english"]) == {1.0} and set(shares["chinese"]) == {0.0}
    assert 0.2 < sum(shares["mixed"]) / len(shares["mixed"]) < 0.8
    right = [each.correct for each in shown if each.style in shares]
    assert 0.7 < sum(right) / len(right) < 0.95


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "recipes/findings").glob("*.toml"))])
def test_at_toy_size_every_claim_finds_its_numbers(name: str, tmp_path: Path, card: Card) -> None:
    each = next(each for each in card.sources if each.name == name)
    overrides = ["seeds=1"]
    for stage in each.recipe(0, kind_of).stages:
        for key, value in TOY[stage.kind].items():
            if key == "samples" and stage.settings.get("temperature") == 0:
                continue
            if (key, stage.settings.get("task")) != ("examples", ""):
                overrides.append(f"{name}.{stage.name}.{key}={value}")
    if name == "pipeline":  # a base model that answers now and then, or there is nothing to sample
        overrides += ["pipeline.tasks.sums.task_options.terms=[2, 3]", "pipeline.corpus.tokens=300_000"]
        overrides += [
            f"pipeline.{stage}.{each}" for stage in ("base", "student") for each in ("tokens=200_000", "lr=5e-3")
        ]
    args = [part for each in overrides for part in ("--set", each)]
    assert main(["run", str(CARD), "--only", name, "--name", "toy", "--runs", str(tmp_path), *args]) == 0
    facts = json.loads((tmp_path / "toy/findings.json").read_text())
    rows = [row for row in facts["claims"] if Path(row["recipe"]).stem == name]
    assert [(row["claim"], row["missing"]) for row in rows if row["seeds"] != 1] == []
