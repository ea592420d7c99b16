"""The routes, as a FastAPI application behind the guard; and the operator's, on a listener of their own.

    app = make_app(service, hosts);  operator = make_operator_app(service)

Each API route is there with `/v1` before it and without, as DeepSeek's are, and under `/beta`. Bodies are checked by
`body.parse`, so the OpenAPI document is made from the records in `fields.py`. Errors have one shape (`refusals.py`).
"""

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from sputnik import __version__
from sputnik.serve.answering import answer, called, reading
from sputnik.serve.asking import ALIASES, Asking
from sputnik.serve.body import parse
from sputnik.serve.books.repeats import Repeats
from sputnik.serve.fields import ChatRequest, CompletionRequest, DetokenizeRequest, Sampling, TokenizeRequest
from sputnik.serve.generations import Job
from sputnik.serve.guard import App, Guard, Receive, Scope, Send, refuse
from sputnik.serve.messages.routes import add_messages
from sputnik.serve.openapi import describe, speaks
from sputnik.serve.refusals import Refusal
from sputnik.serve.responses.routes import add_responses
from sputnik.serve.responses.shelf import Shelf
from sputnik.serve.service import Service
from sputnik.serve.sources import OwnEngine
from sputnik.serve.status import Fresh, page, report
from sputnik.serve.telling import ChatTeller, CompletionTeller, Head, Teller

METHODS = ("DELETE", "GET", "POST")


def make_app(service: Service, hosts: Collection[str] | None) -> App:
    app = FastAPI(title="Sputnik", version=__version__, docs_url=None, redoc_url=None)
    routes, shelf = Routes(service), Shelf()
    for prefix in ("/v1", "", "/beta"):
        app.include_router(_api(routes, service, shelf), prefix=prefix, include_in_schema=prefix == "/v1")
    app.include_router(_beside(routes))
    add_errors(app)
    names = [service.settings.name, *ALIASES]
    app.openapi = lambda: describe(app, names)  # type: ignore[method-assign]
    return Guard(Repeats(app, service.books), service, hosts)


def _api(routes: "Routes", service: Service, shelf: Shelf) -> APIRouter:
    api = APIRouter()
    add, get, post = api.add_api_route, ["GET"], ["POST"]
    add("/chat/completions", routes.chat, methods=post, openapi_extra=speaks("ChatRequest", "ChatCompletion"))
    add("/completions", routes.completions, methods=post, openapi_extra=speaks("CompletionRequest", "Completion"))
    add("/embeddings", routes.embeddings, methods=post)
    add("/models", routes.models, methods=get, openapi_extra=speaks(None, "ModelList"))
    add("/models/{model}", routes.model, methods=get, openapi_extra=speaks(None, "Model"))
    add("/requests/{id}", routes.request, methods=get, openapi_extra=speaks(None, "RequestStatus"))
    add("/requests/{id}/answer_now", routes.answer_now, methods=post, openapi_extra=speaks(None, "RequestStatus"))
    add("/requests/{id}/cancel", routes.cancel, methods=post, openapi_extra=speaks(None, "RequestStatus"))
    add_responses(api, service, shelf, OwnEngine(service))
    add_messages(api, service, OwnEngine(service))
    return api


def _beside(routes: "Routes") -> APIRouter:
    beside = APIRouter()
    add, get, post = beside.add_api_route, ["GET"], ["POST"]
    add("/tokenize", routes.tokenize, methods=post, openapi_extra=speaks("TokenizeRequest", "Tokens"))
    add("/detokenize", routes.detokenize, methods=post, openapi_extra=speaks("DetokenizeRequest", "Prompt"))
    add("/user/balance", routes.balance, methods=get, openapi_extra=speaks(None, "Balance"))
    add("/health", routes.health, methods=get, openapi_extra=speaks(None, "Status"))
    add("/ready", routes.ready, methods=get, openapi_extra=speaks(None, "Status"))
    add("/version", routes.version, methods=get, openapi_extra=speaks(None, "Version"))
    add("/status", routes.status, methods=get, include_in_schema=False)
    add("/status.json", routes.status_json, methods=get, include_in_schema=False)
    return beside


class Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._since = int(time.time())
        self._page = Fresh(lambda: page(report(service, service.board), service.settings.name or "Sputnik"))
        self._report = Fresh(lambda: msgspec.json.encode(report(service, service.board)))

    # --- answers ---

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        call, asking = called(self._service, request)
        body = parse(call.body, ChatRequest)
        asked, applied = await reading(call, lambda: asking.chat(body, call.identity))
        teller = self._teller(ChatTeller, f"chatcmpl-{call.id}", body, asking, applied)
        return answer(self._service, call, [asked], bool(body.stream), teller)

    async def completions(self, request: Request) -> Response:
        """Go on from a text, or fill in between two."""
        call, asking = called(self._service, request)
        body = parse(call.body, CompletionRequest)
        asked, applied = await reading(call, lambda: asking.completions(body, call.identity))
        teller = self._teller(CompletionTeller, f"cmpl-{call.id}", body, asking, applied)
        return answer(self._service, call, asked, bool(body.stream), teller)

    def _teller(
        self, kind: type[ChatTeller] | type[CompletionTeller], id: str, body: Sampling, asking: Asking,
        applied: dict[str, Any],
    ) -> Callable[[Job], Teller]:  # fmt: skip
        head = Head(id, body.model, int(time.time()), f"fp_{self._service.fingerprint}")
        usage = body.stream_options is not None and body.stream_options.include_usage
        return lambda job: kind(head, asking.speech, job, applied, usage)

    async def embeddings(self, request: Request) -> Response:
        """Not offered."""
        raise Refusal(501, "no embeddings here: this model writes, and was not trained to embed", retry=False)

    # --- a request under way ---

    async def request(self, request: Request, id: str) -> Response:
        """Where a request stands: its place in line and the wait, or that it runs."""
        found = self._service.requests[self._name(request, id)]
        place = self._service.place(self._name(request, id))
        status: dict[str, Any] = {"id": id, "status": "running", "tokens": found.job.produced}
        if place is not None:
            status = {"id": id, "status": "waiting", "position": place.position, "wait_seconds": place.wait}
        return JSONResponse(status)

    async def answer_now(self, request: Request, id: str) -> Response:
        """Close the thought: what comes next is the answer."""
        self._service.requests[self._name(request, id)].job.answer_now()
        return JSONResponse({"id": id, "status": "answering"})

    async def cancel(self, request: Request, id: str) -> Response:
        """End it; its stream ends with what there is."""
        stopped = Refusal(400, "the request was cancelled", code="cancelled", retry=False)
        self._service.requests[self._name(request, id)].job.fail(stopped)
        return JSONResponse({"id": id, "status": "cancelled"})

    def _name(self, request: Request, id: str) -> tuple[str, str]:
        name = (request.state.call.identity.id, id)
        if name not in self._service.requests:
            raise Refusal(404, "no request of this id is under way", code="request_not_found")
        return name

    # --- beside answers ---

    async def models(self) -> Response:
        """The one model, and the names under which DeepSeek's clients ask for it."""
        names = [self._service.settings.name, *ALIASES]
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, model: str) -> Response:
        if model not in (self._service.settings.name, *ALIASES):
            raise Refusal(404, f"no model {model!r} here", code="model_not_found", param="model")
        return JSONResponse(self._model(model))

    def _model(self, name: str) -> dict[str, Any]:
        found = {"id": name, "object": "model", "created": self._since, "owned_by": "sputnik"}
        asking = self._service.asking
        return found if asking is None else found | {"max_model_len": asking.speech.context}

    async def tokenize(self, request: Request) -> Response:
        """Ids of a text, or of a conversation as the model sees it."""
        call, asking = called(self._service, request)
        body = parse(call.body, TokenizeRequest)
        if (body.prompt is None) == (body.messages is None):
            raise Refusal(400, "give prompt or messages, one of them")
        with self._service.counting(call.identity):
            ids = await reading(call, lambda: asking.tokens(body))
        return JSONResponse({"count": len(ids), "max_model_len": asking.speech.context, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        call, asking = called(self._service, request)
        body = parse(call.body, DetokenizeRequest)
        with self._service.counting(call.identity):
            return JSONResponse({"prompt": await reading(call, lambda: asking.text(body.tokens, body.model))})

    async def balance(self, request: Request) -> Response:
        """What is left of the key's budget; without a budget there is nothing to tell."""
        books = self._service.books
        none: dict[str, Any] = {"is_available": True, "balance_infos": []}
        return JSONResponse(none if books is None else await books.balance(request.state.call.identity))

    async def health(self) -> Response:
        """The gateway is alive; it says nothing of the engine."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """A token has just come out of the engine."""
        if await self._service.ready():
            return JSONResponse({"status": "ready"})
        raise Refusal(503, f"not ready: {self._service.state}", code=self._service.state, retry_after=1)

    async def status(self) -> Response:
        """What probes have found, for people."""
        text, headers = self._page()
        return Response(text, 200, headers, "text/html")

    async def status_json(self) -> Response:
        return Response(self._report(), media_type="application/json")

    async def version(self) -> Response:
        return JSONResponse({"version": __version__})


def add_errors(app: FastAPI) -> None:
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _not_there)
    app.add_exception_handler(Exception, _broken)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    call = getattr(request.state, "call", None)
    status, headers, body = error.told(request.url.path, None if call is None else call.id)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


async def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = "no such route: see /openapi.json" if error.status_code == 404 else str(error.detail)
    response = await _refused(request, Refusal(error.status_code, text))
    if error.status_code == 405:
        response.headers["allow"] = ", ".join([each for each in METHODS if _takes(request, each)])
    return response


def _takes(request: Request, method: str) -> bool:
    scope = dict(request.scope) | {"method": method}
    return any(route.matches(dict(scope))[0] is Match.FULL for route in request.app.routes)


async def _broken(request: Request, error: Exception) -> Response:
    return await _refused(request, Refusal(500, "an error of ours; it is in the log", retry=False))


# --- the operator's ---


def make_operator_app(service: Service) -> App:
    """Metrics and what is under way, for loopback only."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        match scope["path"]:
            case "/metrics":
                body, kind = await _metrics(service), b"text/plain; version=0.0.4; charset=utf-8"
            case "/health":
                body, kind = msgspec.json.encode({"status": service.state}), b"application/json"
            case _:
                await refuse(send, Refusal(404, "here are /metrics and /health"), scope["path"])
                return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": body})

    return app


async def _metrics(service: Service) -> bytes:
    admission = service.admission
    gauges = {
        "num_requests_running": float(len(service.requests) - admission.waiting),
        "num_requests_waiting": float(admission.waiting),
        "queued_prompt_tokens": float(admission.tokens),
        "worker_up": float(service.engine.up),
        "workers_lost": float(service.engine.died),
        "books_up": float(service.books is None or service.books.ready),
    }
    try:
        async with asyncio.timeout(2.0):
            engine = await service.engine.figures()
    except (TimeoutError, ConnectionError):
        engine = {}
    return service.measures.page(gauges, engine)
