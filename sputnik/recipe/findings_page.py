"""The findings card on paper: findings.json for programs, findings.md and its plots for people.

`write_card(card, run, kind_of)` reads the runs of every seed (findings_facts.py) and writes the three into `runs/NAME`,
and into the card's `out` if it has one. The page is a function of the JSON alone (`page`), the plots are drawn from the
logs; the plot of a claim none of whose runs is at hand stays as it is.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sputnik.files import write_whole
from sputnik.recipe import plots
from sputnik.recipe.findings import Card, KindOf
from sputnik.recipe.findings_claim import Claim, Metric
from sputnik.recipe.findings_facts import gather
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
a recipe, `--seeds 3,4` these seeds; the others stay as they stand here while their recipe is the same. `--set seeds=1`
is a quick look. The same in numbers: `findings.json`.

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


def write_card(card: Card, run: Path, kind_of: KindOf, drawn: bool = True) -> Path:
    """Write card and plots into `run` and `card.out`; returns the page in `run`. `drawn` False: leave the plots as they
    are, which is for in between."""
    facts = gather(card, run, kind_of)
    folders = [run] if card.out is None else [run, card.out]
    drawings = _drawings(card, run, facts) if drawn else {}
    for row in facts["claims"] if card.out else ():
        old = folders[-1] / PLOTS / f"{row['claim']}.svg"
        if row["values"] and f"{row['claim']}.svg" not in drawings and old.is_file():
            drawings[old.name] = old.read_text(encoding="utf-8")
    facts["plots"] = sorted(drawings) if drawn else sorted(path.name for path in (run / PLOTS).glob("*.svg"))
    for folder in folders:
        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
        for name, svg in drawings.items():
            write_whole(folder / PLOTS / name, svg)
        write_whole(folder / "findings.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        write_whole(folder / "findings.md", page(facts))
    return run / "findings.md"


# --- plots -----------------------------------------------------------------------------------------------------------


def _drawings(card: Card, run: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    """File name -> plot: one for every claim with numbers of runs that are at hand, and one of all intervals."""
    rows = {row["claim"]: row for row in facts["claims"]}
    found = {}
    for source in card.sources:
        for claim in source.claims:
            if len(rows[claim.name]["values"]) > len(rows[claim.name]["kept"]):
                found[f"{claim.name}.svg"] = draw(claim, rows[claim.name], run / source.name)
    if any(row["interval"] for row in rows.values()):
        found["overview.svg"] = overview(facts["claims"])
    return {name: plots.standalone(svg) for name, svg in found.items()}


def draw(claim: Claim, row: Mapping[str, Any], folder: Path) -> str:
    """Curves over steps where the claim names some, of the seeds whose logs are at hand; else one line per seed from
    what it is compared with to ours."""
    seeds = [folder / f"seed-{value['seed']}" for value in row["values"] if value["seed"] not in row["kept"]]
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
        f"{m.get('cpu')}, threads: {m.get('threads')}, torch {m.get('torch')}, {m.get('precision')}"
        for m in facts["hardware"]
    )
    recipes = dict.fromkeys(cost["recipe"] for cost in facts["runs"])
    each = ", ".join(_cost(recipe, [cost for cost in facts["runs"] if cost["recipe"] == recipe]) for recipe in recipes)
    return (
        f"It took {duration(facts['seconds'])} and {money(facts['usd'])} on: {machines}. By recipe: {each}. "
        f"Code: {', '.join(facts['code'])}."
    )


def _cost(recipe: str, costs: Sequence[Mapping[str, Any]]) -> str:
    seeds = len({seed for cost in costs for seed in cost["seeds"]})
    seconds, usd = (sum(cost[key] for cost in costs) for key in ("seconds", "usd"))
    return f"{Path(recipe).stem} {duration(seconds)} ({money(usd)}, seeds: {seeds})"


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
        shown = [value["seed"] for value in row["values"] if value["seed"] not in row["kept"]]
        if row["kept"] and shown and row["curves"]:
            lines.append(f"The curves are of seeds {', '.join(map(str, shown))}.\n")
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
