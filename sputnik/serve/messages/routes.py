"""`/messages` and `/messages/count_tokens`.

add_messages(router, service)
"""

import time

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from sputnik.serve.answering import answer, called, reading
from sputnik.serve.body import parse
from sputnik.serve.messages.chat import as_chat
from sputnik.serve.messages.fields import CountRequest, MessagesRequest
from sputnik.serve.messages.telling import MessagesTeller
from sputnik.serve.openapi import speaks
from sputnik.serve.service import Service
from sputnik.serve.telling import Head


def add_messages(api: APIRouter, service: Service) -> None:
    async def create(request: Request) -> Response:
        """Answer a conversation, as Anthropic has it."""
        call, asking = called(service, request)
        body = parse(call.body, MessagesRequest)
        asked, applied = await reading(call, lambda: asking.chat(as_chat(body), call.identity))
        head = Head(f"msg_{call.id}", body.model, int(time.time()), f"fp_{service.fingerprint}")
        return answer(service, call, [asked], bool(body.stream), lambda job: MessagesTeller(head, job, applied))

    async def count(request: Request) -> Response:
        """The tokens that a conversation has as a prompt."""
        call, asking = called(service, request)
        body = parse(call.body, CountRequest)
        return JSONResponse({"input_tokens": await reading(call, lambda: asking.count(as_chat(body)))})

    api.add_api_route("/messages", create, methods=["POST"], openapi_extra=speaks("MessagesRequest", "Message"))
    api.add_api_route(
        "/messages/count_tokens", count, methods=["POST"], openapi_extra=speaks("CountRequest", "TokenCount")
    )
