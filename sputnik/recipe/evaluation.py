"""The evaluation stage: a checkpoint on unseen questions of a task or a suite, and its test-time scaling.

    STAGE/eval.json     scores with intervals and settings, one answer to each question for the report
    STAGE/samples.jsonl every answer; a killed stage goes on from here
    STAGE/samples.md    the first few to read
    STAGE/scaling.json  accuracy against thinking budget and number of samples, with `scaling = true`

`sputnik eval` runs the same functions on models outside any recipe.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress

from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.errors import ConfigError
from sputnik.eval.harness import Model, examine
from sputnik.eval.models import Local, fingerprint
from sputnik.eval.results import EvalResult
from sputnik.eval.scaling import Scaling, scale
from sputnik.eval.suites import Suite, find_suite
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.recipe.runner import StageContext
from sputnik.tasks.base import Problem, Split, Task, load_task, self_check
from sputnik.tasks.verify import VerifierPool
from sputnik.train.state import write_json

SHOWN = 12
Progressing = Callable[[int, int], None]


@dataclass(frozen=True)
class EvalConfig:
    """What is None comes from the suite; for a plain task 200 questions, 8 samples and 256 tokens. Temperature and
    top_p are those of R1's evaluation unless set."""

    task: str = ""
    suite: str = ""
    """Instead of a task: a name of eval/suites.py, gym:FAMILY or a FILE.jsonl."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    split: Split | None = None
    questions: int | None = None
    samples: int | None = None
    """Answers to each question; pass@1 is their mean."""
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int | None = None
    thinking_budget: int | None = None
    template: Literal["auto", "chat", "zero", "own"] = "auto"
    """auto: the one the model was taught."""
    precision: str = "auto"
    workers: int = 1
    seed: int = 0
    scaling: bool = False
    budgets: tuple[int, ...] = ()
    """Thinking budgets for `scaling`; empty: derived from the thoughts of the model."""

    def __post_init__(self) -> None:
        if bool(self.task) == bool(self.suite):
            raise ConfigError("an evaluation needs a task or a suite, and not both")
        if self.budgets and not self.scaling:
            raise ConfigError("budgets are those of scaling: write scaling = true, too")
        if self.scaling and self.thinking_budget is not None:
            raise ConfigError("scaling tries several thinking budgets: leave out thinking_budget")

    def params(self, suite: Suite) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=suite.max_tokens if self.max_tokens is None else self.max_tokens,
            thinking_budget=self.thinking_budget,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Examination:
    """A task that has passed its self-check, its questions, its judges: ready to ask models."""

    config: EvalConfig
    task: Task
    pool: VerifierPool
    problems: list[Problem]
    params: SamplingParams
    samples: int

    def run(self, model: Model, samples_to: Path | None = None, on_progress: Progressing | None = None) -> EvalResult:
        result = examine(
            model, self.task, self.pool, self.problems, k=self.samples, samples_to=samples_to, on_progress=on_progress
        )
        return dataclasses.replace(result, suite=self.config.suite)

    def scale(
        self,
        model: Local,
        free: EvalResult,
        samples_to: Callable[[str], Path] | None = None,
        on_progress: Progressing | None = None,
    ) -> Scaling:
        """`free`: the result of `run`, which is the middle of the curve."""
        return scale(
            model,
            self.task,
            self.pool,
            self.problems,
            k=self.samples,
            budgets=self.config.budgets,
            free=free,
            samples_to=samples_to,
            on_progress=on_progress,
        )


@contextmanager
def examination(config: EvalConfig) -> Iterator[Examination]:
    """TaskError if the task's own gold answers do not earn what they should."""
    suite = find_suite(config.suite) if config.suite else Suite(config.task, 200, 8, 256)
    options = {**suite.options, **config.task_options}
    task = load_task(suite.task, options)
    questions = suite.questions if config.questions is None else config.questions
    problems = task.problems(config.split or suite.split, questions, config.seed)
    samples = suite.samples if config.samples is None else config.samples
    with VerifierPool(suite.task, options, config.workers) as pool:
        self_check(task, verify=pool.verify)
        yield Examination(config, task, pool, problems, config.params(suite), samples)


def open_local(spec: str, config: EvalConfig, params: SamplingParams, name: str = "") -> Local:
    """The model meant by `spec` on our engine."""
    found = find_checkpoint(spec)
    taught: Literal["auto", "zero"] = "zero" if found.template == "zero" else "auto"
    llm = LLM(found.path, taught if config.template == "auto" else config.template, precision=config.precision)
    return Local(llm, params, name or spec, fingerprint(found.path))


def evaluate_checkpoint(
    checkpoint: Path,
    config: EvalConfig,
    samples_to: Path | None = None,
    on_progress: Progressing | None = None,
) -> EvalResult:
    """Try the task, load, ask, judge."""
    with examination(config) as exam:
        return exam.run(open_local(str(checkpoint), config, exam.params), samples_to, on_progress)


def run_evaluation(config: EvalConfig, context: StageContext) -> dict[str, Any]:
    """Evaluate the parent's checkpoint."""
    if context.parent is None:
        raise ConfigError("an eval stage needs a parent with a checkpoint; write parent = NAME")
    out = context.directory
    with examination(config) as exam, Progress(console=context.console, transient=True) as progress:
        bar = progress.add_task("    questions")
        show = lambda done, total: progress.update(bar, completed=done, total=total)  # noqa: E731
        model = open_local(str(context.parent / "checkpoint"), config, exam.params, context.parent.name)
        result = exam.run(model, out / "samples.jsonl", show)
        scaling = None
        if config.scaling:
            (out / "scaling").mkdir(exist_ok=True)
            scaling = exam.scale(model, result, lambda name: out / "scaling" / f"{name}.jsonl", show)
    for warning in result.warnings:
        context.console.print(f"    warning: {warning}", style="yellow")
    firsts = [sample for sample in result.samples if sample["sample"] == 0]
    if scaling is not None:
        write_json(out / "scaling.json", scaling.to_dict())
    (out / "samples.md").write_text(samples_page(firsts[:SHOWN]), encoding="utf-8")
    write_json(out / "eval.json", {**result.to_dict(), "samples": firsts})
    return {"pass@1": str(result.pass_at_1), "cons@k": str(result.cons_at_k), "truncated": result.truncated}


def samples_page(samples: list[dict[str, Any]]) -> str:
    """Answers as Markdown, in fences because a model may write anything."""
    parts = ["# The first answers\n"]
    for sample in samples:
        parts.append(f"## {sample['verdict']}: gold {sample['gold']}\n")
        for title, key in (("question", "prompt"), ("completion", "completion")):
            parts.append(f"{title}\n\n````text\n{sample[key]}\n````\n")
    return "\n".join(parts)
