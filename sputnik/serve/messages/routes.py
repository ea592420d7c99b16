"""`/messages` and `/messages/count_tokens`.

add_messages(router, service, OwnEngine(service))
"""

import time

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from sputnik.serve.answering import reply
from sputnik.serve.body import parse
from sputnik.serve.guard import Call
from sputnik.serve.messages.chat import as_chat
from sputnik.serve.messages.fields import CountRequest, MessagesRequest
from sputnik.serve.messages.telling import MessagesTeller
from sputnik.serve.openapi import speaks
from sputnik.serve.service import Service
from sputnik.serve.sources import Source
from sputnik.serve.telling import Head


def add_messages(api: APIRouter, service: Service, source: Source) -> None:
    async def create(request: Request) -> Response:
        """Answer a conversation, as Anthropic has it."""
        call: Call = request.state.call
        body = parse(call.body, MessagesRequest)
        prepared = await source.prepare(request, lambda: as_chat(body))
        head = Head(f"msg_{call.id}", body.model, int(time.time()), source.fingerprint)
        spoken = prepared.open()
        return reply(service, call, spoken, bool(body.stream), MessagesTeller(head, spoken, prepared.applied))

    async def count(request: Request) -> Response:
        """The tokens that a conversation has as a prompt."""
        body = parse(request.state.call.body, CountRequest)
        return JSONResponse({"input_tokens": await source.count(request, lambda: as_chat(body))})

    api.add_api_route("/messages", create, methods=["POST"], openapi_extra=speaks("MessagesRequest", "Message"))
    api.add_api_route(
        "/messages/count_tokens", count, methods=["POST"], openapi_extra=speaks("CountRequest", "TokenCount")
    )
