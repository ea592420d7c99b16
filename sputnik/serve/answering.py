"""From a request that came through the guard to its reply: what the routes of every dialect have in common.

call, asking = called(service, request)
asked, applied = await reading(call, lambda: asking.chat(parse(call.body, ChatRequest), call.identity))
return answer(service, call, [asked], stream, lambda job: ChatTeller(head, speech, job, applied))
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response

from sputnik.serve.asking import Asking
from sputnik.serve.generations import Asked, Job
from sputnik.serve.guard import Call
from sputnik.serve.refusals import Refusal
from sputnik.serve.replies import EventStream, Whole
from sputnik.serve.service import Name, Service
from sputnik.serve.telling import Flow, Teller

LONG = 1 << 15
"""Bytes of a body from which a thread reads it, so that streams keep their pace."""
T = TypeVar("T")


def called(service: Service, request: Request) -> tuple[Call, Asking]:
    if service.asking is None:
        raise Refusal(503, "the model is being loaded", code="loading", retry_after=5)
    return request.state.call, service.asking


async def reading(call: Call, work: Callable[[], T]) -> T:
    """What `work` makes of the body."""
    return await asyncio.to_thread(work) if len(call.body) > LONG else work()


def answer(
    service: Service, call: Call, asked: Sequence[Asked], stream: bool, teller: Callable[[Job], Teller]
) -> Response:
    assert call.ticket is not None
    job = service.open((call.identity.id, call.id), call.ticket, asked, call.seconds)
    return reply(service, call, job, stream, teller(job))


def reply(service: Service, call: Call, flow: Flow, stream: bool, teller: Teller) -> Response:
    """Of what has been opened already."""
    name = (call.identity.id, call.id)
    if not stream:
        return Whole(flow, teller, call.id, lambda: service.close(name))
    return EventStream(flow, teller, call.id, lambda: service.close(name), lambda: waiting(service, name))


def waiting(service: Service, name: Name) -> str:
    """What is said to who waits for the first token."""
    place = service.place(name) if name in service.requests else None
    if place is None:
        return "keep-alive"
    return f"waiting, {place.position} before" + ("" if place.wait is None else f", about {place.wait:.0f} s")
