"""The report over a run: report.json for programs and report.html for people, from the same facts.

    write_report(Path("runs/quickstart")).html

Reads the run directory alone, writes the two files into it and needs neither torch nor a network; the page is one
static file that loads nothing. A run in progress gets a report too, which says what is still missing. The same
directory always gives the same bytes. Left out: comparing runs.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sputnik.cost import HARDWARE, parameters
from sputnik.eval.stats import paired
from sputnik.files import write_whole
from sputnik.model.config import ModelConfig
from sputnik.recipe.evidence import Run, Stage, discarded, number, read_json, read_run
from sputnik.recipe.page import render_page

MOST_ALARMS = 3
ESTIMATE = ("mean", "low", "high", "n", "k")
CONDITIONS = ("task", "task_version", "template_hash", "decoding", "n")
H800_HOURS = (
    ("DeepSeek-V3, all of its training", 2_788_000, "DeepSeek-V3 report, table 1"),
    ("DeepSeek-R1-Zero, RL on top of V3", 101_000, "DeepSeek-R1 report, version 2, table 7"),
    ("DeepSeek-R1 with R1-Zero and its data, on top of V3", 147_000, "DeepSeek-R1 report, version 2, table 7"),
)


@dataclass(frozen=True)
class ReportPaths:
    """The two files of a report."""

    html: Path
    json: Path


def write_report(run: Path) -> ReportPaths:
    """Write report.json and report.html into `run`. DataError if it is no directory or a file in it is broken."""
    evidence = read_run(run)
    facts = gather(evidence)
    paths = ReportPaths(html=run / "report.html", json=run / "report.json")
    write_whole(paths.json, json.dumps(_strict(facts), indent=2) + "\n")
    write_whole(paths.html, render_page(evidence, facts).encode("utf-8", "replace"))  # lone surrogates become "?"
    return paths


def gather(run: Run) -> dict[str, Any]:
    """Everything the report claims, as plain JSON values. `headline` is None where a number is not there yet; its time
    and price are those of all attempts, discarded ones included."""
    base, zero = comparable(run.evaluations(run.base), run.evaluations(run.zero))
    judged = [stage.score for stage in (zero, base) if stage is not None and stage.score is not None]
    costs = [_cost(stage) for stage in run.stages]
    lost = _discarded(run)
    total = {key: _sum(row.get(key) for row in (*costs, lost or {})) for key in ("seconds", "tokens", "flops", "usd")}
    published = [_published(*row) for row in H800_HOURS]
    return {
        "run": run.name,
        "status": "incomplete" if run.missing else "complete",
        "missing": run.missing,
        "headline": {
            "base_pass_at_1": estimate(base),
            "zero_pass_at_1": estimate(zero),
            "seconds": total["seconds"],
            "price_usd": total["usd"],
        },
        "gain": _gain(base, zero),
        "different_conditions": _differences(base, zero),
        "warnings": _warnings(run),
        "best_constant": next((score["best_constant"] for score in judged if score.get("best_constant")), None),
        "task": next((score["task"] for score in judged if score.get("task")), None),
        "model": _model_size(run),
        "stages": [{**_described(stage), **cost} for stage, cost in zip(run.stages, costs, strict=True)],
        "models": _models(run),
        "scores": {stage.name: {"of": _model(stage), **(stage.score or {})} for stage in run.stages if stage.score},
        "cost": {"stages": costs, "total": total, "discarded": lost, "published": published},
        "hardware": run.lineage.get("hardware") or run.recipe.get("hardware"),
        "versions": run.lineage.get("environment") or {},
        "recipe": dict(run.recipe),
    }


def comparable(before: Sequence[Stage], after: Sequence[Stage]) -> tuple[Stage | None, Stage | None]:
    """Of two models' evaluations the first pair taken under equal conditions, else the first of each."""
    pairs = [(old, new) for new in after for old in before if not _differences(old, new)]
    return pairs[0] if pairs else (next(iter(before), None), next(iter(after), None))


def _differences(before: Stage | None, after: Stage | None) -> list[str]:
    """Conditions in which two evaluations differ, so that their scores are not one comparison."""
    if before is None or after is None:
        return []
    old, new = _conditions(before), _conditions(after)
    return [key.replace("_", " ") for key in CONDITIONS if old[key] != new[key]]


