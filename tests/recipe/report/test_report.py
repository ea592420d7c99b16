"""The page says what the JSON says, loads nothing, keeps hostile text text, claims no more than the intervals allow."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sputnik.cost import parameters
from sputnik.errors import DataError
from sputnik.eval.stats import paired
from sputnik.model.config import ModelConfig
from sputnik.recipe.evidence import Stage, column, read_run
from sputnik.recipe.report import ReportPaths, write_report

HOSTILE = (
    '</pre></p></svg></style></script><script>alert("owned")</script><img src=x onerror=alert(1)>{{ 7*7 }} \u202e &'
)
Edit = Callable[[Path, Callable[[Any], None]], None]


class Page(HTMLParser):
    """Tags with their attributes, and the text a reader sees."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._inside == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, *names: str) -> list[str]:
        return [value for _, attrs in self.tags for name, value in attrs.items() if name in names and value]


def facts(paths: ReportPaths) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(paths.json.read_text())
    return loaded


def test_headline_of_the_page_is_the_headline_of_the_json(finished: ReportPaths) -> None:
    page, headline = Page(finished.html), facts(finished)["headline"]
    shown = [float(value) for value in page.values("data-value")]
    assert shown == [headline["base_pass_at_1"]["mean"], headline["zero_pass_at_1"]["mean"]]
    assert set(headline["zero_pass_at_1"]) == {"mean", "low", "high", "n", "k"}
    assert headline["seconds"] == pytest.approx(21 + 512 + 88 + 1790 + 131 + 240)  # 240 of a stage made again
    assert headline["price_usd"] == pytest.approx((headline["seconds"] - 240) * 0.10 / 3600 + 0.0067)
    for words in ("10.1%", "71.8%", "46\u00a0min", "$0.077"):
        assert words.replace("\u00a0", " ") in page.text.replace(" %", "%"), words


def test_scores_of_the_json_are_those_of_the_evaluations(finished: ReportPaths) -> None:
    written = facts(finished)["scores"]["zero-eval"]
    recorded = json.loads((finished.json.parent / "zero-eval/eval.json").read_text())
    assert written == {"of": "zero", **{key: recorded[key] for key in recorded if key not in ("samples", "questions")}}


def test_page_asks_for_nothing_and_runs_no_script_but_its_own(finished: ReportPaths) -> None:
    page = Page(finished.html)
    assert all(link.startswith(("#", "data:,")) for link in page.values("href", "src", "xlink:href", "action", "data"))
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", page.source)
    policy = next(value for value in page.values("content") if "default-src" in value)
    assert policy.startswith("default-src 'none';")
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_ids_are_unique_and_every_reference_has_a_target(finished: ReportPaths) -> None:
    page = Page(finished.html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = [link[1:] for link in page.values("href") if link.startswith("#")] + page.values("aria-labelledby")
    references += re.findall(r"url\(#([^)]+)\)", page.source)
    assert set(references) <= set(ids)


def test_every_figure_has_a_heading_an_alternative_text_and_a_caption(finished: ReportPaths) -> None:
    tags = [tag for tag, _ in Page(finished.html).tags]
    figures = tags.count("figure")
    drawn = [attrs for _, attrs in Page(finished.html).tags if attrs.get("class") == "plot"]
    assert figures == len(drawn) == tags.count("figcaption") == 18
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawn)


def test_published_costs_are_labelled_and_as_published(finished: ReportPaths) -> None:
    published = {row["h800_hours"]: row["usd"] for row in facts(finished)["cost"]["published"]}
    assert published == {2_788_000: 5_576_000, 101_000: 202_000, 147_000: 294_000}
    assert "DeepSeek’s published figures for their models, not for this run" in Page(finished.html).text


def test_attempts_that_no_stage_stands_on_are_in_the_sum_and_told_apart(finished: ReportPaths) -> None:
    cost = facts(finished)["cost"]
    assert cost["discarded"] == {"seconds": 240.0, "usd": 0.0067}
    for key, lost in cost["discarded"].items():
        assert cost["total"][key] == pytest.approx(lost + sum(row[key] or 0 for row in cost["stages"]))
    text = Page(finished.html).text
    assert "4 min of it for attempts thrown away" in text and "attempts thrown away 4 min $0.0067" in text


def test_tokens_and_flops_are_those_of_the_steps(finished: ReportPaths) -> None:
    rows = {row["stage"]: row for row in facts(finished)["cost"]["stages"]}
    metrics = read_run(finished.json.parent).stages[3].metrics
    assert rows["zero"]["flops"] == pytest.approx(1.3e11 * 7.1 * 240)
    assert rows["zero"]["tokens"] == pytest.approx(sum(512 * row["length"] for row in metrics[1:]))
    assert rows["base"]["tokens"] == 600 * 16_384
    assert rows["corpus"]["flops"] is None


def test_answers_to_open_prompts_are_tokens_too() -> None:
    row = {"length": 10.0, "verdicts": {"correct": 3, "wrong": 1}}
    opened = {**row, "general_length": 7.0, "general_answers": 2}
    assert Stage("r1", "rl", Path("r1"), metrics=(row, opened)).tokens == 2 * 40 + 14


