"""The figures of test-time scaling say what the numbers say."""

import json
from typing import Any

from sputnik.eval.stats import interval95
from sputnik.recipe.scaling_figures import scaling


def score(mean: float) -> dict[str, Any]:
    found = interval95([mean] * 50, [4] * 50)
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": 50, "k": 4}


def point(budget: int | None, extend: int, length: float, mean: float) -> dict[str, Any]:
    gain = {"mean": mean - 0.1, "low": mean - 0.15, "high": mean - 0.05}
    return {"budget": budget, "extend": extend, "thinking_length": length, "pass_at_1": score(mean), "gain": gain}


FACTS = {
    "points": [point(8, 0, 8.0, 0.1), point(64, 0, 60.0, 0.55), point(None, 0, 64.5, 0.6), point(None, 2, 150.0, 0.65)],
    "pass_at_k": {"1": score(0.6), "4": score(0.9)},
    "cons_at_k": {"1": score(0.6), "4": score(0.7)},
    "k": 4,
}


def test_captions_are_computed_from_the_points() -> None:
    budget, samples = scaling("r1-eval", json.loads(json.dumps(FACTS)))
    caption = budget.caption.replace("\u00a0", " ")
    assert caption == (
        "10.0 % with 8 tokens of thought, 60.0 % with 64.5 tokens of thought: 50.0 points more [45.0, 55.0], taken "
        "question by question. Drawn out: 65.0 % with 150 tokens of thought."
    )
    assert samples.caption.replace("\u00a0", " ") == (
        "An answer is right in 60.0 % of the cases, one of 4 in 90.0 %, the majority of 4 in 70.0 %."
    )
    for figure, legend in ((budget, ("cut short", "free", "drawn out by")), (samples, ("pass@k", "cons@k"))):
        assert all(words in figure.svg for words in legend) and figure.name.startswith("r1-eval-")


def test_a_curve_without_extensions_says_nothing_of_them() -> None:
    budget, _ = scaling("x", {**FACTS, "points": FACTS["points"][:3]})  # type: ignore[index]
    assert "Drawn out" not in budget.caption and "drawn out" not in budget.svg
