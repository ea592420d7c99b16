"""`/responses`, and what is done with one that is kept: read, read on, cancel, delete.

    add_responses(router, service, Shelf(), OwnEngine(service))

A response that is streamed waits for its first token, as chat completions do. If its client goes it ends, unless
`background` or an explicit `store` keeps it going.
"""

import re
import secrets
import time
from collections.abc import Callable

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from sputnik.serve.answering import waiting
from sputnik.serve.body import parse
from sputnik.serve.fields import ChatMessage
from sputnik.serve.guard import Call
from sputnik.serve.openapi import speaks
from sputnik.serve.refusals import Refusal
from sputnik.serve.replies import StreamReply, WholeReply
from sputnik.serve.responses.chat import as_chat, renamed, turns_of
from sputnik.serve.responses.fields import ResponseRequest, with_types
from sputnik.serve.responses.shelf import Record, Shelf
from sputnik.serve.responses.telling import ResponseTeller, echo
from sputnik.serve.service import Service
from sputnik.serve.sources import Prepared, Source
from sputnik.serve.telling import Head

QUERY = {
    "parameters": [
        {"name": "stream", "in": "query", "required": False, "schema": {"enum": ["true", "false"]}},
        {"name": "starting_after", "in": "query", "required": False, "schema": {"type": "integer", "minimum": 0}},
    ]
}


def add_responses(api: APIRouter, service: Service, shelf: Shelf, source: Source) -> None:
    routes = ResponseRoutes(service, shelf, source)
    extra, one = speaks("ResponseRequest", "ResponseObject"), speaks(None, "ResponseObject")
    api.add_api_route("/responses", routes.create, methods=["POST"], openapi_extra=extra)
    api.add_api_route("/responses/compact", routes.compact, methods=["POST"], include_in_schema=False)
    api.add_api_route("/responses/{id}", routes.read, methods=["GET"], openapi_extra=one | QUERY)
    api.add_api_route("/responses/{id}/cancel", routes.cancel, methods=["POST"], openapi_extra=one)
    gone = speaks(None, "DeletedResponse")
    api.add_api_route("/responses/{id}", routes.delete, methods=["DELETE"], openapi_extra=gone)


class ResponseRoutes:
    def __init__(self, service: Service, shelf: Shelf, source: Source) -> None:
        self._service, self._shelf, self._source = service, shelf, source

    async def create(self, request: Request) -> Response:
        """Answer, in OpenAI's newer form."""
        call: Call = request.state.call
        body = parse(call.body, ResponseRequest, with_types)
        if body.background and body.store is False:
            raise Refusal(400, "background needs store: there is no other way to read it", param="store")
        if body.stream_options is not None and not body.stream:
            raise Refusal(400, "stream_options are for streams: leave them out", param="stream_options")
        before = self._shelf.turns(call.identity.id, body.previous_response_id)
        turns = turns_of(body, before)
        try:
            prepared = await self._source.prepare(request, lambda: as_chat(body, turns))
        except Refusal as refusal:
            raise renamed(refusal) from None
        record = self._begin(call, body, turns, prepared)
        if body.stream:
            name = (call.identity.id, call.id)
            return Replay(record, 0, call.id, record.left, lambda: waiting(self._service, name))
        if body.background:
            return Response(record.body, media_type="application/json", headers={"x-request-id": call.id})
        return WholeRecord(record, call.id)

    def _begin(self, call: Call, body: ResponseRequest, turns: list[ChatMessage], prepared: Prepared) -> Record:
        name = (call.identity.id, call.id)
        head = Head(f"resp_{secrets.token_hex(16)}", body.model, int(time.time()), self._source.fingerprint)
        repeated = echo(body)
        spoken = prepared.open()
        teller = ResponseTeller(head, repeated, spoken, prepared.applied)
        record = Record(
            head.id, call.identity.id, turns, teller, spoken, bool(body.stream), kept=body.store is not False,
            goes_on=bool(body.background or body.store),
        )  # fmt: skip
        if body.background:
            record.add(teller.begin("queued"))
        self._shelf.write(record, lambda: self._service.close(name))
        return record

    async def compact(self, request: Request) -> Response:
        """Not offered."""
        raise Refusal(501, "nothing is compacted here: send the input that is to be gone on from", retry=False)

    async def read(self, request: Request, id: str) -> Response:
        """A response as it stands; or its events, from the first or from the one after `starting_after`."""
        record = self._find(request, id)
        query = dict(request.query_params)
        stream, after = query.pop("stream", "false"), query.pop("starting_after", None)
        if query or stream not in ("true", "false") or (after is not None and not re.fullmatch(r"\d{1,9}", after)):
            raise Refusal(400, "?stream=true&starting_after=NUMBER is all there is to ask")
        if stream == "false":
            if after is not None:
                raise Refusal(400, "starting_after goes with stream=true", param="starting_after")
            return Response(record.body, media_type="application/json")
        if not record.streamed:
            raise Refusal(400, "only a response that was created with stream: true can be read as one", param="stream")
        number = 0 if after is None else int(after) + 1
        return Replay(record, number, request.state.call.id, lambda: None, lambda: "keep-alive")

    async def cancel(self, request: Request, id: str) -> Response:
        """End it, if it has not ended; what has been written stays."""
        record = self._find(request, id)
        record.stop()
        await record.until_ended()
        return Response(record.body, media_type="application/json")

    async def delete(self, request: Request, id: str) -> Response:
        """Forget it."""
        self._shelf.drop(self._find(request, id))
        return JSONResponse({"id": id, "object": "response.deleted", "deleted": True})

    def _find(self, request: Request, id: str) -> Record:
        return self._shelf.find(request.state.call.identity.id, id)


class WholeRecord(WholeReply):
    def __init__(self, record: Record, id: str) -> None:
        super().__init__(id, record.left, lambda: None)
        self._record = record

    async def whole(self) -> bytes:
        await self._record.until_ended()
        if self._record.error is not None:
            raise self._record.error
        return self._record.body


class Replay(StreamReply):
    """The events of a record from a number on."""

    def __init__(
        self, record: Record, number: int, id: str, left: Callable[[], None], waiting: Callable[[], str]
    ) -> None:
        super().__init__(id, left, lambda: None)
        self._record, self._number, self._waiting = record, number, waiting
        self._ended = False

    async def more(self) -> bytes:
        if self._ended:
            return b""
        events = await self._record.after(self._number)
        self._number += len(events)
        self._ended = not events
        return b"".join(events) or b"data: [DONE]\n\n"

    def silence(self) -> bytes:
        return f": {self._waiting()}\n\n".encode()

    def failed(self, refusal: Refusal) -> bytes:
        """Before the first event: later ones are told by the last."""
        event = {"type": "error", "sequence_number": self._number, **msgspec.json.decode(refusal.body())}
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\ndata: [DONE]\n\n"
