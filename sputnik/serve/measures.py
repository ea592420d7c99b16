"""What the gateway counts, and the page that Prometheus reads: names as vLLM's, with our prefix.

page = measures.page(service_figures, engine_figures)          # text exposition format, as bytes
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sputnik.errors import MissingPackage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class Tally:
    """What a request came to. Times are of the monotonic clock."""

    arrived: float
    first: float | None
    """When its first token came."""
    prompt: int
    cached: int | None
    """Of the prompt, taken from the cache; None: the engine does not tell."""
    written: int
    thought: int
    """Of what was written."""
    ends: tuple[str, ...]
    """How each answer ended."""
    model: str = ""
    """As the caller named it."""
    worker: str = "engine"
    """Who answered."""


@dataclass
class Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        self.counts[sum(value > bound for bound in SECONDS)] += 1
        self.total += value


@dataclass
class Measures:
    tokens: int = 0
    """That the engine has written."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """By the code that the caller was told."""
    ends: Counter[str] = field(default_factory=Counter)
    """Answers by how they ended."""
    responses: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By route and status."""
    queue: Histogram = field(default_factory=Histogram)
    """From arrival until the turn came."""
    first: Histogram = field(default_factory=Histogram)
    each: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)

    def answered(self, route: str, status: int) -> None:
        """499: the client went before there was an answer."""
        self.responses[route, str(status or 499)] += 1

    def ended(self, tally: Tally, now: float) -> None:
        self.prompt_tokens += tally.prompt
        self.cached_tokens += tally.cached or 0
        self.ends.update(tally.ends)
        self.whole.add(now - tally.arrived)
        if tally.first is not None:
            self.first.add(tally.first - tally.arrived)
            if tally.written > len(tally.ends):
                self.each.add((now - tally.first) / (tally.written / len(tally.ends) - 1))

    def page(self, gauges: Mapping[str, float], engine: Mapping[str, float]) -> bytes:
        try:
            from prometheus_client import CollectorRegistry, generate_latest
        except ImportError:
            raise MissingPackage("prometheus-client", extra="serve") from None
        registry = CollectorRegistry()
        measures = self

        class Collector:
            def collect(self) -> Iterator[Any]:
                yield from measures._families(gauges, engine)

        registry.register(Collector())  # type: ignore[arg-type]
        return generate_latest(registry)

    def _families(self, gauges: Mapping[str, float], engine: Mapping[str, float]) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        for name, value in gauges.items():
            yield GaugeMetricFamily(f"sputnik:{name}", name.replace("_", " "), value=value)
        for name, value in engine.items():
            yield GaugeMetricFamily(f"sputnik:engine_{name}", f"engine: {name.replace('_', ' ')}", value=value)
        counts = {
            "prompt_tokens": self.prompt_tokens, "generation_tokens": self.tokens,
            "prefix_cache_hit_tokens": self.cached_tokens,
        }  # fmt: skip
        for name, value in counts.items():
            yield CounterMetricFamily(f"sputnik:{name}", name.replace("_", " "), value=value)
        for name, labels, counter in (
            ("request_success", ["finished_reason"], {(end,): count for end, count in self.ends.items()}),
            ("requests_refused", ["reason"], {(code,): count for code, count in self.refused.items()}),
            ("http_responses", ["route", "status"], self.responses),
        ):
            family = CounterMetricFamily(f"sputnik:{name}", name.replace("_", " "), labels=labels)
            for values, count in counter.items():
                family.add_metric(list(values), count)
            yield family
        for name, histogram in (
            ("request_queue_time_seconds", self.queue),
            ("time_to_first_token_seconds", self.first),
            ("time_per_output_token_seconds", self.each),
            ("e2e_request_latency_seconds", self.whole),
        ):
            sums, total = [], 0
            for bound, count in zip([*map(str, SECONDS), "+Inf"], histogram.counts):
                total += count
                sums.append((bound, total))
            text = name.replace("_", " ")
            yield HistogramMetricFamily(f"sputnik:{name}", text, buckets=sums, sum_value=histogram.total)
