"""What a person sees while a stage runs: a bar with time left and money spent; plain lines when nobody is watching."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import rich.progress
from rich.console import Console

from sputnik.cost import Usage

LINE_SECONDS = 10.0  # between plain lines


class Progress:
    """A context manager; call `show` after each step."""

    def __init__(self, name: str, steps: int, headline: Sequence[str]) -> None:
        self.name = name
        self.steps = steps
        self.headline = headline
        self._console = Console()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[figures]}"),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("left"),
            console=self._console,
        )
        self._task = self._bar.add_task(name, total=steps, figures="")
        self._first: tuple[float, int] | None = None
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, step: int, metrics: Mapping[str, Any], spent: Usage) -> None:
        figures = self._figures(metrics, spent)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        left = self._left(step, now)
        if now - self._last_line >= LINE_SECONDS or step == self.steps:
            self._last_line = now
            print(f"{self.name} {step}/{self.steps}  {figures}  {left}", flush=True)

    def _figures(self, metrics: Mapping[str, Any], spent: Usage) -> str:
        shown = [f"{key} {metrics[key]:.4g}" for key in self.headline if isinstance(metrics.get(key), int | float)]
        return "  ".join([*shown, f"{clock(spent.seconds)} spent (${spent.usd:.4f})"])

    def _left(self, step: int, now: float) -> str:
        """From the pace of this process; a resumed run starts its estimate anew."""
        if self._first is None or step <= self._first[1]:
            self._first = (now, step)
            return ""
        began, first = self._first
        return f"{clock((now - began) / (step - first) * (self.steps - step))} left"


def clock(seconds: float) -> str:
    """1:02:03"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
