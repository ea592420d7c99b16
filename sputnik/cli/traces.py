"""`sputnik traces MODEL --task TASK --out FILE.jsonl`: a model's right, readable answers as examples to train on.

    sputnik traces runs/quickstart --task arithmetic --option non_negative=true --questions 500 --out cold-start.jsonl
    sputnik traces runs/mine --task math:questions.jsonl --keep 4 --prefer diverse --out mine.jsonl
    sputnik traces https://api.deepseek.com --endpoint.model deepseek-reasoner --task gym:gcd --out teacher.jsonl

FILE appears when all is asked. The folder FILE.traces beside it fills from the start: what was rejected and why, the
counts, and what a killed run needs to go on when the same command is given again.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from sputnik.cli.console import Console
from sputnik.config import set_by_path, to_dict
from sputnik.cost import Meter
from sputnik.errors import ConfigError
from sputnik.eval.client import EndpointConfig
from sputnik.files import replace_file
from sputnik.hardware import fleet
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.train.selection import Prefer
from sputnik.train.traces import TracesConfig, collect_traces


@dataclass(frozen=True)
class TracesVerbConfig:
    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A checkpoint directory, a GGUF file, a run, the name of a run or a model, or the URL of an OpenAI-compatible
    API."""
    task: str
    """arithmetic, ladder:NAME, gym:NAME, math:FILE.jsonl with your questions and answers, mix, or a task file."""
    out: Path
    """The examples, one line of JSON each."""
    option: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE of the task, for example largest=5; may be repeated."""
    instruction: str = ""
    """Added to each question when it is asked, and no part of the examples."""
    questions: int = 1000
    samples: int = 8
    """Of each question."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    keep: int = 1
    """At most so many of a question."""
    prefer: Prefer = "short"
    per_family: int | None = None
    """At most so many of each family of a mixture."""
    checks: float = 0.0
    """Share of thoughts that check themselves to aim at."""
    reworded: float = 0.0
    """Share of the examples with their question in other words, which arithmetic and the ladder know."""
    readable: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE of what a thought must be like: language=en, repeats=0.2, paragraph=1000, code_blocks=false, ..."""
    sentences: bool = True
    """Say answers as plain sentences; else as the model wrote them."""
    template: Literal["auto", "chat", "zero", "own"] = "auto"
    """auto: the one the model was taught."""
    seed: int = 0
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    def settings(self) -> TracesConfig:
        shared = ("task", "instruction", "questions", "samples", "temperature", "top_p", "max_tokens", "keep", "prefer",
                  "per_family", "checks", "reworded", "sentences", "template", "seed")  # fmt: skip
        plain = EndpointConfig()
        changed = {key: value for key, value in to_dict(self.endpoint).items() if value != to_dict(plain)[key]}
        return TracesConfig(
            task_options=_table(self.option),
            readable=_table(self.readable),
            url=self.model if self.remote else "",
            endpoint=changed,
            **{name: getattr(self, name) for name in shared},
        )

    @property
    def remote(self) -> bool:
        return self.model.startswith(("http://", "https://"))


def main(config: TracesVerbConfig) -> None:
    settings, folder = config.settings(), config.out.with_name(f"{config.out.name}.traces")
    if config.out.exists() and not (folder / "data.jsonl").is_file():
        raise ConfigError(f"--out {config.out} is there already and was not made here: give another")
    checkpoint = None
    if not config.remote:
        found = find_checkpoint(config.model)
        checkpoint = found.path
        if settings.template == "auto" and found.template == "zero":
            settings = TracesConfig(**{**vars(settings), "template": "zero"})
    console = Console()
    counts = collect_traces(settings, checkpoint, folder, Meter(*fleet("cpu")), console)
    with replace_file(config.out) as draft:
        shutil.copyfile(folder / "data.jsonl", draft)
    console.print(counts_table(counts, str(config.out)))


def counts_table(counts: Mapping[str, Any], title: str) -> Table:
    """What was kept, what was not and why, by family where there are several."""
    table = Table(title=title, title_justify="left", show_header=False)
    reasons = {reason: count for reason, count in counts["reasons"].items() if reason != "kept"}
    rows = [
        ("kept", f"{counts['kept']} of {counts['samples']} samples of {counts['questions']} questions"),
        ("rejected", ", ".join(f"{reason} {count}" for reason, count in reasons.items()) or "none"),
        ("mean length", f"{counts['length']:.1f} tokens"),
        ("thoughts that check themselves", f"{100 * counts['checks']:.1f} %"),
        *([("usage", ", ".join(f"{key} {value:,}" for key, value in counts["usage"].items()))] * bool(counts["usage"])),
    ]
    if len(counts["families"]) > 1:
        for name, own in counts["families"].items():
            rows.append((f"  {name}", f"kept {own['kept']}, correct {own['correct']} of {own['samples']}"))
    for row in rows:
        table.add_row(*row)
    return table


def _table(assignments: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for assignment in assignments:
        set_by_path(found, assignment)
    return found