def _conditions(stage: Stage) -> dict[str, Any]:
    """The number of samples is none of them: more make pass@1 surer, not higher."""
    found = {key: (stage.evaluation or {}).get(key) for key in CONDITIONS}
    if isinstance(found["decoding"], Mapping):
        found["decoding"] = {key: value for key, value in found["decoding"].items() if key != "k"}
    return found


def _gain(before: Stage | None, after: Stage | None) -> dict[str, Any] | None:
    """R1-Zero minus base model, paired by question; None unless both answered the same ones."""
    shares = [dict((stage.evaluation or {}).get("questions") or ()) if stage else {} for stage in (before, after)]
    if not shares[0] or shares[0].keys() != shares[1].keys() or _differences(before, after):
        return None
    samples = ((after.evaluation or {}).get("k") if after else None) or 1
    return asdict(paired([shares[0][key] for key in shares[1]], list(shares[1].values()), samples))


def _models(run: Run) -> list[dict[str, Any]]:
    """Every model that was scored, in order, as in R1's table of its Dev checkpoints; `change` is against the model it
    was made from, on the same questions. Empty for fewer than three: the headline says it all."""
    scored = [(stage, found[0]) for stage in run.stages if stage.kind != "eval" and (found := run.evaluations(stage))]
    by_name = {stage.name: stage for stage in run.stages}
    rows = []
    for stage, score in scored if len(scored) > 2 else ():
        before, after = comparable(run.evaluations(by_name.get(stage.parent or "")), [score])
        facts = after.score or {} if after else {}
        rows.append(
            {
                "model": stage.name,
                "kind": stage.kind,
                "from": stage.parent,
                "evaluation": score.name,
                "pass_at_1": estimate(after),
                "change": _gain(before, after),
                "different_conditions": _differences(before, after),
                **{key: facts.get(key) for key in ("cons_at_k", "families", "length", "well_formed", "self_check")},
            }
        )
    return rows


def estimate(stage: Stage | None) -> dict[str, Any] | None:
    """pass@1 of an evaluation with its interval."""
    score = (stage.evaluation or {}).get("pass_at_1") if stage else None
    if not isinstance(score, Mapping) or number(score.get("mean")) is None:
        return None
    return {key: score.get(key) for key in ESTIMATE}


def _warnings(run: Run) -> list[str]:
    """What a reader must know before believing the numbers: warnings of evaluations, alarms of training."""
    found = []
    for stage in run.stages:
        found += [f"{stage.name}: {text}" for text in (stage.evaluation or {}).get("warnings") or ()]
        alarms = stage.alarms()
        found += [f"{stage.name}, alarm: {text}" for text in alarms[:MOST_ALARMS]]
        if len(alarms) > MOST_ALARMS:
            found.append(f"{stage.name}: {len(alarms) - MOST_ALARMS} more alarms in {stage.name}/alarms")
    return found


def _model(stage: Stage) -> str:
    """Whose score it is: an evaluation stage measures its parent."""
    return (stage.parent or stage.name) if stage.kind == "eval" else stage.name


def _described(stage: Stage) -> dict[str, Any]:
    record = {key: stage.record.get(key) for key in ("parent", "hash", "code")}
    return {"name": stage.name, "kind": stage.kind, "status": stage.status, **record}


def _cost(stage: Stage) -> dict[str, Any]:
    spent = {key: stage.total(key) for key in ("seconds", "usd")}
    return {"stage": stage.name, **spent, "tokens": stage.tokens, "flops": stage.flops}


def _model_size(run: Run) -> dict[str, Any] | None:
    """The network that was trained, from the first checkpoint there is."""
    for stage in (run.zero, run.base):
        config = read_json(stage.path / "checkpoint" / "config.json") if stage else None
        if config is not None:
            shape = ModelConfig.from_hf(config)
            count = parameters(shape)
            layers = {"layers": shape.num_hidden_layers, "experts": shape.n_routed_experts}
            return {"type": shape.model_type, "parameters": count.total, "active": count.active, **layers}
    return None


def _discarded(run: Run) -> dict[str, float] | None:
    kept = {(stage.name, stage.record.get("hash")) for stage in run.stages}
    return discarded(run.ledger, kept) if run.lineage else None


def _published(name: str, hours: int, source: str) -> dict[str, Any]:
    return {"name": name, "h800_hours": hours, "usd": hours * HARDWARE["H800"].usd_per_hour, "source": source}


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _strict(value: Any) -> Any:
    """NaN and infinities become null, which JSON has, instead of words it has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return value if isinstance(value, str | int | bool | None) else str(value)
