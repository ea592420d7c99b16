"""The API of a gateway that stands before other servers: the same front, fewer routes.

    app = make_upstream_app(service, fleet, hosts)

Chat completions and completions go through; Responses and Messages are made of chat completions (`lifted.py`), whatever
else an upstream speaks. Models are those of the upstreams. What speaks of tokens or needs the engine's own state
(tokenize, counting, closing a thought) is not offered.
"""

import time
from collections.abc import Collection
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse, Response

from sputnik import __version__
from sputnik.serve.answering import reading, waiting
from sputnik.serve.app import Routes, add_errors
from sputnik.serve.books.repeats import Repeats
from sputnik.serve.guard import App, Call, Guard
from sputnik.serve.messages.routes import add_messages
from sputnik.serve.refusals import Refusal
from sputnik.serve.replies import StreamReply, WholeReply
from sputnik.serve.responses.routes import add_responses
from sputnik.serve.responses.shelf import Shelf
from sputnik.serve.service import Name, Service
from sputnik.serve.upstreams.fleet import Fleet
from sputnik.serve.upstreams.forward import Forward
from sputnik.serve.upstreams.lifted import Lifting, enter
from sputnik.serve.upstreams.plain import Kind, read


def make_upstream_app(service: Service, fleet: Fleet, hosts: Collection[str] | None) -> App:
    app = FastAPI(title="Sputnik", version=__version__, docs_url=None, redoc_url=None)
    routes, ours = UpstreamRoutes(service, fleet), Routes(service)
    lifting, shelf = Lifting(service, fleet), Shelf()
    for prefix in ("/v1", "", "/beta"):
        api, get, post = APIRouter(prefix=prefix), ["GET"], ["POST"]
        api.add_api_route("/chat/completions", routes.chat, methods=post)
        api.add_api_route("/completions", routes.completions, methods=post)
        api.add_api_route("/models", routes.models, methods=get)
        api.add_api_route("/models/{model:path}", routes.model, methods=get)
        api.add_api_route("/requests/{id}", ours.request, methods=get)
        api.add_api_route("/requests/{id}/cancel", ours.cancel, methods=post)
        add_responses(api, service, shelf, lifting)
        add_messages(api, service, lifting)
        app.include_router(api, include_in_schema=prefix == "/v1")
    app.add_api_route("/user/balance", ours.balance, methods=["GET"])
    beside = {"/health": ours.health, "/ready": ours.ready, "/version": ours.version, "/status": ours.status}
    for path, answer in (beside | {"/status.json": ours.status_json}).items():
        app.add_api_route(path, answer, methods=["GET"])
    add_errors(app)
    return Guard(Repeats(app, service.books), service, hosts)


class UpstreamRoutes:
    def __init__(self, service: Service, fleet: Fleet) -> None:
        self._service, self._fleet = service, fleet
        self._since = int(time.time())

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._forward(request, "/chat/completions", "chat")

    async def completions(self, request: Request) -> Response:
        """Go on from a text."""
        return await self._forward(request, "/completions", "text")

    async def _forward(self, request: Request, path: str, kind: Kind) -> Response:
        call: Call = request.state.call
        wish = await reading(call, lambda: read(call.body, kind))
        forward = enter(self._service, self._fleet, request, path, wish)
        name = (call.identity.id, call.id)
        return (Streamed if wish.stream else Complete)(self._service, name, forward)

    async def models(self) -> Response:
        """Those of all upstreams."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._fleet.models()]})

    async def model(self, model: str) -> Response:
        if model not in self._fleet.models():
            raise Refusal(404, f"no model {model!r} here", code="model_not_found", param="model")
        return JSONResponse(self._model(model))

    def _model(self, name: str) -> dict[str, Any]:
        entry = self._fleet.models()[name]
        told = {"id": name, "object": "model", "created": self._since, "owned_by": "upstream"}
        return told | {key: entry[key] for key in ("created", "owned_by", "max_model_len") if key in entry}


class Complete(WholeReply):
    def __init__(self, service: Service, name: Name, forward: Forward) -> None:
        super().__init__(name[1], forward.close, lambda: service.close(name))
        self._forward = forward

    async def whole(self) -> bytes:
        frames = await self._forward.more()
        return msgspec.json.encode(frames[0]) if frames else b""


class Streamed(StreamReply):
    def __init__(self, service: Service, name: Name, forward: Forward) -> None:
        super().__init__(name[1], forward.close, lambda: service.close(name))
        self._service, self._name, self._forward = service, name, forward
        self._ended = False

    async def more(self) -> bytes:
        if self._ended:
            return b""
        frames = await self._forward.more()
        self._ended = not frames
        return b"".join([b"data: " + msgspec.json.encode(frame) + b"\n\n" for frame in frames]) or b"data: [DONE]\n\n"

    def silence(self) -> bytes:
        return f": {waiting(self._service, self._name)}\n\n".encode()

    def failed(self, refusal: Refusal) -> bytes:
        return b"data: " + refusal.body() + b"\n\n"
