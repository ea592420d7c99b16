"""The HTML page of a report: what goes where, in words. The layout itself is templates/report.html.

Model text is hostile by nature: every value passes jinja2's autoescape, only our own SVG, style and script are marked
safe, and the page's Content-Security-Policy lets nothing load and no script run but its own, named by hash.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sputnik.recipe import figures, samples, wording
from sputnik.recipe.evidence import Run, Stage, number
from sputnik.recipe.plots import PALETTE
from sputnik.recipe.wording import NONE, count, percent

TEMPLATES = Path(__file__).parent / "templates"
LONGEST_TEXT = 4000  # characters of one thought or answer that are printed; the rest is in the run directory
SHARES = ("truncated", "well_formed", "self_check", "accuracy")
LABELS: Mapping[str, str] = MappingProxyType(
    {
        "of": "model",
        "task": "task",
        "task_version": "verifier version",
        "n": "questions",
        "k": "samples per question",
        "pass_at_1": "pass@1",
        "cons_at_k": "cons@k",
        "pass_at_k": "pass@k by k",
        "best_constant": "best constant answer",
        "verdicts": "verdicts",
        "warnings": "warnings",
        "truncated": "truncated answers",
        "self_check": "self-checking thoughts",
        "decoding": "decoding",
        "template": "template",
        "template_hash": "template hash",
        "well_formed": "well-formed answers",
        "length": "tokens per answer",
        "length_finished": "tokens per finished answer",
        "thinking_length": "thinking tokens per answer",
        "seconds": "time",
        "tokens_per_s": "tokens per second",
    }
)


@dataclass(frozen=True)
class Section:
    """A stage's part of the page."""

    stage: Stage
    title: str
    figures: list[figures.Figure]


