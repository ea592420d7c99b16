"""What a findings card says, as plain values: the numbers of the runs that are at hand, and of the card as it stands.

Runs are large and only the card is kept, so one who redoes a claim or adds a seed seldom has them all: what the card in
`out` says of a seed without a run here stays, as long as its stages have the settings they had (their hashes) and the
claim measures the same. A run at hand always counts, also one that failed.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from sputnik.config import config_hash
from sputnik.errors import DataError
from sputnik.recipe.evidence import read_json
from sputnik.recipe.findings import Card, KindOf, Source
from sputnik.recipe.findings_claim import Claim, Metric, Reproduced, decide, t_interval
from sputnik.recipe.lineage import Lineage
from sputnik.recipe.recipe import Recipe

ANSWERS: tuple[Reproduced, ...] = ("yes", "no", "could not tell", "incomplete")
MEASURED = ("ours", "against", "compare", "tail")
"""Parts of a rule that make a number; the others judge it."""


def gather(card: Card, run: Path, kind_of: KindOf) -> dict[str, Any]:
    """Everything the card says. Each row: what the claim says, `values` of the seeds, `kept` those from before."""
    before = (read_json(card.out / "findings.json") if card.out else None) or {}
    old = {row["claim"]: row for row in before.get("claims", ())}
    rows, costs = list[dict[str, Any]](), list[dict[str, Any]]()
    for source in card.sources:
        recipes = [source.recipe(seed, kind_of) for seed in range(source.seeds)]
        own = [_row(card, run, source, claim, recipes, old.get(claim.name, {})) for claim in source.claims]
        costs += _costs(_relative(card, source.path), run / source.name, own, before.get("runs", ()))
        rows += own
    kept = any(row["kept"] for row in rows)
    machines, codes = (list(before.get(key, ())) if kept else [] for key in ("hardware", "code"))
    for path in sorted(run.glob("*/seed-*/lineage.json")):
        lineage = read_json(path) or {}
        machines += [m for m in [lineage.get("environment")] if m and m not in machines]
        codes += [r["code"] for r in lineage.get("stages") or [] if r.get("code") and r["code"] not in codes]
    return {
        "claims": rows,
        "summary": {answer: sum(row["reproduced"] == answer for row in rows) for answer in ANSWERS},
        "hardware": machines,
        "code": sorted(set(codes)),
        "seconds": sum(cost["seconds"] for cost in costs),
        "usd": sum(cost["usd"] for cost in costs),
        "runs": costs,
    }


def _row(
    card: Card, run: Path, source: Source, claim: Claim, recipes: list[Recipe], old: Mapping[str, Any]
) -> dict[str, Any]:
    values, missing, kept = list[dict[str, Any]](), list[str](), list[int]()
    same = all(old.get("rule", {}).get(key) == claim.rule[key] for key in MEASURED)
    stands = {value["seed"]: value for value in old.get("values", ()) if same}
    for seed, recipe in zip(range(claim.seeds), recipes, strict=False):
        folder, made_of = run / source.name / recipe.name, _made_of(claim, recipe)
        if not (folder / "lineage.json").is_file():
            if stands.get(seed, {}).get("made_of") == made_of:
                values.append(stands[seed])
                kept.append(seed)
            else:
                missing.append(f"seed {seed}: not run")
            continue
        reason = _unfinished(folder, claim)
        if reason is None:
            try:
                ours, against, effect = claim.measure(folder)
                show = {label: Metric.parse(text, claim.name).value(folder) for label, text in claim.show.items()}
            except DataError as error:
                reason = str(error).removeprefix(f"{folder}: ")
            else:
                value = {"seed": seed, "ours": ours, "against": against, "effect": effect, "made_of": made_of}
                values.append(value | ({"show": show} if show else {}))
        if reason is not None:
            missing.append(f"seed {seed}: {reason}")
    effects = [value["effect"] for value in values]
    rules = (read_json(run / source.name / "rules.json") or {}).get(claim.name, claim.rule)
    changed = {key for key in claim.rule if rules.get(key) != claim.rule[key]}
    if kept:
        changed |= {*old["rule_changed"], *(key for key in claim.rule if old["rule"].get(key) != claim.rule[key])}
    warnings = [text for seed in kept for text in old["warnings"] if f", seed {seed}: " in text]
    return {
        "claim": claim.name,
        "text": claim.text,
        "source": claim.source,
        "published": claim.published,
        "ours": fmean(effects) if effects else None,
        "interval": list(t_interval(effects) or []) or None,
        "seeds": len(effects),
        "reproduced": decide(claim, effects),
        "recipe": _relative(card, source.path),
        "rule": claim.rule,
        "rule_changed": [key for key in claim.rule if key in changed],
        "unit": claim.unit,
        "labels": list(claim.labels),
        "values": values,
        "kept": kept,
        "curves": bool(claim.curves),
        "show": _shown(claim, values),
        "missing": missing,
        "warnings": warnings + _warnings(run / source.name, claim),
        "note": claim.note,
    }


def _shown(claim: Claim, values: list[dict[str, Any]]) -> dict[str, float]:
    """Further numbers, the mean over the seeds; the label says which where a kept seed lacks them."""
    have = [value for value in values if "show" in value]
    seeds = "" if len(have) == len(values) else f" (seeds {', '.join(str(value['seed']) for value in have)})"
    return {label + seeds: fmean(value["show"][label] for value in have) for label in claim.show if have}


def _made_of(claim: Claim, recipe: Recipe) -> str:
    """One hash of all that decides the stages a claim is measured on."""
    return config_hash({metric.stage: recipe.stage(metric.stage).hash for metric in claim.metrics})


def _unfinished(folder: Path, claim: Claim) -> str | None:
    """The first stage that a claim reads and that is not done."""
    records = Lineage(folder).records
    for metric in claim.metrics:
        record = records.get(metric.stage)
        if record is None or record.status != "done":
            return f"{metric.stage} {record.status if record else 'not run'}"
    return None


def _warnings(folder: Path, claim: Claim) -> list[str]:
    """What evaluations warned of and guards found, per stage that the claim reads; the first of each."""
    found = []
    for stage in dict.fromkeys(metric.stage for metric in claim.metrics):
        for seed in range(claim.seeds):
            place = folder / f"seed-{seed}" / stage
            texts = list((read_json(place / "eval.json") or {}).get("warnings") or ())
            texts += [str((read_json(path) or {}).get("message")) for path in sorted(place.glob("alarms/step-*.json"))]
            if texts:
                more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
                found.append(f"{stage}, seed {seed}: {texts[0]}{more}")
    return found


def _costs(recipe: str, folder: Path, rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the seeds at hand took, and what the kept ones did: one entry for those that were run together."""
    paths = sorted(folder.glob("seed-*/lineage.json"))
    here = sorted(int(path.parent.name.removeprefix("seed-")) for path in paths)
    kept = {seed for row in rows for seed in row["kept"]}
    found = [cost for cost in before if cost["recipe"] == recipe and kept.intersection(cost["seeds"])]
    if here:
        records = [record for path in paths for record in Lineage(path.parent).records.values()]
        spent = {key: sum(getattr(record, key) for record in records) for key in ("seconds", "usd")}
        found.append({"recipe": recipe, "seeds": here} | spent)
    return found


def _relative(card: Card, path: Path) -> str:
    """recipes/findings/mtp.toml, wherever the checkout is."""
    return path.resolve().relative_to(card.path.resolve().parent.parent).as_posix()
