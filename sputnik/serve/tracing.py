"""Traces for OpenTelemetry, where the standard OTEL_ variables ask for them: a request, what it waited, what ran.

    tracer = make_tracer(os.environ)                 # None: nobody asked; nothing is imported
    span = tracer.begin(scope);  tracer.end(span, route, status, found);  tracer.close()

OTEL_EXPORTER_OTLP_ENDPOINT (or the one for traces) names the collector, OTEL_TRACES_EXPORTER `console` prints; the rest
of the variables are read by the SDK itself. A `traceparent` that comes in is gone on from, and upstreams get ours.
Attributes are those of the GenAI conventions, figures and names only: no prompt, no answer.
"""

import time
from collections.abc import Mapping, MutableMapping
from typing import Any

from sputnik.errors import ConfigError, MissingPackage
from sputnik.serve.measures import Tally
from sputnik.serve.service import Open

OPERATIONS: Mapping[str, str] = {"chat/completions": "chat", "responses": "chat", "messages": "chat"}


def asked_for(environment: Mapping[str, str]) -> bool:
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    kind = environment.get("OTEL_TRACES_EXPORTER", "")
    if kind not in ("", "none", "otlp", "console"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER {kind!r}: otlp, console or none")
    ends = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return kind in ("otlp", "console") or (kind == "" and any(environment.get(name) for name in ends))


def make_tracer(environment: Mapping[str, str]) -> "Tracer | None":
    if not asked_for(environment):
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

        exporter: SpanExporter
        if environment.get("OTEL_TRACES_EXPORTER") == "console":
            exporter = ConsoleSpanExporter()
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
    except ImportError as error:
        raise MissingPackage(error.name or "opentelemetry-sdk", extra="otel") from None
    named = environment.get("OTEL_SERVICE_NAME") or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": "sputnik"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider)


class Tracer:
    def __init__(self, provider: Any) -> None:
        """`provider`: an SDK's TracerProvider."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._tracer = provider, provider.get_tracer("sputnik.serve")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: MutableMapping[str, Any]) -> Any:
        """The span of a request; what upstreams are told of it stands in the scope's state."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(
            "request", context=self._propagator.extract(headers), kind=SpanKind.SERVER, start_time=time.time_ns()
        )
        carried: dict[str, str] = {}
        self._propagator.inject(carried, set_span_in_context(span))
        scope.setdefault("state", {})["trace"] = carried
        return span

    def end(self, span: Any, route: str, status: int, found: tuple[Open, Tally] | None) -> None:
        from opentelemetry.trace import Status, StatusCode

        span.update_name(route)
        span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        if found is not None:
            self._answer(span, route, *found)
        span.end(time.time_ns())

    def _answer(self, span: Any, route: str, request: Open, tally: Tally) -> None:
        """What it waited and what ran, as children; times from the monotonic clock."""
        from opentelemetry.trace import set_span_in_context

        now, zero = time.monotonic(), time.time_ns() - time.monotonic_ns()
        operation = next((name for end, name in OPERATIONS.items() if route.endswith(end)), "text_completion")
        span.set_attributes({
            "gen_ai.operation.name": operation, "gen_ai.provider.name": "sputnik", "gen_ai.request.model": tally.model,
            "gen_ai.usage.input_tokens": tally.prompt, "gen_ai.usage.output_tokens": tally.written,
            "gen_ai.response.finish_reasons": list(tally.ends),
        })  # fmt: skip
        if tally.cached is not None:
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", tally.cached)
        inside = set_span_in_context(span)
        started = request.started
        for name, begun, ended in (("admission wait", request.arrived, started or now), ("engine", started, now)):
            if begun is None:
                continue
            child = self._tracer.start_span(name, context=inside, start_time=zero + int(begun * 1e9))
            if name == "engine":
                child.set_attribute("sputnik.worker", tally.worker)
                if tally.first is not None:
                    child.add_event("first token", timestamp=zero + int(tally.first * 1e9))
            child.end(zero + int(ended * 1e9))

    def close(self) -> None:
        """What is queued is sent."""
        self._provider.shutdown()
