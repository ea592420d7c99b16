"""`sputnik run RECIPE.toml`: all stages of a recipe, then the report; or all claims of a card, then the card.

The same command again skips what is finished and continues what is not; see sputnik/recipe/runner.py and findings.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from sputnik.cli.console import Console
from sputnik.errors import ConfigError
from sputnik.recipe.findings import is_card, read_card, run_card
from sputnik.recipe.findings_page import write_card
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.report import write_report
from sputnik.recipe.runner import run_recipe
from sputnik.recipe.stages import kind_of


@dataclass(frozen=True)
class RunConfig:
    recipe: Annotated[Positional[Path], arg(metavar="RECIPE")]
    """The recipe file; `ls recipes/` shows those of the project."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """STAGE.KEY=VALUE (or model.KEY=VALUE, seed=N): change one setting; may be repeated. Of a card: seeds=N for at most
    so many seeds, RECIPE.STAGE.KEY=VALUE."""
    name: str | None = None
    """Run into runs/NAME instead of the recipe's own name."""
    only: str | None = None
    """Run this stage alone; its parents must be finished. Of a card: these claims or recipes, with commas between."""
    seeds: str | None = None
    """Of a card: these seeds alone, with commas between; another process may be at others."""
    fresh: str | None = None
    """First delete this stage and every stage built on it. Of a card: a recipe, or RECIPE.STAGE in every seed."""
    runs: Path = Path("runs")
    """Folder of all runs."""


def main(config: RunConfig) -> None:
    if is_card(config.recipe):
        card, console = read_card(config.recipe, config.set, config.name), Console()
        only = config.only.split(",") if config.only else []
        run = run_card(card, config.runs, kind_of, console, write_card, only, config.fresh, _seeds(config.seeds))
        console.print(f"card: {run / 'findings.md'}", soft_wrap=True)
        return
    if config.seeds is not None:
        raise ConfigError("--seeds is for a card of findings; a recipe has one seed: --set seed=N")
    run_and_report(config.recipe, config.set, name=config.name, only=config.only, fresh=config.fresh, runs=config.runs)


def _seeds(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise ConfigError(f"--seeds {text}: whole numbers with commas between, as 3,4") from None


def run_and_report(
    recipe_file: Path,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    only: str | None = None,
    fresh: str | None = None,
    runs: Path = Path("runs"),
) -> Path:
    """Run the recipe and write the report, of an unfinished run too; returns the run directory."""
    console = Console()
    recipe = read_recipe(recipe_file, kind_of, overrides, name)
    try:
        run = run_recipe(recipe, runs, kind_of, console, only=only, fresh=fresh)
    except ConfigError:
        raise  # refused before anything ran
    except BaseException:
        _report(runs / recipe.name, console)
        raise
    _report(run, console)
    return run


def _report(run: Path, console: Console) -> None:
    if (run / "lineage.json").is_file():
        console.print(f"report: {write_report(run).html}", soft_wrap=True)