def render_page(run: Run, facts: Mapping[str, Any]) -> str:
    """The whole page as one string."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "duration": wording.duration,
        "money": wording.money,
        "count": count,
        "power": wording.power,
        "clip": lambda text: wording.clip(str(text or ""), LONGEST_TEXT),
        "badge": badge,
        "sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
    }
    browsers = [(stage, found) for stage in run.of_kind("rl") if (found := samples.groups(stage))]
    return environment.get_template("report.html").render(
        run=run,
        facts=facts,
        headline=facts["headline"],
        claim=claim(facts),
        pretraining=[pretraining_section(stage) for stage in run.of_kind("pretrain", "sft")],
        learning=[learning_section(stage, facts["best_constant"]) for stage in run.of_kind("rl")],
        comparison=samples.compare(_answers(run, run.base), _answers(run, run.zero)),
        browsers=browsers,
        seen_verdicts={str(r.get("verdict")) for _, found in browsers for group in found for r in group.rollouts},
        hardware=_cell("hardware", facts["hardware"]),
        scores=score_table(facts["scores"]),
        setting=setting(run, facts),
        palette=PALETTE,
        verdict_roles=figures.VERDICT_ROLES,
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def learning_section(stage: Stage, constant: Mapping[str, Any] | None) -> Section:
    """R1-Zero: accuracy first, then the "aha" curves, verdicts and health."""
    level = number((constant or {}).get("accuracy"))
    wide = [figures.learning_curve(stage, level), *figures.thinking(stage), figures.verdict_mix(stage)]
    drawn = [figure for figure in wide if figure] + figures.health(stage)
    return Section(stage, f"Reinforcement learning: {stage.name}", drawn)


def pretraining_section(stage: Stage) -> Section:
    """Loss, bits per byte, experts and speed."""
    kind = {"pretrain": "Pre-training", "sft": "Fine-tuning"}[stage.kind]
    return Section(stage, f"{kind}: {stage.name}", figures.pretraining(stage))


def claim(facts: Mapping[str, Any]) -> str:
    """The finding in a few sentences, no stronger than the intervals allow."""
    base, zero = facts["headline"]["base_pass_at_1"], facts["headline"]["zero_pass_at_1"]
    if not base and not zero:
        return "No model of this run has been evaluated yet."
    if not zero:
        return f"The base model answers {_said(base)}. R1-Zero has not been evaluated yet."
    if not base:
        return f"R1-Zero answers {_said(zero)}. The base model was not evaluated, so there is no gain to report."
    first = f"After reinforcement learning the model answers {_said(zero)}; the base model {percent(base['mean'])}."
    if facts["different_conditions"]:
        return f"{first} The two differ in {', '.join(facts['different_conditions'])}: do not compare them."
    gain = facts["gain"]
    if not gain:
        return f"{first} The answers to single questions were not kept, so the gain has no interval."
    points = [f"{100 * gain[end]:+.1f}".replace("-", "−") for end in ("mean", "low", "high")]
    told = f"{first} Question by question that is {points[0]} points (95\u00a0%: {points[1]} to {points[2]})"
    sure = "." if gain["low"] > 0 or gain["high"] < 0 else ", which may be no change at all."
    return told + sure + _against_constant(zero, facts["best_constant"])


def _against_constant(estimate: Mapping[str, Any], constant: Mapping[str, Any] | None) -> str:
    level, low = number((constant or {}).get("accuracy")), number(estimate.get("low"))
    if level is None or low is None or low > level:
        return ""
    return f" One and the same answer to every question scores {percent(level)}, which it does not clearly beat."


def _answers(run: Run, model: Stage | None) -> list[Mapping[str, Any]]:
    """The answers kept by all evaluations of a model."""
    return [sample for stage in run.evaluations(model) for sample in (stage.evaluation or {}).get("samples") or ()]


def _said(estimate: Mapping[str, Any]) -> str:
    of = f" of {count(estimate['n'])}" if estimate.get("n") else ""
    each = f", {estimate['k']} samples each" if (estimate.get("k") or 1) > 1 else ""
    return f"{percent(estimate['mean'])}{of} questions correctly{each}"


def badge(verdict: Any) -> tuple[str, str, str]:
    """(sign, words, colour role) of a verdict: the sign and the words carry the meaning, the colour repeats it."""
    name = str(verdict or "unknown").lower()
    sign = {"correct": "✓", "wrong": "✗", "truncated": "…", "unparseable": "?"}.get(name, "!")
    return sign, name.replace("_", " "), figures.VERDICT_ROLES.get(name, "slate")


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(label, one cell per evaluated stage), the known rows first, whatever else an evaluation recorded after them."""
    keys = dict.fromkeys([*LABELS, *(key for score in scores.values() for key in score)])
    kept = [key for key in keys if any(_is_short(score.get(key)) for score in scores.values())]
    return [
        (LABELS.get(key, key.replace("_", " ")), [_cell(key, score.get(key)) for score in scores.values()])
        for key in kept
    ]


def _is_short(value: Any) -> bool:
    return value is not None and not (isinstance(value, list) and len(value) > 8)


def _cell(key: str, value: Any) -> str:
    """A value of an evaluation in words; whole numbers are counts, even under a name that elsewhere is a share."""
    if isinstance(value, Mapping) and "low" in value and "mean" in value:
        low, high = percent(number(value["low"])), percent(number(value.get("high")))
        return f"{percent(number(value['mean']))} [{low}, {high}]"
    if isinstance(value, Mapping):
        kept = {name: inner for name, inner in value.items() if not (key == "verdicts" and inner == 0)}
        colon = ": " if any(isinstance(inner, Mapping) for inner in kept.values()) else " "
        return "; ".join(f"{name.replace('_', ' ')}{colon}{_cell(name, inner)}" for name, inner in kept.items()) or NONE
    if isinstance(value, list | tuple):
        return "; ".join(_cell(key, inner) for inner in value) or "none"
    if isinstance(value, float) and number(value) is not None:
        return percent(value) if key in SHARES else wording.duration(value) if key == "seconds" else f"{value:.6g}"
    return NONE if value is None else str(value)


def setting(run: Run, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run ran on, as far as it was recorded."""
    rows = [("Hardware", _cell("hardware", facts["hardware"])), ("Seed", _cell("seed", run.recipe.get("seed")))]
    rows += [(name.replace("_", " "), _cell(name, value)) for name, value in facts["versions"].items()]
    code = list(dict.fromkeys(str(stage.record["code"]) for stage in run.stages if stage.record.get("code")))
    return [(name, value) for name, value in [*rows, ("Code", ", ".join(code) or NONE)] if value != NONE]