def test_model_is_counted_from_its_checkpoint(finished: ReportPaths) -> None:
    count = parameters(ModelConfig.preset("tiny"))
    model = facts(finished)["model"]
    assert (model["type"], model["parameters"], model["active"]) == ("deepseek_v3", count.total, count.active)


def test_alarms_of_training_stand_beside_the_headline(bare: Path) -> None:
    (bare / "zero/alarms").mkdir()
    for step in (120, 9, 30, 70):
        alarm = {"message": f"entropy fell at step {step}", "action": "warn", "metrics": {"step": step}}
        (bare / f"zero/alarms/step-{step}.json").write_text(json.dumps(alarm))
    assert facts(write_report(bare))["warnings"] == [
        *(f"zero, alarm: entropy fell at step {step} (action: warn)" for step in (9, 30, 70)),
        "zero: 1 more alarms in zero/alarms",
    ]


def test_hostile_text_stays_text(bare: Path, edit_json: Edit) -> None:
    def poison(value: Any) -> None:
        value.update(task=HOSTILE, warnings=[HOSTILE], best_constant={"answer": HOSTILE, "accuracy": 0.1})
        for sample in value["samples"]:
            sample |= dict.fromkeys(("prompt", "thinking", "answer", "gold", "verdict"), HOSTILE)

    clean = Page(write_report(bare).html)
    for name in ("base-eval", "zero-eval"):
        edit_json(bare / name / "eval.json", poison)
    edit_json(bare / "lineage.json", lambda value: value.update(environment={HOSTILE: HOSTILE}))
    (bare / "recipe.toml").write_text(f"# {HOSTILE}\n{(bare / 'recipe.toml').read_text()}")
    rollouts = [json.loads(line) for line in (bare / "zero/rollouts.jsonl").read_text().splitlines()]
    for rollout in rollouts:
        rollout |= dict.fromkeys(("prompt", "thinking", "answer", "gold", "verdict", "finish", "detail"), HOSTILE)
        rollout |= {"rewards": {HOSTILE: 1.0}, "advantage": HOSTILE, "length": 3}
    (bare / "zero/rollouts.jsonl").write_text("".join(json.dumps(rollout) + "\n" for rollout in rollouts))
    page = Page(write_report(bare).html)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags}
    assert page.scripts == clean.scripts
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert page.text.count(HOSTILE) > 50


def test_text_that_is_no_unicode_can_be_written(bare: Path, edit_json: Edit) -> None:
    def tear(value: Any) -> None:
        for sample in value["samples"]:
            sample["thinking"] = "half a pair: \ud800"

    edit_json(bare / "zero-eval/eval.json", tear)
    assert "half a pair: ?" in Page(write_report(bare).html).text


def test_gain_is_paired_by_question(bare: Path) -> None:
    before, after = (
        dict(json.loads((bare / name / "eval.json").read_text())["questions"]) for name in ("base-eval", "zero-eval")
    )
    expected = paired([before[question] for question in after], list(after.values()), 8)
    gain = facts(write_report(bare))["gain"]
    assert (gain["mean"], gain["low"], gain["high"]) == (expected.mean, expected.low, expected.high)


def add_model(run: Path, edit_json: Edit, name: str, kind: str, parent: str, like: str) -> None:
    """A further model and its evaluation, scores copied from another's."""
    for stage, of, below in ((name, kind, parent), (f"{name}-eval", "eval", name)):
        record = {"name": stage, "kind": of, "parent": below, "hash": stage, "status": "done", "seconds": 1, "usd": 0.1}
        edit_json(run / "lineage.json", lambda value, record=record: value["stages"].append(record))
        (run / stage).mkdir()
    score = json.loads((run / like / "eval.json").read_text())
    score["families"] = {"sums": score["pass_at_1"], "<b>gcd</b>": score["cons_at_k"]}
    (run / f"{name}-eval/eval.json").write_text(json.dumps(score))


def test_three_models_or_more_are_told_stage_by_stage_against_what_they_were_made_from(
    bare: Path, edit_json: Edit
) -> None:
    assert facts(write_report(bare))["models"] == []
    add_model(bare, edit_json, "dev1", "sft", "base", like="zero-eval")
    add_model(bare, edit_json, "dev2", "rl", "dev1", like="zero-eval")
    paths = write_report(bare)
    rows = {row["model"]: row for row in facts(paths)["models"]}
    assert list(rows) == ["base", "zero", "dev1", "dev2"] and rows["base"]["change"] is None
    assert rows["dev1"]["change"] == rows["zero"]["change"] == facts(paths)["gain"]
    assert rows["dev2"]["from"] == "dev1" and rows["dev2"]["change"]["mean"] == 0
    page = Page(paths.html)
    assert "The models, stage by stage" in page.text and "<b>gcd</b>" in page.text


def test_no_gain_is_claimed_when_the_interval_holds_zero(bare: Path) -> None:
    same = (bare / "base-eval/eval.json").read_text()
    (bare / "zero-eval/eval.json").write_text(same)
    assert "which may be no change at all" in Page(write_report(bare).html).text


