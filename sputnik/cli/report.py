"""`sputnik report RUN`: write report.html and report.json again, also of a run that is still going."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from sputnik.errors import DataError
from sputnik.recipe.report import write_report


@dataclass(frozen=True)
class ReportConfig:
    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """A run directory, for example runs/quickstart."""


def main(config: ReportConfig) -> None:
    if config.run.is_dir() and not (config.run / "lineage.json").is_file():
        raise DataError(f"{config.run}: is no run: it has no lineage.json; name a directory such as runs/quickstart")
    paths = write_report(config.run)
    print(paths.html)
    print(paths.json)
