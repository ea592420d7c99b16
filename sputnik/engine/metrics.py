"""What the engine counts, and what follows from it: queue, cache, speed, waiting times, share of the roofline.

The roofline is the time this machine needs at least: to read each step's weights and cache once at its measured
bandwidth, or to multiply at its measured peak, whichever is longer in sum.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sputnik.cost import decode_flops_per_token, kv_bytes_per_token, step_bytes
from sputnik.engine.sample import Event
from sputnik.engine.scheduler import Scheduler
from sputnik.engine.speculate import Speculation
from sputnik.hardware import Hardware
from sputnik.model.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """What steps of this model cost at least."""

    config: ModelConfig
    weight_bytes: float
    """Of one weight, scales included: `WEIGHT_BYTES`."""
    cache_bytes: int

    def bytes(self, steps: Mapping[int, int], context: int) -> float:
        """`steps`: how many computed so many tokens; `context`: cached tokens attended to, over all steps."""
        weights = (
            count * step_bytes(self.config, tokens, 0, self.weight_bytes, self.cache_bytes)
            for tokens, count in steps.items()
        )
        return sum(weights) + context * kv_bytes_per_token(self.config, self.cache_bytes)

    def flops(self, tokens: int, context: int) -> float:
        return tokens * decode_flops_per_token(self.config, round(context / max(1, tokens)))


WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1 + 2 / 32, "int4": 0.5 + 4 / 32, "fp8": 1 + 4 / 128**2}
KEPT = 1024
"""Requests whose waiting times are remembered."""


class Metrics:
    def __init__(self, scheduler: Scheduler, work: "Work", speculation: Speculation | None = None) -> None:
        self._scheduler, self._speculation, self._work = scheduler, speculation, work
        self._sizes: Counter[int] = Counter()
        """Steps by the number of tokens they computed."""
        self._context = 0
        self.steps = self.computed_tokens = self.drawn_tokens = self.finished = self.failed = self.aborted = 0
        self.busy_seconds = 0.0
        self._ttft: deque[float] = deque(maxlen=KEPT)
        self._tpot: deque[float] = deque(maxlen=KEPT)

    def step(
        self, seconds: float, computed: int, context: int, events: Sequence[Event], now: float, steps: int = 1
    ) -> None:
        """`computed` tokens that attended to `context` cached ones, over all sequences and, of a stride, `steps`."""
        self.steps += steps
        self._sizes[computed // steps] += steps
        self._context += context
        self.busy_seconds += seconds
        self.computed_tokens += computed
        for event in events:
            sample = event.of
            self.drawn_tokens += len(event.ids)
            if sample.first_token is None and event.ids:
                sample.first_token = now
                self._ttft.append(now - sample.arrival)
            if event.finish is not None:
                self.finished += 1
                self.failed += event.finish == "failed"
                if len(sample.written) > 1 and sample.first_token is not None:
                    self._tpot.append((now - sample.first_token) / (len(sample.written) - 1))

    def read(self) -> dict[str, float]:
        """Figures for a page or a scrape. Seconds; shares of 1; TTFT and TPOT of the last requests."""
        now = self._scheduler.figures
        return {
            "queue": now.queue,
            "running": now.running,
            "cache_use": now.used_blocks / now.blocks,
            "prefix_hit_rate": now.hit_tokens / now.prompt_tokens if now.prompt_tokens else 0.0,
            "preemptions": now.preemptions,
            "steps": self.steps,
            "computed_tokens": self.computed_tokens,
            "drawn_tokens": self.drawn_tokens,
            "tokens_per_s": self.drawn_tokens / self.busy_seconds if self.busy_seconds else 0.0,
            "finished": self.finished,
            "failed": self.failed,
            "aborted": self.aborted,
            "ttft_p50": _quantile(self._ttft, 0.5),
            "ttft_p99": _quantile(self._ttft, 0.99),
            "tpot_p50": _quantile(self._tpot, 0.5),
            "tpot_p99": _quantile(self._tpot, 0.99),
            **self._acceptance(),
        }

    @property
    def bytes(self) -> float:
        """What all steps had to read at least."""
        return self._work.bytes(self._sizes, self._context)

    @property
    def flops(self) -> float:
        return self._work.flops(self.computed_tokens, self._context)

    def roofline(self, device: Hardware) -> float:
        """Share of 1: the least time `device` needs for what was done, over the time it took."""
        least = max(self.bytes / device.bandwidth, self.flops / device.bf16)
        return least / self.busy_seconds if self.busy_seconds else 0.0

    def _acceptance(self) -> dict[str, float]:
        """Share of accepted guesses by their distance, 1 being the next token but one."""
        if self._speculation is None:
            return {}
        pairs = zip(self._speculation.accepted, self._speculation.drafted, strict=True)
        return {f"acceptance_{place}": accepted / max(1, made) for place, (accepted, made) in enumerate(pairs, 1)}


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
