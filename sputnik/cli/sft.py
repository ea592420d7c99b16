"""`sputnik sft MODEL --data FILE.jsonl --out DIR`: teach a model your dialogues; docs/sft.md says how the data looks.

What will be trained on is checked and shown first. The same command again continues what was interrupted. The model is
DIR/checkpoint; `sputnik chat DIR` talks to it.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from sputnik.cli.console import Console
from sputnik.cost import Meter
from sputnik.hardware import fleet
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.recipe.runner import duration
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.sft import SFTConfig, train_sft


@dataclass(frozen=True, kw_only=True)
class SftVerbConfig(SFTConfig):
    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A checkpoint directory, a GGUF file, a run, or the name of a run or a model (smollm2)."""
    out: Path
    """The directory to train in: DIR/checkpoint is the model."""
    template: str = "auto"
    """chat, zero or own; auto: what the model was taught, else the template that its tokenizer brings."""
    hardware: str = "cpu"
    """Whose price is counted: cpu, H100, 8xH800 ..."""

    def __post_init__(self) -> None:
        """Left to `tune`: while flags are parsed, an error would be a box instead of a line."""


def main(config: SftVerbConfig) -> None:
    console = Console()
    tune(config, config.model, [Path(file) for file in config.data], config.out, console, config.hardware)
    told = " --template zero" if config.template == "zero" else ""
    console.print(f"talk to it: sputnik chat {config.out}{told}", highlight=False, soft_wrap=True)


def tune(
    config: SFTConfig, model: str, data: list[Path], out: Path, console: Console, hardware: str = "cpu"
) -> dict[str, Any]:
    """Train `model` on the files `data` into `out` and say what came of it; returns the figures."""
    found = find_checkpoint(model)
    settings = {field.name: getattr(config, field.name) for field in fields(SFTConfig)}
    if config.template == "auto":
        settings["template"] = found.template if Tokenizer.load(found.path).has_dialogue else "own"
    meter = Meter(*fleet(hardware))
    figures = train_sft(SFTConfig(**settings | {"data": ()}), found.path, data, out, meter, console)
    told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if name.endswith(("loss", "byte")))
    spent = f"{duration(meter.seconds)}, ${meter.usd:.4f}"
    console.print(f"{figures['examples']} examples in {spent}: {told}", highlight=False, soft_wrap=True)
    return figures
