"""Test-time scaling: accuracy against thinking budget, and pass@k and cons@k against k.

    scaling = scale(model, task, pool, problems, k=8)
    write_whole(path, json.dumps(scaling.to_dict()))

Budgets are forced both ways (s1, 2501.19393): a thought is closed after so many tokens, or its end is replaced by
"Wait" so many times; the free run stands between. Where no budgets are given they follow the model: 1/16, 1/8, ... of
its longest thoughts. All points answer the same questions, and each says what it gains on the first, paired. The curves
over k are of the free run: pass@k is what a perfect judge of k answers would get, cons@k what a vote gets.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sputnik.errors import ConfigError
from sputnik.eval.compare import compare
from sputnik.eval.harness import examine
from sputnik.eval.models import RESERVE, Local
from sputnik.eval.results import EvalResult
from sputnik.eval.stats import Interval, cons_at_k
from sputnik.tasks.base import Problem, Task, Verdict, best_constant
from sputnik.tasks.verify import VerifierPool

STEPS = 5
EXTENSIONS = (1, 2, 4)


@dataclass(frozen=True)
class Point:
    """One way of forcing. Exactly one of `budget` and `extend` is set, or neither in the free run."""

    budget: int | None
    extend: int
    thinking_length: float
    """Mean tokens of a thought, as they came out."""
    pass_at_1: Interval
    cons_at_k: Interval
    truncated: float
    gain: Interval
    """pass@1 over that of the first point, question by question."""
    p: float


@dataclass(frozen=True)
class Scaling:
    """Everything the curves are drawn from, with its settings."""

    model: str
    task: str
    task_version: str
    template: str
    template_hash: str
    decoding: dict[str, Any]
    n: int
    k: int
    points: tuple[Point, ...]
    """By mean length of thought forced: budgets from small to large, the free run, extensions."""
    pass_at_k: dict[str, Interval]
    cons_at_k: dict[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def scale(
    model: Local,
    task: Task,
    pool: VerifierPool,
    problems: Sequence[Problem],
    *,
    k: int,
    budgets: Sequence[int] = (),
    extensions: Sequence[int] = EXTENSIONS,
    free: EvalResult | None = None,
    samples_to: Callable[[str], Path] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scaling:
    """`free`: the free run if it is there already. `samples_to` names the file of each point's answers."""
    if model.llm.thought is None:
        raise ConfigError(f"{model.name}: thinking budgets need a model with thoughts: this one has no such tags")
    baseline = free.best_constant if free is not None else best_constant(problems, pool.verify)

    def run(name: str, at: int, budget: int | None = None, extend: int = 0) -> EvalResult:
        params = model.params
        if budget is not None or extend:
            params = replace(params, thinking_budget=budget, extend=extend, answer_reserve=params.max_tokens // RESERVE)
        return examine(
            Local(model.llm, params, model.name, model.weights),
            task,
            pool,
            problems,
            k=k,
            samples_to=samples_to(name) if samples_to else None,
            on_progress=(lambda done, total: on_progress(at * total + done, total)) if on_progress else None,
            baseline=baseline,
        )

    natural = free or run("free", 0)
    budgets = sorted(budgets) or derived(natural)
    forced = [run(f"budget-{budget}", 1 + at, budget=budget) for at, budget in enumerate(budgets)]
    longer = [run(f"extend-{times}", 1 + len(budgets) + at, extend=times) for at, times in enumerate(extensions)]
    labels = [*((budget, 0) for budget in budgets), (None, 0), *((None, times) for times in extensions)]
    results = [*forced, natural, *longer]
    points = [_point(*label, result, results[0]) for label, result in zip(labels, results, strict=True)]
    return Scaling(
        model=natural.model,
        task=natural.task,
        task_version=natural.task_version,
        template=natural.template,
        template_hash=natural.template_hash,
        decoding=natural.decoding,
        n=natural.n,
        k=k,
        points=tuple(points),
        pass_at_k=natural.pass_at_k,
        cons_at_k=consensus(natural),
    )


def derived(natural: EvalResult) -> list[int]:
    """1/16, 1/8, ... 1 of a thought that is longer than nineteen in twenty, which such a budget leaves alone."""
    lengths = sorted(sample["thinking_length"] for sample in natural.samples)
    longest = lengths[min(len(lengths) - 1, 19 * len(lengths) // 20)]
    return sorted({max(1, longest >> step) for step in range(STEPS)})


def consensus(result: EvalResult) -> dict[str, Interval]:
    """cons@k by number of votes, as `pass_at_k`; the settings are those of the result."""
    judged = dict(result.questions)
    ballots: dict[str, list[tuple[str | None, bool]]] = {name: [] for name in judged}
    for sample in result.samples:
        if sample["problem_id"] in judged and sample["verdict"] != Verdict.ERROR:
            ballots[sample["problem_id"]].append((sample["vote"], sample["verdict"] == Verdict.CORRECT))
    return {k: cons_at_k(list(ballots.values()), int(k)) for k in result.pass_at_k}


def _point(budget: int | None, extend: int, result: EvalResult, first: EvalResult) -> Point:
    comparison = compare(first, result)
    return Point(
        budget=budget,
        extend=extend,
        thinking_length=result.thinking_length,
        pass_at_1=result.pass_at_1,
        cons_at_k=result.cons_at_k,
        truncated=result.truncated,
        gain=comparison.difference,
        p=comparison.p,
    )
