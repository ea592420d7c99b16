"""The loop that pre-training and reinforcement learning share: steps, saves, logs, guards, progress, money.

A stage is anything with the methods of `Stage`; `Loop.run(stage)` drives it from the newest save to the last step.
After `kill -9` at any moment, running it again gives the metrics and weights of the unbroken run, bit for bit on a CPU
with the same number of threads, because a step is a pure function of (saved state, step number).

    STAGE/resume/          saves (train/state.py)
    STAGE/metrics.jsonl    one line per step, with the time and money so far; step 0 is before training
    STAGE/alarms/          what the guards found, with the batch that did it

What a killed process spent on steps that are repeated is not in the metrics; whoever starts processes books them.
"""

import contextlib
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from sputnik.cost import Meter
from sputnik.errors import DataError, SputnikError
from sputnik.hardware import kept_memory
from sputnik.train.guards import Alarm, Guard
from sputnik.train.progress import Progress
from sputnik.train.state import (
    JsonLines,
    Saved,
    StateStore,
    StopSignal,
    is_disk_full,
    read_jsonl,
    stage_lock,
    write_json,
    write_tensors,
)

MAX_ROLLBACKS = 3
SAVE_SHARE = 0.05  # of the time at most goes into saves by the clock, however slow the disk
Read = Callable[[str], dict[str, Tensor]]


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    def before(self) -> dict[str, Any]:
        """Metrics of step 0, taken once before anything is trained; empty if there is nothing to tell."""

    def step(self, step: int, loop: "Loop") -> dict[str, Any]:
        """Do step number `step` (the first is 1) and return its metrics. All data and random numbers come from `step`
        and `loop.data_step(step)`, never from a generator that runs on."""

    def batch(self) -> dict[str, Tensor]:
        """What the last step trained on, for the record of an alarm."""

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything the next step depends on: tensors by file name, and plain JSON values."""

    def load(self, read: Read, plain: Mapping[str, Any]) -> None:
        """Inverse of `state`; `read(file name)` gives the tensors of one file."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run after a complete step and a save; a command line exits with 130."""


class Paused(SputnikError):
    """A guard ended the run after a save."""


