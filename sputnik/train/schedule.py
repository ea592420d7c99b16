"""The schedules of the V3 report (section 4.2), scaled to any run: learning rate, batch, MTP weight, bias speed.

The published boundaries (10T, 14.3T, ... of 14.8T tokens) become shares of the run, so three million tokens are trained
in the same shape. Each function takes what is done and what there is to do, in any unit; `Plan` lists the steps.
"""

import math
from dataclasses import dataclass

TOTAL = 14.8e12  # tokens of the published run; the fractions below are of this
BATCH_RAMP = 0.469e12 / TOTAL
CONSTANT_UNTIL = 10e12 / TOTAL
COSINE_UNTIL = 14.3e12 / TOTAL
FIRST_TAIL_UNTIL = (14.3e12 + 0.333e12) / TOTAL
MTP_SWITCH = 10e12 / TOTAL
BIAS_SWITCH = 14.3e12 / TOTAL
FIRST_TAIL = 2.2e-5 / 2.2e-4
SECOND_TAIL = 7.3e-6 / 2.2e-4
WARMUP = 2_000 / 240_000  # 14.8T tokens at the published batch sizes are about 240,000 steps
ADAM_HORIZON = 20  # steps that beta2 = 0.95 averages over: before that the second moment is a guess


def cosine(done: float, high: float, low: float) -> float:
    """From `high` at done = 0 down to `low` at done = 1."""
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))


def warmup_steps(steps: int) -> int:
    """The published share of the run, but at least what AdamW's second moment needs, and at most a tenth of the run."""
    return max(1, round(WARMUP * steps), min(ADAM_HORIZON, steps // 10))


def v3_lr(done: float, total: float, peak: float) -> float:
    """Learning rate after `done` of `total` tokens (or steps), without the warm-up: constant, cosine to a tenth, two
    constant tails (V3 4.2)."""
    share = done / total
    if share < CONSTANT_UNTIL:
        return peak
    if share < COSINE_UNTIL:
        return cosine((share - CONSTANT_UNTIL) / (COSINE_UNTIL - CONSTANT_UNTIL), peak, FIRST_TAIL * peak)
    return peak * (FIRST_TAIL if share < FIRST_TAIL_UNTIL else SECOND_TAIL)


def v3_batch(done: float, total: float, final: int) -> int:
    """Sequences in the next batch: a fifth of `final` at first, growing linearly over the first 3.2 % (V3 4.2)."""
    grown = min(1.0, done / total / BATCH_RAMP)
    return max(1, round(final * (0.2 + 0.8 * grown)))


def mtp_weight(done: float, total: float, first: float = 0.3) -> float:
    """Lambda of the MTP loss: 0.3 for the first 10T tokens, then a third of it, 0.1."""
    return first if done / total < MTP_SWITCH else first / 3


def bias_speed(done: float, total: float, first: float = 0.001) -> float:
    """Gamma of the routing bias update: 0.001 until 14.3T tokens, then 0."""
    return first if done / total < BIAS_SWITCH else 0.0


@dataclass(frozen=True)
class Plan:
    """Sequences in each step, and sequences before it (with one entry more, the total). Steps count from 1."""

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    warmup: int

    @classmethod
    def make(cls, budget: int, batch: int) -> "Plan":
        """Whole steps within `budget` sequences, the batch growing to `batch`."""
        rows, starts = list[int](), [0]
        while starts[-1] + (size := v3_batch(starts[-1], budget, batch)) <= budget:
            rows.append(size)
            starts.append(starts[-1] + size)
        return cls(tuple(rows), tuple(starts), warmup_steps(len(rows)))

    @property
    def steps(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> int:
        return self.starts[-1]

    def lr(self, step: int, peak: float) -> float:
        return v3_lr(self.starts[step - 1], self.total, peak) * min(1.0, step / self.warmup)

    def mtp_weight(self, step: int, first: float) -> float:
        return mtp_weight(self.starts[step - 1], self.total, first)

    def bias_speed(self, step: int, first: float) -> float:
        return bias_speed(self.starts[step - 1], self.total, first)
