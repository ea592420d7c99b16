"""The log: one line per request, JSON in a file or pipe, a sentence on a terminal. No prompt, answer or key in it.

    journal = Journal(path, "info");  ...;  journal.close()        # path None: stderr
    app = Watched(guard, service, tracer)                          # ASGI around everything

A line holds what happened, never what was said: routes by their pattern, keys by the digits that name them. Of a flood
of refusals some have lines, and one of those has the number of the rest. A thread writes, so that a slow disk holds up
no stream; what it cannot keep up with is dropped, and the next line says how much. Python's own logging does it: queues
and files that may be rotated are all there, and what libraries have to say goes the same way.
"""

import logging
import logging.handlers
import queue
import re
import sys
import time
import traceback
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, Literal
from weakref import WeakKeyDictionary

import msgspec

from sputnik.errors import ConfigError
from sputnik.serve.admission import Ticket
from sputnik.serve.guard import App, Receive, Scope, Send
from sputnik.serve.measures import Tally
from sputnik.serve.service import Open, Service
from sputnik.serve.tracing import Tracer

Level = Literal["debug", "info", "warning", "error"]
LOG = logging.getLogger("sputnik")
WAITING = 10_000
"""Lines that the writer may be behind."""
REFUSALS = 20
"""Lines a second about requests that were turned away."""
QUIET = frozenset({"/health", "/ready", "/version", "/status", "/status.json"})
"""Asked by machines all the time: debug."""
PLAIN = re.compile(
    r"(/v1|/beta)?/(chat/completions|completions|responses|messages(/count_tokens)?|embeddings|models|tokenize|detokenize"
    r"|health|ready|version|status|status\.json|openapi\.json|user/balance)"
)
"""Paths that may stand in the log though no route was reached."""


class Journal:
    def __init__(self, path: str | None, level: Level) -> None:
        """ConfigError if the file cannot be written."""
        handler: logging.Handler
        if path is None:
            handler = logging.StreamHandler(sys.stderr)
        else:
            try:
                handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--log {path}: {error.strerror or error}") from None
        handler.setFormatter(Sentence() if path is None and sys.stderr.isatty() else Json())
        self._lines = queue.Queue[Any]()
        self._listener = logging.handlers.QueueListener(self._lines, handler)
        self._queued = _Queued(self._lines)
        self._handler = handler
        LOG.setLevel(level.upper())
        LOG.addHandler(self._queued)
        LOG.propagate = False
        self._listener.start()

    def close(self) -> None:
        """What is queued is written."""
        LOG.removeHandler(self._queued)
        self._listener.stop()
        self._handler.close()


class _Queued(logging.handlers.QueueHandler):
    def __init__(self, lines: queue.Queue[Any]) -> None:
        super().__init__(lines)
        self._lines, self._dropped = lines, 0

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._dropped:
            record.__dict__.setdefault("fields", {})["lines_dropped"] = self._dropped
        if self._lines.qsize() < WAITING:
            self._lines.put_nowait(record)
            self._dropped = 0
        else:
            self._dropped += 1

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.exc_info = record.exc_text = None  # messages of exceptions may quote a request
        return record


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return record.__dict__.get("fields", {})


class Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        return msgspec.json.encode(told | fields_of(record)).decode()


class Sentence(logging.Formatter):
    """For eyes."""

    def format(self, record: logging.LogRecord) -> str:
        at, found = datetime.fromtimestamp(record.created).strftime("%H:%M:%S"), fields_of(record)
        if record.getMessage() != "request":
            return " ".join([at, record.getMessage(), *(f"{name}={value}" for name, value in found.items())])
        words = [at, str(found["status"]), found["route"], found.get("key", "")]
        if "completion_tokens" in found:
            cached = found["cached_tokens"]
            words.append(f"{found['prompt_tokens']}{'' if cached is None else f' ({cached} cached)'} tokens in,")
            words.append(f"{found['completion_tokens']} out, {'/'.join(found['finish'])}")
        if found.get("ttft") is not None:
            words.append(f"first after {found['ttft']:.2f} s")
        return " ".join([*filter(None, words), f"{found['seconds']:.2f} s"])


class Watched:
    """Sees every request from its first byte to its last: log, metrics, traces."""

    def __init__(self, app: App, service: Service, tracer: Tracer | None = None) -> None:
        self._app, self._service, self._tracer = app, service, tracer
        self._ended: WeakKeyDictionary[Ticket, tuple[Open, Tally]] = WeakKeyDictionary()
        self._second, self._lines, self._held = 0, 0, 0
        service.closed.append(self._closed)

    def _closed(self, request: Open, tally: Tally) -> None:
        self._ended[request.ticket] = request, tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        span = None if self._tracer is None else self._tracer.begin(scope)
        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            LOG.error("an error of ours", extra={"fields": {"id": _id(scope)} | _where(error)})
            raise
        finally:
            call = scope.get("state", {}).get("call")
            found = None if call is None or call.ticket is None else self._ended.pop(call.ticket, None)
            route = route_of(scope)
            self._service.measures.answered(route, status)
            self._say(scope, route, status, time.monotonic() - begun, found)
            if self._tracer is not None and span is not None:
                self._tracer.end(span, route, status, found)

    def _say(self, scope: Scope, route: str, status: int, seconds: float, found: tuple[Open, Tally] | None) -> None:
        level = logging.DEBUG if route in QUIET else logging.WARNING if status >= 500 else logging.INFO
        if not LOG.isEnabledFor(level) or (found is None and status >= 400 and self._flooded()):
            return
        call = scope.get("state", {}).get("call")
        told: dict[str, Any] = {"id": _id(scope), "key": None if call is None else call.identity.id}
        told |= {"method": scope["method"] if scope["method"] in ("GET", "POST", "DELETE") else "-", "route": route}
        told |= {"status": status, "seconds": round(seconds, 4)}
        if status == 0:
            told["status"] = 499  # the client went before there was an answer
        if found is not None:
            told |= _tokens(*found)
        if self._held:
            told["refused_without_a_line"], self._held = self._held, 0
        LOG.log(level, "request", extra={"fields": told})

    def _flooded(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        self._held += self._lines > REFUSALS
        return self._lines > REFUSALS


def _tokens(request: Open, tally: Tally) -> dict[str, Any]:
    return {
        "prompt_tokens": tally.prompt, "cached_tokens": tally.cached, "completion_tokens": tally.written,
        "reasoning_tokens": tally.thought, "finish": list(tally.ends), "worker": tally.worker,
        "queue": None if request.started is None else round(request.started - request.arrived, 4),
        "ttft": None if tally.first is None else round(tally.first - tally.arrived, 4),
    }  # fmt: skip


def route_of(scope: Scope) -> str:
    """The pattern of its path: nothing that the caller wrote."""
    path, given = getattr(scope.get("route"), "path", None), scope["path"]
    if not isinstance(path, str):
        return given if PLAIN.fullmatch(given) else "-"
    prefix = next((each for each in ("/v1", "/beta") if given.startswith(f"{each}/")), "")
    return path if path.startswith(prefix) else prefix + path  # of routers in routers FastAPI names the inner part


def _id(scope: Scope) -> str | None:
    call = scope.get("state", {}).get("call")
    return None if call is None else call.id


def _where(error: BaseException) -> dict[str, Any]:
    """The kind of an exception and the places it came through, without its message."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return {"error": type(error).__name__, "at": [f"{each.filename}:{each.lineno} {each.name}" for each in frames]}