class Loop:
    """One stage directory and its way from the newest save to step `steps`."""

    def __init__(
        self,
        out: Path,
        *,
        steps: int,
        identity: Mapping[str, Any],
        meter: Meter,
        guard: Callable[[], Guard],
        logs: Sequence[str] = (),
        headline: Sequence[str] = ("loss",),
        save_seconds: float = 300.0,
        save_steps: int = 0,
    ) -> None:
        """`identity` is everything that decides the outcome (settings, data, parent); a save with another one is
        refused. `guard` makes a fresh guard, `logs` are further logs beside metrics, `headline` the metrics shown while
        running. A save is made every `save_seconds` (less often if the disk is slow), and every `save_steps` steps
        unless that is 0."""
        self.out = out
        self.steps = steps
        self.identity = dict(identity)
        self.meter = meter
        self.headline = headline
        self.save_seconds = save_seconds
        self.save_steps = save_steps
        self._rollbacks = out / "alarms" / "rollbacks.jsonl"
        self.done = 0
        self._make_guard = guard
        self._guard = guard()
        watched = self._guard.config
        self.store = StateStore(out / "resume", behind=watched.window if watched.rolls_back else None)
        self._log_names = ("metrics", *logs)
        self._logs: dict[str, JsonLines] = {}
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._save_took = 0.0
        self._shift = 0

    # --- for stages ---

    def log(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a line to STAGE/`name`.jsonl; it is cut off again if the step has to be repeated."""
        self._logs[name].write(record)

    def data_step(self, step: int) -> int:
        """The number to choose data and seeds by: `step`, moved on past everything seen before a rollback."""
        return step + self._shift

    # --- running ---

    def run(self, stage: Stage) -> None:
        """Go on to the last step. Ends earlier by Stopped, by Paused, or by DataError if the disk is full."""
        with stage_lock(self.out), deterministic(), StopSignal() as stop, contextlib.ExitStack() as on_exit:
            tidy = on_exit.enter_context(kept_memory())
            on_exit.callback(self._close_logs)
            try:
                self._start(stage)
                with Progress(self.out.name, self.steps, self.headline) as progress:
                    while self.done < self.steps and not stop.requested:
                        self._one_step(stage, progress)
                        tidy()
                if self._saved_step != self.done:
                    self._save(stage)
            except (OSError, SafetensorError) as error:
                if is_disk_full(error):
                    raise DataError(f"disk full in {self.out}: make room and run the same command again") from error
                raise
        if self.done < self.steps:
            print(f"stopped after step {self.done} of {self.steps}, saved; run the same command again to go on")
            raise Stopped

    def _one_step(self, stage: Stage, progress: Progress) -> None:
        step = self.done + 1
        figures = stage.step(step, self)
        metrics = {"step": step, **self._spent(), **figures}
        alarm = self._guard.check(metrics)
        self.log("metrics", metrics)
        self.done = step
        progress.show(step, metrics, self.meter.total)
        if alarm is not None:
            self._react(alarm, metrics, stage)
        by_steps = self.save_steps and self.done % self.save_steps == 0
        wait = max(self.save_seconds, self._save_took / SAVE_SHARE)
        if by_steps or time.monotonic() - self._saved_at >= wait:
            self._save(stage)

    def _start(self, stage: Stage) -> None:
        """Continue from the newest save, or save the initial state: that proves that there is room for a save, and a
        rollback has somewhere to go."""
        saved = self.store.latest()
        if saved is None:
            self._rollbacks.unlink(missing_ok=True)  # of a run whose saves were deleted by hand
            self._logs = {name: JsonLines(self.out / f"{name}.jsonl", 0) for name in self._log_names}
            if figures := stage.before():
                self.log("metrics", {"step": 0, **self._spent(), **figures})
            self._save(stage)  # with the position behind that line: a resumed run neither repeats nor doubles it
        else:
            self._require_same(saved)
            self.store.prune(saved.step)  # a process killed while it did so may have been the last to save
            self.meter.load(saved.meta["meter"])
            self._restore(saved, stage)
            if 0 < self.done < self.steps:
                print(f"{self.out}: going on after step {self.done} of {self.steps}")

    def _restore(self, saved: Saved, stage: Stage) -> None:
        self._close_logs()
        positions: Mapping[str, int] = saved.meta["logs"]
        self._logs = {name: JsonLines(self.out / f"{name}.jsonl", positions[name]) for name in self._log_names}
        stage.load(lambda name: self.store.load(saved, name), saved.meta["stage"])
        self.done = self._saved_step = saved.step
        rollbacks = read_jsonl(self._rollbacks)
        self._shift = rollbacks[-1]["shift"] if rollbacks else 0
        self._guard = self._make_guard()
        for record in read_jsonl(self.out / "metrics.jsonl"):
            self._guard.check(record)

    def _save(self, stage: Stage) -> None:
        began = time.monotonic()
        tensors, plain = stage.state()
        meta = {
            "identity": self.identity,
            "machine": machine(),
            "meter": self.meter.state_dict(),
            "logs": {name: log.position for name, log in self._logs.items()},
            "stage": plain,
        }
        self.store.save(self.done, tensors, meta)
        self._saved_step = self.done
        self._saved_at = time.monotonic()
        self._save_took = self._saved_at - began

    def _spent(self) -> dict[str, float]:
        """The figures every step reports; a stage that times its parts may report rates of its own."""
        lap, total = self.meter.lap(), self.meter.total
        rates = {"tokens_per_s": lap.tokens_per_s, "flops_per_s": lap.flops_per_s, "peak_share": lap.peak_share}
        return {**rates, "seconds": total.seconds, "usd": total.usd}

    def _require_same(self, saved: Saved) -> None:
        before, now = saved.meta["identity"], self.identity
        if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
            what = ", ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
            raise DataError(
                f"{self.out} was begun with other settings ({what}); put them back or use another directory"
            )
        then, here = saved.meta["machine"], machine()
        if differs := ", ".join(f"{key} {then[key]} -> {here[key]}" for key in here if then.get(key) != here[key]):
            warnings.warn(
                f"{self.out}: {differs}: results may differ from an unbroken run in the last bits", stacklevel=2
            )

    # --- alarms ---

    def _react(self, alarm: Alarm, metrics: Mapping[str, Any], stage: Stage) -> None:
        alarms = self.out / "alarms"
        alarms.mkdir(exist_ok=True)
        record = {"rule": alarm.rule, "message": alarm.message, "action": alarm.action, "metrics": dict(metrics)}
        file = alarms / f"step-{alarm.step}"
        write_tensors(file.with_suffix(".safetensors"), stage.batch())
        write_json(file.with_suffix(".json"), record)
        print(f"alarm at step {alarm.step}: {alarm.message} ({file}.json)", file=sys.stderr)
        if alarm.action == "rollback" and self._roll_back(alarm, stage):
            return
        if alarm.action != "warn":
            self._save(stage)
            raise Paused(f"paused at step {alarm.step}: {alarm.message}; run the same command again to go on anyway")

    def _roll_back(self, alarm: Alarm, stage: Stage) -> bool:
        """Return to the newest save from before the trouble, or the oldest there is; from there on, data that was not
        seen yet. False after too many attempts. Later saves go first: a process killed before the note of the rollback
        is written goes on from the same save, meets the same trouble and comes back here."""
        saved = self.store.latest(alarm.since) or self.store.oldest()
        if saved is None or len(read_jsonl(self._rollbacks)) >= MAX_ROLLBACKS:
            return False
        self.store.drop_after(saved.step)
        log = JsonLines(self._rollbacks)
        log.write({"at": alarm.step, "to": saved.step, "shift": self.data_step(alarm.step) - saved.step})
        log.position  # noqa: B018 - reading it syncs the file
        log.close()
        self._restore(saved, stage)
        print(f"back to step {saved.step}, with other data from there on", file=sys.stderr)
        return True

    def _close_logs(self) -> None:
        for log in self._logs.values():
            log.close()


def machine() -> dict[str, Any]:
    """What a result depends on in the last bits."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Switch on torch's deterministic algorithms for a while. On a CPU one operation needs them: adding rows by index
    (`index_put` with accumulate, the backward pass of `x[rows]`) sums in another order each time with two threads."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