def test_a_score_no_better_than_a_constant_says_so(bare: Path, edit_json: Edit) -> None:
    constant = {"answer": "100", "accuracy": 0.7}
    edit_json(bare / "zero-eval/eval.json", lambda value: value.update(best_constant=constant))
    assert "scores 70.0 %, which it does not clearly beat." in Page(write_report(bare).html).text


def test_scores_taken_under_other_conditions_are_not_compared(bare: Path, edit_json: Edit) -> None:
    edit_json(bare / "base-eval/eval.json", lambda value: value["decoding"].update(temperature=0.0))
    paths = write_report(bare)
    assert facts(paths)["gain"] is None
    assert "The two differ in decoding: do not compare them." in Page(paths.html).text


def test_models_with_more_samples_than_others_are_compared_all_the_same(bare: Path, edit_json: Edit) -> None:
    def fewer(value: dict[str, Any]) -> None:
        value["k"] = value["decoding"]["k"] = 4

    before = facts(write_report(bare))["gain"]
    edit_json(bare / "base-eval/eval.json", fewer)
    assert facts(write_report(bare))["gain"] == before is not None


def test_warnings_of_an_evaluation_stand_beside_the_headline(bare: Path, edit_json: Edit) -> None:
    edit_json(bare / "zero-eval/eval.json", lambda value: value.update(warnings=["900 of 1600 samples truncated"]))
    text = Page(write_report(bare).html).text
    assert text.index("zero-eval: 900 of 1600 samples truncated") < text.index("Time, all stages")


def test_a_run_in_progress_says_what_is_missing(bare: Path, edit_json: Edit) -> None:
    def stop_in_rl(lineage: dict[str, Any]) -> None:
        lineage["stages"] = lineage["stages"][:4]
        lineage["stages"][3].update(status="running", seconds=0.0, usd=0.0)

    edit_json(bare / "lineage.json", stop_in_rl)
    (bare / "zero-eval/eval.json").unlink()
    (bare / "ledger.jsonl").unlink()
    (bare / "zero/metrics.jsonl").write_text('{"step": 1, "seconds": 7.5, "usd": 0.0002}\n{"step": 2, "sec')
    paths = write_report(bare)
    assert facts(paths)["missing"] == ["base/metrics.jsonl", "stage zero: running", "stage zero-eval: not started"]
    assert facts(paths)["headline"]["zero_pass_at_1"] is None
    assert facts(paths)["headline"]["seconds"] == pytest.approx(21 + 512 + 88 + 7.5)
    text = Page(paths.html).text
    assert "stage zero: running" in text and "R1-Zero has not been evaluated yet." in text


def test_a_model_of_other_makers_is_a_base_model(bare: Path, edit_json: Edit) -> None:
    before = facts(write_report(bare))

    def adopt(lineage: dict[str, Any]) -> None:
        next(stage for stage in lineage["stages"] if stage["kind"] == "pretrain")["kind"] = "pretrained"

    edit_json(bare / "lineage.json", adopt)
    after = facts(write_report(bare))
    assert after["headline"] == before["headline"] and after["gain"] == before["gain"] is not None
    assert "a base model" not in after["missing"]


def test_an_empty_directory_gets_a_report(tmp_path: Path) -> None:
    paths = write_report(tmp_path)
    assert facts(paths)["headline"] == dict.fromkeys(("base_pass_at_1", "zero_pass_at_1", "seconds", "price_usd"))
    assert facts(paths)["status"] == "incomplete"
    assert "No model of this run has been evaluated yet." in Page(paths.html).text


def test_an_evaluation_kept_in_the_stage_itself_counts(bare: Path) -> None:
    for name in ("base", "zero"):
        (bare / f"{name}-eval/eval.json").rename(bare / name / "eval.json")
    headline = facts(write_report(bare))["headline"]
    assert headline["base_pass_at_1"]["mean"] < 0.2 < headline["zero_pass_at_1"]["mean"]


def test_a_broken_line_is_named_and_a_torn_last_one_left_out(bare: Path) -> None:
    log = bare / "base/metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2')
    assert [row["step"] for row in read_run(bare).stages[1].metrics] == [1]
    log.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(DataError, match=r"base/metrics\.jsonl:2: not valid JSON"):
        read_run(bare)


def test_a_stage_cannot_lead_out_of_the_run(bare: Path, edit_json: Edit) -> None:
    edit_json(bare / "lineage.json", lambda value: value["stages"][0].update(name="../../etc"))
    with pytest.raises(DataError, match="is not the name of a folder"):
        write_report(bare)


def test_a_missing_directory_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run directory"):
        write_report(tmp_path / "nothing")


def test_the_same_directory_gives_the_same_bytes(bare: Path) -> None:
    rows = [{"step": step, "loss": 1 / step, "tokens": step} for step in range(1, 9)]
    (bare / "base/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = [path.read_bytes() for path in (write_report(bare).html, write_report(bare).json)]
    assert first == [path.read_bytes() for path in (write_report(bare).html, write_report(bare).json)]


def test_column_keeps_only_finite_numbers() -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": None}, {"step": 4, "loss": float("nan")}]
    assert column(rows, "loss") == ([1.0], [2.0])
