"""Guards: decide from a step's metrics whether training has gone wrong, and say what to do about it.

Pure decisions: a `Guard` sees the metrics of each step in order and nothing else, so a resumed run rebuilds it from the
log. The loop acts: "warn" notes an alarm, "pause" saves and stops (the same command goes on), "rollback" returns to the
newest save from before the trouble began (`Alarm.since`) and skips the data since then. A step whose loss or gradient
is not finite is never applied, whatever the actions are.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sputnik.errors import ConfigError

Action = Literal["off", "warn", "pause", "rollback"]
Finding = tuple[str, str, Action, int]  # rule, message, action, last step before the trouble
SEVERITY: tuple[Action, ...] = ("off", "warn", "pause", "rollback")
RECENT = 5  # steps whose median stands for "now"
WATCHED = ("loss", "grad_norm", "entropy", "kl", "length", "truncated", "clip_share")


@dataclass(frozen=True)
class GuardConfig:
    """An action for each alarm, and its limit. Metrics a stage does not report are not watched."""

    non_finite: Action = "pause"
    """NaN or infinity in `window` / 4 steps in a row; a single one is skipped with a warning."""
    spike: Action = "warn"
    loss_spike: float = 1.0
    """Nats above the median loss of the last `window` steps, at least; small batches of mixed texts swing anyway,
    so a spike must also be twice as far above it as the highest of these steps."""
    grad_spike: float = 20.0
    """Times the median gradient norm of the last `window` steps."""
    entropy: Action = "warn"
    entropy_floor: float = 0.1
    """Share of the entropy of the first `window` steps."""
    length: Action = "warn"
    length_floor: float = 0.2
    """Share of the answer length of the first `window` steps."""
    truncated_ceiling: float = 0.5
    """Share of answers cut off by the length limit; growth below the limit is what R1 wants."""
    clipped: Action = "warn"
    clip_ceiling: float = 0.5
    """Share of tokens whose ratio is clipped."""
    constant_reward: Action = "warn"
    """Any `*reward` that did not change for `window` steps, unless it is the most there is to win: a part is a share,
    so that is 1, and the sum is at its most when all parts are."""
    window: int = 20

    def __post_init__(self) -> None:
        if self.window < RECENT:
            raise ConfigError(f"window = {self.window}: a guard looks at {RECENT} steps at least")

    @property
    def rolls_back(self) -> bool:
        actions = (self.non_finite, self.spike, self.entropy, self.length, self.clipped, self.constant_reward)
        return "rollback" in actions


@dataclass(frozen=True)
class Alarm:
    rule: str
    step: int
    message: str
    action: Action
    since: int
    """The last step that was still well, as far as one can tell; at most a window before `step`."""


class Guard:
    """Call `check` once per step, in order."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._first: dict[str, list[float]] = {}
        self._recent: dict[str, deque[tuple[int, float]]] = {}
        """The last steps with their values."""
        self._rewards: dict[str, tuple[float, int]] = {}
        self._bad_steps = 0
        self._quiet_until: dict[str, int] = {}

    def check(self, metrics: Mapping[str, Any]) -> Alarm | None:
        """The gravest alarm of this step, if any. A rule that has spoken is silent for the next `window` steps."""
        step = int(metrics["step"])
        bad = [key for key in WATCHED if key in metrics and not _finite(metrics[key])]
        self._bad_steps = self._bad_steps + 1 if bad else 0
        if bad:
            return self._non_finite(step, bad, metrics)
        found = [*self._spikes(step, metrics), *self._collapses(step), *self._constant_rewards(step, metrics)]
        for key in WATCHED:
            if key in metrics:
                self._remember(step, key, float(metrics[key]))
        alarms = [
            Alarm(rule, step, what, action, max(0, since))
            for rule, what, action, since in found
            if self._speaks(rule, step, action)
        ]
        return max(alarms, key=lambda alarm: SEVERITY.index(alarm.action), default=None)

    def _non_finite(self, step: int, bad: list[str], metrics: Mapping[str, Any]) -> Alarm | None:
        where = f", first in {metrics['non_finite']}" if metrics.get("non_finite") else ""
        message = f"{' and '.join(bad)} not finite{where}; the step was skipped"
        patience = max(1, self.config.window // 4)
        since = max(0, step - self._bad_steps - 1)  # what the step before them did to the weights is what they suffer
        if self._bad_steps % patience == 0 and self.config.non_finite != "off":
            return Alarm("non_finite", step, f"{message}, {self._bad_steps} in a row", self.config.non_finite, since)
        return Alarm("non_finite", step, message, "warn", since)

    def _spikes(self, step: int, metrics: Mapping[str, Any]) -> Iterator[Finding]:
        config = self.config
        for key in ("loss", "grad_norm"):
            past = [value for _, value in self._recent.get(key, ())]
            if key not in metrics or len(past) < config.window:
                continue
            usual, now = median(past), float(metrics[key])
            swing = 2 * (max(past) - usual)
            limit = usual + max(config.loss_spike, swing) if key == "loss" else max(usual, 0.1) * config.grad_spike
            if now > limit:
                yield (f"{key}_spike", f"{key} {now:.4g}, median of the last steps {usual:.4g}", config.spike, step - 1)

    def _collapses(self, step: int) -> Iterator[Finding]:
        config = self.config
        for key, floor, action in (
            ("entropy", config.entropy_floor, config.entropy),
            ("length", config.length_floor, config.length),
        ):
            now, start = self._now(key), self._start(key)
            if now is not None and start is not None and now < floor * start:
                well = self._last_step(key, low=start / 2)
                yield (f"{key}_collapse", f"{key} {now:.4g}, at the start {start:.4g}", action, well)
        for key, ceiling, action in (
            ("truncated", config.truncated_ceiling, config.length),
            ("clip_share", config.clip_ceiling, config.clipped),
        ):
            now = self._now(key)
            if now is not None and now > ceiling:
                well = self._last_step(key, high=ceiling / 2)
                yield (f"{key}_high", f"{key} {now:.2f}, the limit is {ceiling:.2f}", action, well)

    def _constant_rewards(self, step: int, metrics: Mapping[str, Any]) -> Iterator[Finding]:
        values = {key: metrics[key] for key in metrics if key.endswith("reward") and _finite(metrics[key])}
        parts = [value for key, value in values.items() if key.endswith("_reward")]
        all_won = bool(parts) and min(parts) >= 1
        for key in values:
            value, count = self._rewards.get(key, (math.nan, 0))
            count = count + 1 if metrics[key] == value else 1
            self._rewards[key] = (metrics[key], count)
            won = metrics[key] >= 1 if key.endswith("_reward") else all_won
            if count == self.config.window and not won:
                message = f"{key} was {metrics[key]:.4g} in each of the last {count} steps: it teaches nothing"
                yield (f"constant_{key}", message, self.config.constant_reward, step - count)

    def _speaks(self, rule: str, step: int, action: Action) -> bool:
        if action == "off" or step < self._quiet_until.get(rule, 0):
            return False
        self._quiet_until[rule] = step + self.config.window
        return True

    def _remember(self, step: int, key: str, value: float) -> None:
        first = self._first.setdefault(key, [])
        if len(first) < self.config.window:
            first.append(value)
        self._recent.setdefault(key, deque(maxlen=self.config.window)).append((step, value))

    def _last_step(self, key: str, low: float = -math.inf, high: float = math.inf) -> int:
        """The last of the recent steps with a value in these bounds, else the one before them all."""
        recent = self._recent[key]
        return next((step for step, value in reversed(recent) if low <= value <= high), recent[0][0] - 1)

    def _start(self, key: str) -> float | None:
        """Mean over the first `window` steps, once they are over."""
        first = self._first.get(key, [])
        return fmean(first) if len(first) == self.config.window else None

    def _now(self, key: str) -> float | None:
        recent = [value for _, value in self._recent.get(key, ())][-RECENT:]
        return median(recent) if len(recent) == RECENT else None


def _finite(value: Any) -> bool:
    """The log writes NaN as null, so None counts as not finite too."""
    return isinstance(value, int | float) and math.isfinite(value)


def first_non_finite(model: nn.Module, losses: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or infinity: losses, then weights, then gradients, in the model's order."""
    weights = ((f"weight {name}", value) for name, value in model.named_parameters())
    gradients = ((f"gradient of {name}", value.grad) for name, value in model.named_parameters())
    for name, value in chain(losses.items(), weights, gradients):
        if value is not None and not bool(torch.isfinite(value).all()):
            return f"{name} ({int((~torch.isfinite(value)).sum())} of {value.numel()} values)"
    return None
