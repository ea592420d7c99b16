"""`sputnik rl MODEL --task TASK --out DIR`: teach a model to reason by rewards; docs/rl.md says what can be set.

    sputnik rl runs/mine --task examples/my_task.py --out runs/mine-rl --steps 200 --set lr=2e-5
    sputnik rl smollm2 --task gym:chain_sum --option max_terms=3 --option max_digits=1 --out runs/smol
    sputnik rl runs/dev3 --task math:mine.jsonl --judge runs/helpful --prompts open.jsonl --out runs/r1 \\
        --set rewards.general_from=60 --set rewards.language=1
    sputnik rl --task arithmetic --audit labelled.jsonl              # the verifier's error rates, nothing else

The same command again continues what was interrupted. The model is DIR/checkpoint; `sputnik chat DIR` talks to it. A
model without our dialogue tokens gets them first, into DIR/pretrained (train/adopt.py).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from rich.progress import Progress
from tyro.conf import Positional, UseAppendAction, arg

from sputnik.cli.console import Console
from sputnik.config import from_dict, refuse_changed, set_by_path
from sputnik.cost import Meter
from sputnik.errors import ConfigError
from sputnik.files import replace_directory
from sputnik.hardware import fleet
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.recipe.runner import duration
from sputnik.text.preferences import CARD
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.adopt import PretrainedConfig, adopt_checkpoint
from sputnik.train.audit import audit_file, audit_table
from sputnik.train.rl import RLConfig, train_rl
from sputnik.train.state import read_jsonl


@dataclass(frozen=True)
class RlVerbConfig:
    model: Annotated[Positional[str | None], arg(metavar="[MODEL]")] = None
    """A checkpoint directory, a GGUF file, a run, or the name of a run or a model (smollm2)."""
    task: str = "arithmetic"
    """arithmetic, countdown, gym:NAME, math:FILE.jsonl, mix, or the path of a task file of your own."""
    out: Path | None = None
    """The directory to train in: DIR/checkpoint is the model."""
    option: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE of the task, for example largest=5; may be repeated."""
    steps: int = RLConfig.steps
    template: str | None = None
    """chat or zero; default: the one the model was trained with."""
    max_tokens: int = RLConfig.max_tokens
    """Limit of an answer, thought included."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE of any other setting: lr=1e-4, switches.kl_beta=0, rewards.language=1; may be repeated."""
    judge: UseAppendAction[tuple[Path, ...]] = ()
    """Directory of a reward model, for open prompts: one that judges help, one that judges safety, or both."""
    prompts: UseAppendAction[tuple[Path, ...]] = ()
    """A JSONL file of open prompts; rewards.general_from says from which step on they take part."""
    audit: Path | None = None
    """Labelled answers to measure the verifier's errors with; without a model, nothing else is done."""
    seed: int = 0
    hardware: str = "cpu"
    """Whose price is counted: cpu, H100, 8xH800 ..."""

    def settings(self, template: str) -> RLConfig:
        table: dict[str, Any] = {}
        for assignment in self.set:
            set_by_path(table, assignment)
        flags = {"task": self.task, "steps": self.steps, "max_tokens": self.max_tokens, "seed": self.seed}
        if twice := [key for key in [*flags, "task_options", "template"] if key in table]:
            raise ConfigError(f"--set {twice[0]}=...: {twice[0]} has a flag of its own")
        return from_dict(RLConfig, {**table, **flags, "task_options": self.options(), "template": template}, "--set")

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for assignment in self.option:
            set_by_path(options, assignment)
        return options


def main(config: RlVerbConfig) -> None:
    console = Console()
    if config.model is None:
        if config.audit is None:
            raise ConfigError("sputnik rl: name a model to train, or a labelled set to --audit the verifier with")
        training = [field.name for field in fields(config) if field.name not in ("model", "task", "option", "audit")]
        refuse_changed(config, training, "is for training: name a model, or leave it out")
        console.print(audit_table(audit_file(config.task, config.options(), config.audit)))
        return
    if config.out is None:
        raise ConfigError("sputnik rl: say with --out DIR where the trained model is to go")
    parent, template = _parent(config.model, config.out, console)
    template = config.template or template
    settings = config.settings(template)
    judges = [judge if (judge / CARD).is_file() else judge / "checkpoint" for judge in config.judge]
    meter = Meter(*fleet(config.hardware))
    train_rl(settings, parent, config.out, meter, console, judges=judges, prompts=config.prompts, labelled=config.audit)
    lines = [line for line in read_jsonl(config.out / "metrics.jsonl") if "validation" in line]
    before, after = (lines[place]["validation"]["mean"] for place in (0, -1))
    spent = f"{duration(meter.total.seconds)}, ${meter.total.usd:.4f}"
    console.print(f"validation {before:.1%} -> {after:.1%} in {spent}", highlight=False, soft_wrap=True)
    told = "" if template == "chat" else f" --template {template}"
    console.print(f"talk to it: sputnik chat {config.out}{told}", highlight=False, soft_wrap=True)


def _parent(spec: str, out: Path, console: Console) -> tuple[Path, str]:
    """The checkpoint to begin from, and its template; for a model of other makers one with our dialogue tokens."""
    found = find_checkpoint(spec)
    if Tokenizer.load(found.path).has_dialogue:
        return found.path, found.template
    home = out / "pretrained"
    if not home.exists():
        adoption = PretrainedConfig(source=str(found.path))
        with Progress(console=console, transient=True) as progress, replace_directory(home) as draft:
            bar = progress.add_task("dialogue tokens", total=adoption.steps)
            adopt_checkpoint(adoption, draft, lambda step, _: progress.update(bar, completed=step))
    return home / "checkpoint", found.template
