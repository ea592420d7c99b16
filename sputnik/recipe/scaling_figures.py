"""The figures of test-time scaling, from the scaling.json of an eval stage: thinking budget, and number of samples.

    for figure in scaling("r1-eval", read_json(stage.path / "scaling.json")): figure.svg, figure.caption

As in figures.py the sentences are computed from the numbers. One eval stage, one model; comparing models is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sputnik.recipe import plots
from sputnik.recipe.figures import Figure
from sputnik.recipe.plots import Dots, Line
from sputnik.recipe.wording import count, percent

Score = Mapping[str, Any]


def scaling(name: str, facts: Mapping[str, Any]) -> list[Figure]:
    """Two figures; `name` tells those of one stage from those of another."""
    return [budget(name, facts), samples(name, facts)]


def budget(name: str, facts: Mapping[str, Any]) -> Figure:
    """pass@1 against the tokens that thoughts really had, forced shorter and longer."""
    points = sorted(facts["points"], key=lambda point: point["thinking_length"])
    groups = (
        ("cut short", "blue", [point for point in points if point["budget"] is not None]),
        ("free", "ink", [point for point in points if point["budget"] is None and not point["extend"]]),
        ('drawn out by "Wait"', "amber", [point for point in points if point["extend"]]),
    )
    dots = [_dots(label, role, group, [p["thinking_length"] for p in group]) for label, role, group in groups if group]
    short = groups[0][2] + groups[1][2]
    line = Line("", [p["thinking_length"] for p in short], [p["pass_at_1"]["mean"] for p in short], "blue", False)
    first, last = short[0], short[-1]
    gain = [f"{100 * last['gain'][key]:.1f}" for key in ("mean", "low", "high")]
    caption = (
        f"{_right(first)}, {_right(last)}: {gain[0]} points more [{gain[1]}, {gain[2]}], taken question by question."
    )
    if groups[2][2]:
        caption += f" Drawn out: {_right(groups[2][2][-1])}."
    alt = f"Accuracy over {count(points[0]['thinking_length'])} to {count(points[-1]['thinking_length'])} tokens."
    svg = plots.curves(f"{name}-budget", [line], dots, unit="%", x_label="tokens")
    return Figure(f"{name}-budget", "Accuracy against thinking", alt, caption, svg)


def samples(name: str, facts: Mapping[str, Any]) -> Figure:
    """pass@k and cons@k of the free run over k."""
    groups = (
        ("one of k right (pass@k)", "teal", facts["pass_at_k"]),
        ("vote of k (cons@k)", "violet", facts["cons_at_k"]),
    )
    ks = [float(k) for k in facts["pass_at_k"]]
    dots = [_dots(label, role, [{"pass_at_1": s} for s in scores.values()], ks) for label, role, scores in groups]
    lines = [Line("", ks, [s["mean"] for s in scores.values()], role, False) for _, role, scores in groups]
    last = facts["k"]
    one, any_right, vote = (
        percent(facts[curve][k]["mean"])
        for curve, k in (("pass_at_k", "1"), ("pass_at_k", str(last)), ("cons_at_k", str(last)))
    )
    caption = (
        f"An answer is right in {one} of the cases, one of {last} in {any_right}, the majority of {last} in {vote}."
    )
    svg = plots.curves(f"{name}-samples", lines, dots, unit="%", x_label="samples")
    return Figure(f"{name}-samples", "Accuracy against samples", f"Accuracy over 1 to {last} samples.", caption, svg)


def _right(point: Mapping[str, Any]) -> str:
    return f"{percent(point['pass_at_1']['mean'])} with {count(point['thinking_length'])} tokens of thought"


def _dots(label: str, role: str, points: Sequence[Mapping[str, Any]], x: Sequence[float]) -> Dots:
    mean, low, high = ([point["pass_at_1"][key] for point in points] for key in ("mean", "low", "high"))
    return Dots(label, x, mean, low, high, role)
