"""`sputnik eval MODEL_OR_URL --suite NAME`: a score with its interval, verdict counts and settings.

sputnik eval runs/quickstart --task arithmetic --questions 200 --samples 8 --out scores.json
sputnik eval http://localhost:8000/v1 --suite gsm8k-100 --out scores.json      # the same command goes on after a kill
sputnik eval runs/a --against runs/b --task arithmetic                         # also of two saved results
sputnik eval runs/quickstart --task arithmetic --scaling --out scores.json
sputnik eval scores.json --published stages
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.progress import Progress
from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from sputnik.cli.console import Console
from sputnik.config import refuse_changed, set_by_path
from sputnik.errors import ConfigError
from sputnik.eval.client import Endpoint, EndpointConfig
from sputnik.eval.compare import Comparison, compare
from sputnik.eval.published import beside, table, tables
from sputnik.eval.results import EvalResult, load_result
from sputnik.eval.scaling import Scaling
from sputnik.eval.stats import Interval
from sputnik.recipe.evaluation import EvalConfig, Examination, examination, open_local
from sputnik.tasks.base import Split
from sputnik.train.state import write_json


@dataclass(frozen=True)
class EvalModelConfig:
    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = ""
    """A checkpoint directory, a GGUF file, a run, the name of a run or a model (smollm2), the URL of an
    OpenAI-compatible API, or a saved result (.json)."""
    suite: str = ""
    """arithmetic, countdown, gsm8k-100, aime-2025, gpqa-diamond-25, ..., gym:FAMILY, or a FILE.jsonl of your own."""
    task: str = ""
    """Instead: arithmetic, countdown, gym:NAME, math:FILE.jsonl, choice:FILE.jsonl, or the path of a task file."""
    option: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE of the task, for example largest=5; may be repeated."""
    split: Split | None = None
    questions: int | None = None
    samples: int | None = None
    """Answers to each question; pass@1 is their mean."""
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int | None = None
    thinking_budget: int | None = None
    """Tokens after which a thought is closed."""
    template: Literal["auto", "chat", "zero", "own"] = "auto"
    """auto: the one the model was taught."""
    precision: str = "auto"
    seed: int = 0
    out: Path | None = None
    """Write the result there as JSON, and every answer to a .samples.jsonl beside it, where a second run goes on."""
    against: str = ""
    """A second model, URL or saved result to compare with on the same questions."""
    scaling: bool = False
    """Accuracy against thinking budget and number of samples, too; JSON beside `out`."""
    budgets: tuple[int, ...] = ()
    """Thinking budgets for --scaling; derived from the model's thoughts if none are given."""
    published: str = ""
    """A table of the V3 and R1 reports (v3-base, v3, zero, r1, stages, contests, distilled, all), ours beside it."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    def settings(self) -> EvalConfig:
        options: dict[str, object] = {}
        for assignment in self.option:
            set_by_path(options, assignment)
        shared = ("suite", "task", "split", "questions", "samples", "temperature", "top_p", "max_tokens",
                  "thinking_budget", "template", "precision", "seed", "scaling", "budgets")  # fmt: skip
        return EvalConfig(task_options=options, **{name: getattr(self, name) for name in shared})


def main(config: EvalModelConfig) -> int:
    console = Console()
    specs = [spec for spec in (config.model, config.against) if spec]
    _check(config, specs)
    named = [each.name for each in tables()] if config.published == "all" else [config.published]
    published = [table(name).name for name in named if name]  # a name that does not exist is no news after an hour
    results = _results(config, specs, console)
    if len(results) == 2:
        comparison = compare(*results)
        console.print(comparison_table(comparison))
        if config.out is not None:
            write_json(_beside(config.out, "comparison"), comparison.to_dict())
    for name in published:
        console.print(published_table(name, results))
    failed = sum(result.failed for result in results)
    if failed:
        console.print(f"{failed} requests failed: the same command with --out asks them again", style="red")
    return 1 if failed else 0


def _check(config: EvalModelConfig, specs: list[str]) -> None:
    """Refuse what would be ignored."""
    remote, saved = [any(test(spec) for spec in specs) for test in (_remote, _saved)]
    all_saved = all(map(_saved, specs))
    for wrong, text in (
        (
            not specs and not config.published,
            "name a model to evaluate: a checkpoint, a run, a name, a URL or a saved result",
        ),
        (config.against and not config.model, "--against compares a model with another: name that one, too"),
        (remote and config.scaling, "--scaling sets thinking budgets, which needs models on our own engine, not a URL"),
        (
            config.endpoint != EndpointConfig() and not remote,
            "--endpoint settings are those of a URL, and there is none",
        ),
        (
            all_saved and (config.task or config.suite or config.scaling),
            "a saved result is not evaluated again: leave out --task, --suite and --scaling, or name a model",
        ),
        (all_saved and config.out and len(specs) < 2, "--out: there is nothing new to write"),
        (config.out and config.out.is_dir(), f"--out {config.out}: name a file, not a directory"),
        (saved and config.scaling, "--scaling needs models, not saved results"),
    ):
        if wrong:
            raise ConfigError(text)
    if all_saved:
        asking = ("option", "split", "questions", "samples", "temperature", "top_p", "max_tokens", "thinking_budget",
                  "template", "precision", "seed", "budgets")  # fmt: skip
        refuse_changed(config, asking, "is for asking models, and there is none to ask")


def _results(config: EvalModelConfig, specs: list[str], console: Console) -> list[EvalResult]:
    saved = {spec: load_result(Path(spec)) for spec in specs if _saved(spec)}
    for spec, result in saved.items():
        _show(console, result, spec)
    if all(spec in saved for spec in specs):
        return [saved[spec] for spec in specs]
    with examination(config.settings()) as exam:
        return [
            saved[spec] if spec in saved else _evaluated(config, exam, spec, second=place > 0, console=console)
            for place, spec in enumerate(specs)
        ]


def _evaluated(config: EvalModelConfig, exam: Examination, spec: str, second: bool, console: Console) -> EvalResult:
    """Ask one model; with `out` its result, answers and curves are written beside each other."""
    out = config.out and (_beside(config.out, "against") if second else config.out)
    local = None if _remote(spec) else open_local(spec, exam.config, exam.params)
    model = local or Endpoint(spec, config.endpoint, exam.params)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("questions", total=len(exam.problems))

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        result = exam.run(model, out and out.with_suffix(".samples.jsonl"), show)
        scaling = None
        if config.scaling and local is not None:
            files = out and (lambda name: out.with_suffix(f".{name}.jsonl"))
            scaling = exam.scale(local, result, files or None, show)
    _show(console, result, spec)
    if scaling is not None:
        console.print(scaling_table(scaling))
    if out is not None:
        write_json(out, result.to_dict())
        if scaling is not None:
            write_json(_beside(out, "scaling"), scaling.to_dict())
    return result


def _saved(spec: str) -> bool:
    return spec.endswith(".json") and Path(spec).is_file()


def _remote(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def _beside(out: Path, what: str) -> Path:
    return out.with_suffix(f".{what}.json")


def _show(console: Console, result: EvalResult, title: str) -> None:
    console.print(score_table(result, title))
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow")


def score_table(result: EvalResult, title: str) -> Table:
    """Every score with what it was measured with."""
    lines = Table(title=title, title_justify="left", show_header=False)
    rows = [
        ("pass@1", str(result.pass_at_1)),
        (f"cons@{result.k}", str(result.cons_at_k)),
        *((f"pass@{k}", str(score)) for k, score in result.pass_at_k.items() if k != "1"),
        *((f"pass@1, {name}", str(score)) for name, score in result.families.items()),
        ("best constant answer", f"{100 * result.best_constant.accuracy:.1f} % ({result.best_constant.answer!r})"),
        *([("chance", f"{100 * result.chance:.1f} %")] if result.chance is not None else []),
        ("verdicts", ", ".join(f"{name} {count}" for name, count in result.verdicts.items() if count)),
        ("truncated", f"{100 * result.truncated:.1f} %"),
        ("mean length", f"{result.length:.1f} tokens, of these thinking {result.thinking_length:.1f}"),
        ("task", f"{result.task}, version {result.task_version}"),
        ("template", f"{result.template} {result.template_hash}"),
        ("decoding", ", ".join(f"{key} {value}" for key, value in result.decoding.items())),
        *([("usage", ", ".join(f"{key} {value:,}" for key, value in result.usage.items()))] if result.usage else []),
        ("speed", f"{result.tokens_per_s:.0f} tokens/s, {result.seconds:.1f} s in all"),
    ]
    for row in rows:
        lines.add_row(*row)
    return lines


def comparison_table(comparison: Comparison) -> Table:
    """The difference with everything needed to doubt it."""
    gap = comparison.difference
    lines = Table(title=f"{comparison.second} against {comparison.first}", title_justify="left", show_header=False)
    both = f"both always right on {comparison.both_all}, never on {comparison.both_none}"
    rows = [
        ("difference of pass@1", f"{_percent(gap, '+')} points"),
        ("sign-flip test", f"p = {comparison.p:.2g} over {gap.n} common questions"),
        ("questions", f"second better on {comparison.second_better}, first better on {comparison.first_better}"),
        ("", f"{both}, else equal on {comparison.same}"),
    ]
    if comparison.left_out:
        rows.append(("left out", f"{comparison.left_out} questions that only one was judged on"))
    rows += [("not alike", text) for text in comparison.unlike]
    for row in rows:
        lines.add_row(*row)
    return lines


def scaling_table(scaling: Scaling) -> Group:
    """A row a way of forcing; then the curves over the number of samples."""
    title = f"test-time scaling of {scaling.model} (n={scaling.n}, k={scaling.k})"
    forced = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("thought", "tokens", "pass@1, %", f"cons@{scaling.k}", "gain, points"):
        forced.add_column(name)
    for point in scaling.points:
        way = f"at most {point.budget}" if point.budget is not None else f"Wait x {point.extend}"
        forced.add_row(
            way if point.budget is not None or point.extend else "free",
            f"{point.thinking_length:.1f}",
            _percent(point.pass_at_1),
            f"{100 * point.cons_at_k.mean:.1f}",
            _percent(point.gain, "+"),
        )
    drawn = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("samples", "one right (pass@k), %", "the vote right (cons@k), %"):
        drawn.add_column(name)
    for k, score in scaling.pass_at_k.items():
        drawn.add_row(k, _percent(score), _percent(scaling.cons_at_k[k]))
    return Group(forced, drawn)


def _percent(score: Interval, sign: str = "") -> str:
    return "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(*(100 * x for x in (score.mean, score.low, score.high)), s=sign)


def published_table(name: str, ours: list[EvalResult]) -> Table:
    """A table of the reports; a row a model where there are more models than benchmarks."""
    published = table(name)
    grid = beside(published, ours)
    rows = [grid.columns, *grid.rows]
    if len(grid.columns) > len(rows):
        rows = list(zip(*rows, strict=True))
    lines = Table(title=published.title, title_justify="left", caption="\n".join(grid.notes), caption_justify="left")
    for column in rows[0]:
        lines.add_column(column, overflow="fold")
    for row in rows[1:]:
        lines.add_row(*row)
    return lines
