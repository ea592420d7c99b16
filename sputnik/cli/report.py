"""`sputnik report RUN`: write report.html and report.json again, also of a run that is still going."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from sputnik.recipe.report import write_report


@dataclass(frozen=True)
class ReportConfig:
    run: Positional[Path]
    """A run directory, for example runs/quickstart."""


def main(config: ReportConfig) -> None:
    paths = write_report(config.run)
    print(paths.html)
    print(paths.json)
