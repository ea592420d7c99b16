"""The findings card on paper: findings.json for programs, findings.md and its plots for people.

`write_card(card, run)` reads the runs of every seed and writes the three into `runs/NAME`, and into the card's `out`
if it has one. The page is a function of the JSON alone (`page`), the plots are drawn from the logs. What
has not been run, failed or has a rule that was changed afterwards stands in the card as such.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sputnik.errors import DataError
from sputnik.files import write_whole
from sputnik.recipe import plots
from sputnik.recipe.evidence import read_json
from sputnik.recipe.findings import Card, Source
from sputnik.recipe.findings_claim import Claim, Metric, decide, t_interval
from sputnik.recipe.lineage import Lineage
from sputnik.recipe.wording import NONE, duration, money, percent

PLOTS = "findings-plots"
SIGNS = {"yes": "✓ yes", "no": "✗ no", "could not tell": "? could not tell", "incomplete": "… incomplete"}
ROLES = {"yes": "green", "no": "red", "could not tell": "amber", "incomplete": "slate"}
HEAD = """# Findings

The claims of the DeepSeek-V3 and R1 reports that have a small form, tried on models of a few million parameters.
{summary}

Every row is decided by a rule that stands in its recipe and was noted before the first run. Each seed gives one number,
both sides of it from the same weights and data where that can be. The claim is reproduced if the whole 95 % interval of
these numbers (Student's t over the seeds) lies within the bounds of the rule, not reproduced if it lies beyond one of
them, and else nobody could tell; it is incomplete while seeds are missing. What does not reproduce here may hold at
scale, and of many rows at 95 % one or another is luck.

`sputnik run recipes/findings.toml` does it all again, killed and continued as you like; `--only NAME` redoes a claim or
a recipe, `--set seeds=1` is a quick look. The same in numbers: `findings.json`.

{spent}

"""
TAIL = """## A claim of your own

A recipe (docs/recipes.md) with a `[[claim]]` table is all it takes; name the file in a card like
`recipes/findings.toml`. The keys are those of `Claim` in `sputnik/recipe/findings_claim.py`:

```toml
[[claim]]
name = "wider"                                  # also the name of its plot
text = "A wider model loses less"
source = "my notebook"
ours = "wide/lineage: result.bits_per_byte"     # STAGE/FILE: KEY of the run of one seed
against = "narrow/lineage: result.bits_per_byte"
compare = "change"                              # value, difference, change or ratio
below = -0.01                                   # the rule: at least 1 % lower, in the whole interval
minutes = 4                                     # what a seed takes
```
"""


def write_card(card: Card, run: Path, drawn: bool = True) -> Path:
    """Write card and plots into `run` and `card.out`; returns the page in `run`. `drawn` False: leave the plots as they
    are, which is for in between."""
    facts = gather(card, run)
    drawings = _drawings(card, run, facts) if drawn else {}
    facts["plots"] = sorted(drawings) if drawn else sorted(path.name for path in (run / PLOTS).glob("*.svg"))
    for folder in [run] if card.out is None else [run, card.out]:
        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
        for name, svg in drawings.items():
            write_whole(folder / PLOTS / name, plots.standalone(svg))
        write_whole(folder / "findings.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        write_whole(folder / "findings.md", page(facts))
    return run / "findings.md"


# --- what is known ---------------------------------------------------------------------------------------------------


def gather(card: Card, run: Path) -> dict[str, Any]:
    """Everything the card says, as plain JSON values."""
    rows = [_row(card, run, source, claim) for source in card.sources for claim in source.claims]
    costs = [_cost(card, run, source) for source in card.sources]
    counts = {answer: sum(row["reproduced"] == answer for row in rows) for answer in SIGNS}
    machines, codes = list[dict[str, Any]](), list[str]()
    for path in sorted(run.glob("*/seed-*/lineage.json")):
        lineage = read_json(path) or {}
        machines += [m for m in [lineage.get("environment")] if m and m not in machines]
        codes += [r["code"] for r in lineage.get("stages") or [] if r.get("code") and r["code"] not in codes]
    return {
        "claims": rows,
        "summary": counts,
        "hardware": machines,
        "code": sorted(set(codes)),
        "seconds": sum(cost["seconds"] for cost in costs),
        "usd": sum(cost["usd"] for cost in costs),
        "runs": costs,
    }


def _row(card: Card, run: Path, source: Source, claim: Claim) -> dict[str, Any]:
    values, missing = list[dict[str, Any]](), list[str]()
    show: dict[str, list[float]] = {label: [] for label in claim.show}
    for seed in range(claim.seeds):
        folder = run / source.name / f"seed-{seed}"
        reason = _unfinished(folder, claim)
        if reason is None:
            try:
                ours, against, effect = claim.measure(folder)
                further = {label: Metric.parse(text, claim.name).value(folder) for label, text in claim.show.items()}
            except DataError as error:
                reason = str(error).removeprefix(f"{folder}: ")
            else:
                values.append({"seed": seed, "ours": ours, "against": against, "effect": effect})
                for label, number in further.items():
                    show[label].append(number)
        if reason is not None:
            missing.append(f"seed {seed}: {reason}")
    effects = [value["effect"] for value in values]
    kept = (read_json(run / source.name / "rules.json") or {}).get(claim.name, claim.rule)
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
        "rule_changed": [key for key in claim.rule if kept.get(key) != claim.rule[key]],
        "unit": claim.unit,
        "labels": list(claim.labels),
        "values": values,
        "show": {label: fmean(numbers) for label, numbers in show.items() if numbers},
        "missing": missing,
        "warnings": _warnings(run / source.name, claim),
        "note": claim.note,
    }


def _unfinished(folder: Path, claim: Claim) -> str | None:
    """The first stage that a claim reads and that is not done."""
    if not (folder / "lineage.json").is_file():
        return "not run"
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


def _cost(card: Card, run: Path, source: Source) -> dict[str, Any]:
    folders = sorted((run / source.name).glob("seed-*/lineage.json"))
    records = [record for path in folders for record in Lineage(path.parent).records.values()]
    return {
        "recipe": _relative(card, source.path),
        "seeds": len(folders),
        "seconds": sum(record.seconds for record in records),
        "usd": sum(record.usd for record in records),
    }


def _relative(card: Card, path: Path) -> str:
    """recipes/findings/mtp.toml, wherever the checkout is."""
    return path.resolve().relative_to(card.path.resolve().parent.parent).as_posix()


# --- plots -----------------------------------------------------------------------------------------------------------


def _drawings(card: Card, run: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    """File name -> plot: one for every claim that has numbers, and one of all that have an interval."""
    rows = {row["claim"]: row for row in facts["claims"]}
    found = {}
    for source in card.sources:
        for claim in source.claims:
            if rows[claim.name]["values"]:
                found[f"{claim.name}.svg"] = draw(claim, rows[claim.name], run / source.name)
    if any(row["interval"] for row in rows.values()):
        found["overview.svg"] = overview(facts["claims"])
    return found


def draw(claim: Claim, row: Mapping[str, Any], folder: Path) -> str:
    """Curves over steps where the claim names some, else one line per seed from what it is compared with to ours."""
    seeds = [folder / f"seed-{value['seed']}" for value in row["values"]]
    if claim.curves:
        groups = {}
        labels = claim.labels[-len(claim.curves) :]
        for label, text in zip(labels, claim.curves, strict=False):
            metric = Metric.parse(text, claim.name)
            points = [metric.curve(seed, claim.along) for seed in seeds]
            groups[label] = [([x for x, _ in each], [y for _, y in each]) for each in points]
        return plots.bands(
            claim.name, groups, x_label=claim.along.rpartition(".")[2].replace("_", " "), unit=claim.unit
        )
    sides = ["against", "ours"] if claim.against else ["ours"]
    values = [[value[side] for side in sides] for value in row["values"]]
    return plots.pairs(claim.name, claim.labels[-len(sides) :], values, unit=claim.unit)


def overview(rows: Sequence[Mapping[str, Any]]) -> str:
    """All intervals on one axis: 0 is the nearer bound of each rule, right of it the claim holds; each row is stretched
    to its own width."""
    drawn = []
    for row in rows:
        if row["interval"]:
            low, mean, high = (
                _clearance(row["rule"], row["ours"])(x) for x in (*row["interval"][:1], row["ours"], row["interval"][1])
            )
            widest = max(abs(low), abs(high)) or 1.0
            drawn.append((row["claim"], ROLES[row["reproduced"]], *(x / widest for x in sorted((low, mean, high)))))
    return plots.forest("overview", drawn)


def _clearance(rule: Mapping[str, Any], mean: float) -> Callable[[float], float]:
    """How far a value is within the bound that is nearer to the mean."""
    above, below = rule["above"], rule["below"]
    upper = above is None or (below is not None and below - mean < mean - above)
    return (lambda x: below - x) if upper else (lambda x: x - above)


# --- the page --------------------------------------------------------------------------------------------------------


def page(facts: Mapping[str, Any]) -> str:
    """findings.md from findings.json."""
    rows, counts = facts["claims"], facts["summary"]
    told = "Of {} claims {yes} reproduce, {no} do not, {could not tell} could not be told, {incomplete} lack seeds."
    parts = [HEAD.format(summary=told.format(len(rows), **counts), spent=_spent(facts))]
    if "overview.svg" in facts["plots"]:
        parts.append(
            f"![every claim's interval against its rule]({PLOTS}/overview.svg)\n\n"
            "Right of the dashed line a claim holds, left of it it does not; each row on a scale of its own.\n\n"
        )
    parts.append("| claim | source | ours (95 % interval) | rule | reproduced |\n|---|---|---|---|---|\n")
    for row in rows:
        link = f"[{row['text']}](#{row['claim']})"
        parts.append(f"| {link} | {row['source']} | {_ours(row)} | {rule(row)} | {SIGNS[row['reproduced']]} |\n")
    parts += ["\n", *(_section(row, f"{row['claim']}.svg" in facts["plots"]) for row in rows), TAIL]
    return "".join(parts)


def _spent(facts: Mapping[str, Any]) -> str:
    if not facts["seconds"]:
        return "Nothing has been run yet: what stands here are the rules."
    machines = "; ".join(
        f"{m.get('cpu')}, {m.get('threads')} threads, torch {m.get('torch')}, {m.get('precision')}"
        for m in facts["hardware"]
    )
    each = ", ".join(
        f"{Path(cost['recipe']).stem} {duration(cost['seconds'])} ({money(cost['usd'])}, seeds: {cost['seeds']})"
        for cost in facts["runs"]
        if cost["seeds"]
    )
    return (
        f"It took {duration(facts['seconds'])} and {money(facts['usd'])} on: {machines}. By recipe: {each}. "
        f"Code: {', '.join(facts['code'])}."
    )


def _section(row: Mapping[str, Any], plot: bool) -> str:
    lines = [f"## {row['claim']}\n", f"{row['text']}.\n" if not row["text"].endswith(".") else f"{row['text']}\n"]
    facts = [("source", row["source"]), ("published", row["published"]), ("ours", _ours(row)), ("rule", rule(row))]
    facts.append(("reproduced", f"**{row['reproduced']}**"))
    if row["rule_changed"]:
        facts.append(("caution", f"the rule was changed after runs had begun: {', '.join(row['rule_changed'])}"))
    facts += [(label, f"{value:.5g}") for label, value in row["show"].items()]
    facts += [("missing", text) for text in row["missing"]] + [("warning", text) for text in row["warnings"]]
    facts.append(("recipe", f"`{row['recipe']}`: {row['rule']['ours']}" + _compared(row["rule"])))
    lines += ["\n".join(f"- {key}: {text}" for key, text in facts if text) + "\n"]
    if row["values"]:
        head = ["seed", *([row["labels"][0]] if row["values"][0]["against"] is not None else []), row["labels"][1]]
        head += [row["rule"]["compare"]] if row["rule"]["compare"] != "value" else []
        lines.append(
            "\n".join([_cells(head), _cells(["---"] * len(head)), *(_cells(_values(v, row)) for v in row["values"])])
            + "\n"
        )
    if plot:
        lines.append(f"![{row['claim']}]({PLOTS}/{row['claim']}.svg)\n")
    if row["note"]:
        lines.append(f"{row['note']}\n")
    return "\n".join(lines) + "\n"


def _compared(rule: Mapping[str, Any]) -> str:
    word = {"difference": "minus", "change": "relative to", "ratio": "over"}.get(rule["compare"])
    tail = f", mean of the last {percent(rule['tail'], 0)} of the steps" if rule["tail"] else ""
    return (f" {word} {rule['against']}" if word else "") + tail


def _values(value: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    cells = [str(value["seed"])]
    if value["against"] is not None:
        cells.append(measured(value["against"], row["unit"]))
    cells.append(measured(value["ours"], row["unit"]))
    return cells if row["rule"]["compare"] == "value" else [*cells, effect(value["effect"], row)]


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ours(row: Mapping[str, Any]) -> str:
    if row["ours"] is None:
        return NONE
    if row["interval"] is None:
        return effect(row["ours"], row)
    low, high = (effect(end, row) for end in row["interval"])
    return f"{effect(row['ours'], row)} [{low}, {high}], seeds: {row['seeds']}"


def rule(row: Mapping[str, Any]) -> str:
    """The rule in words."""
    above, below = (None if row["rule"][key] is None else effect(row["rule"][key], row) for key in ("above", "below"))
    if above is not None and below is not None:
        return f"between {above} and {below}"
    return f"above {above}" if below is None else f"below {below}"


def measured(value: float, unit: str) -> str:
    return percent(value) if unit == "%" else f"{value:.4g}"


def effect(value: float, row: Mapping[str, Any]) -> str:
    """An effect with its unit: points are differences of percentages."""
    compare = row["rule"]["compare"]
    if compare == "ratio":
        return f"{value:.3g}×"
    if compare == "value":
        return measured(value, row["unit"])
    if value == 0 or math.isclose(value, 0, abs_tol=1e-12):
        return "0"
    share = compare == "change" or row["unit"] == "%"
    text = f"{100 * value:+.2f}" if share else f"{value:+.3g}"
    return text.replace("-", "−") + (" %" if compare == "change" else " points" if share else "")
