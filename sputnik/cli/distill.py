"""`sputnik distill STUDENT --teacher TEACHER --task TASK --out DIR`: a small model learns from what a larger one wrote.

The teacher answers questions of the task, its right and readable answers are kept (docs/traces.md), and the student is
fine-tuned on them (docs/sft.md). The teacher may be an OpenAI-compatible URL; with `--data FILE` in its place, traces
made before are learned. The same command again continues. DIR/traces holds the traces, DIR/checkpoint is the student.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from sputnik.cli.console import Console
from sputnik.cli.sft import tune
from sputnik.config import from_dict, refuse_changed, set_by_path
from sputnik.cost import Meter
from sputnik.errors import ConfigError
from sputnik.hardware import fleet
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.train.sft import SFTConfig
from sputnik.train.traces import TracesConfig, collect_traces


@dataclass(frozen=True, kw_only=True)
class DistillConfig(SFTConfig):
    student: Annotated[Positional[str], arg(metavar="STUDENT")]
    """A checkpoint directory, a GGUF file, a run, or the name of a run or a model (smollm2)."""
    out: Path
    """The directory to work in: DIR/checkpoint is the student, DIR/traces what it learned from."""
    teacher: str | None = None
    """A model, named as the student is, or the URL of an OpenAI-compatible API."""
    task: str | None = None
    """Whose questions the teacher answers: a name, gym:NAME, math:FILE.jsonl, mix, or a task file of your own."""
    option: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE of the task; may be repeated."""
    questions: int = 1000
    samples: int = 8
    """Answers to each question, of which one right and readable one is kept."""
    max_tokens: int = 256
    """Longest of the teacher's answers, thinking included."""
    traces: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE for the rest of `TracesConfig`, for example keep=4 or endpoint.model=NAME; may be repeated."""
    template: str = "auto"
    """The student's: chat, zero or own; auto: what it was taught, else the template that its tokenizer brings."""
    hardware: str = "cpu"
    """Whose price is counted: cpu, H100, 8xH800 ..."""

    def __post_init__(self) -> None:
        """Left to `tune`: while flags are parsed, an error would be a box instead of a line."""


def main(config: DistillConfig) -> None:
    console = Console()
    files = [Path(file) for file in config.data]
    if (config.teacher is None) != (config.task is None) or not (files or config.teacher):
        raise ConfigError("give --teacher MODEL and --task TASK, or traces made before: --data FILE; or both")
    if config.teacher is None:
        asking = ("option", "questions", "samples", "max_tokens", "traces")
        refuse_changed(config, asking, "is for asking a teacher: name one with --teacher, or leave it out")
    else:
        files.append(_collect(config, config.teacher, console))
    tune(config, config.student, files, config.out, console, config.hardware)
    console.print(f"talk to it: sputnik chat {config.out}", highlight=False, soft_wrap=True)


def _collect(config: DistillConfig, teacher: str, console: Console) -> Path:
    """The file of traces."""
    settings: dict[str, Any] = {"task_options": {}}
    for name in ("task", "questions", "samples", "max_tokens", "seed"):
        settings[name] = getattr(config, name)
    for assignment in config.option:
        set_by_path(settings["task_options"], assignment)
    path = None
    if teacher.startswith(("http://", "https://")):
        settings["url"] = teacher
    else:
        found = find_checkpoint(teacher)
        path, settings["template"] = found.path, "zero" if found.template == "zero" else "auto"
    for assignment in config.traces:
        set_by_path(settings, assignment)
    counts = collect_traces(
        from_dict(TracesConfig, settings, "--traces"),
        path,
        config.out / "traces",
        Meter(*fleet(config.hardware)),
        console,
    )
    console.print(f"{counts['kept']} of {counts['samples']} answers kept", highlight=False)
    return config.out / "traces" / "data.jsonl"
