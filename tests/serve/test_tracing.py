"""Traces, into the SDK's exporter in memory; and that nothing of it is there when nobody asks."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sputnik.errors import ConfigError
from sputnik.serve.admission import Ticket
from sputnik.serve.identity import ANYONE
from sputnik.serve.logs import Watched
from sputnik.serve.measures import Tally
from sputnik.serve.service import Open, Service
from sputnik.serve.settings import GatewaySettings
from sputnik.serve.tracing import Tracer, asked_for, make_tracer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Call:
    """What the guard leaves in the scope."""

    def __init__(self) -> None:
        self.identity, self.id, self.ticket = ANYONE, "r1", Ticket(ANYONE, 3)


@pytest.fixture
def exported() -> Any:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return memory, Tracer(provider)


def test_a_request_is_a_span_of_its_callers_trace_with_wait_and_engine_inside(exported: Any) -> None:
    memory, tracer = exported
    service = Service(GatewaySettings("none", "127.0.0.1", 1, 2, "m", None))
    carried: dict[str, str] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        call = scope["state"]["call"] = Call()
        carried.update(scope["state"]["trace"])
        begun = time.monotonic()
        await asyncio.sleep(0.05)
        request = Open(Any, call.ticket, begun, begun + 0.02)  # type: ignore[arg-type]
        tally = Tally(begun, begun + 0.03, 7, 4, 3, 1, ("stop",), "m", "engine")
        for tell in service.closed:
            tell(request, tally)
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        """Nobody reads it."""

    scope: Any = {"type": "http", "path": "/v1/chat/completions", "method": "POST", "headers": []}
    scope["headers"] = [(b"traceparent", PARENT.encode()), (b"authorization", b"Bearer sk-secret")]
    asyncio.run(Watched(app, service, tracer)(scope, None, send))  # type: ignore[arg-type]
    spans = {span.name: span for span in memory.get_finished_spans()}
    assert set(spans) == {"/v1/chat/completions", "admission wait", "engine"}
    root = spans["/v1/chat/completions"]
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1] and f"{root.parent.span_id:016x}" in PARENT
    assert carried["traceparent"].split("-")[1:3] == [PARENT.split("-")[1], f"{root.context.span_id:016x}"]
    for name in ("admission wait", "engine"):
        assert spans[name].parent.span_id == root.context.span_id
        assert root.start_time <= spans[name].start_time + 20_000_000 and spans[name].end_time <= root.end_time
    assert spans["admission wait"].end_time == spans["engine"].start_time
    assert spans["engine"].events[0].name == "first token"
    found = dict(root.attributes)
    assert found["gen_ai.operation.name"] == "chat" and found["gen_ai.usage.input_tokens"] == 7
    assert found["gen_ai.usage.output_tokens"] == 3 and found["gen_ai.usage.cache_read.input_tokens"] == 4
    assert found["gen_ai.response.finish_reasons"] == ("stop",) and found["http.response.status_code"] == 200
    assert "sk-secret" not in "".join(span.to_json() for span in spans.values())


def test_only_the_standard_variables_ask_for_traces() -> None:
    assert not asked_for({}) and make_tracer({}) is None
    assert not asked_for({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"})
    assert not asked_for({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"})
    assert asked_for({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"})
    assert asked_for({"OTEL_TRACES_EXPORTER": "console"})
    with pytest.raises(ConfigError, match="otlp, console or none"):
        asked_for({"OTEL_TRACES_EXPORTER": "zipkin"})


def test_nothing_is_imported_when_nobody_asks() -> None:
    code = """
import json, sys
from sputnik.serve.tracing import make_tracer
import sputnik.serve.logs
assert make_tracer({}) is None
print(json.dumps([name for name in sys.modules if name.startswith(("opentelemetry", "torch", "httpx2"))]))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(found.stdout) == [], Path(__file__).name
