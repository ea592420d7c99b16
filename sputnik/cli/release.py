"""`sputnik release RUN OUT --words CARD.toml`: a model of a finished run for others to use, with its card.

    sputnik release runs/r1 r1-mini --stage r1 --words recipes/cards/r1.toml

The weights are written in bfloat16 and scored again; OUT/README.md tells of scores, stages, data and price.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.progress import Progress
from tyro.conf import Positional, arg

from sputnik.cli.console import Console
from sputnik.recipe.release import read_words, release


@dataclass(frozen=True)
class ReleaseConfig:
    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """A run directory, for example runs/r1."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """The directory to write."""
    words: Path
    """A TOML file with title, summary, cannot (a list of sentences), and perhaps licence, language, recipe."""
    stage: str | None = None
    """Which model; default: the last one that was evaluated."""
    most_mb: float | None = None
    """Refuse weights larger than this."""


def main(config: ReleaseConfig) -> None:
    console = Console()
    words = read_words(config.words)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("questions", total=None)
        facts = release(
            config.run, config.out, words, config.stage, most_mb=config.most_mb,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
    score = facts["score"]["pass_at_1"]
    console.print(
        f"{config.out}: {facts['bytes'] / 1e6:.1f} MB, pass@1 {100 * score['mean']:.1f} % "
        f"[{100 * score['low']:.1f}, {100 * score['high']:.1f}]; the card is {config.out / 'README.md'}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
