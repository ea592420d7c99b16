"""What every request passes before anything reads it: host, key, size, room in the queue, then its body within a time.

    app = Guard(inner, service, hosts)              # ASGI around ASGI

In order of cost, so that a flood is turned away by its headers alone. What gets through finds a `Call` in its scope's
state: who asks, the body, and a seat at the door of the queue, given back here if it is not used.
"""

import asyncio
import contextlib
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Any

from sputnik.serve.admission import Ticket
from sputnik.serve.identity import ANYONE, Identity
from sputnik.serve.refusals import Refusal
from sputnik.serve.service import Service

MAX_BODY = 1 << 20
BODY_SECONDS = 12.0
"""That a body may take to arrive."""
LINGER_SECONDS, LINGER_BYTES = 1.0, 8 << 20
"""How much of a large body is read and thrown away after its refusal: who is still sending would not see the answer."""
OPEN = frozenset({"/health", "/ready", "/version", "/status", "/status.json"})
"""Paths that say nothing about anybody, and ask for no key."""
GENERATING = ("/chat/completions", "/completions", "/responses", "/messages")
REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass
class Call:
    """A request as the routes see it."""

    identity: Identity
    id: str
    body: bytes
    ticket: Ticket | None
    """Of those that want something of the engine."""
    seconds: float | None
    """After which its answer is worth nothing, if it says so."""


async def refuse(send: Send, refusal: Refusal, path: str, id: str | None = None) -> None:
    """The whole response."""
    status, headers, body = refusal.told(path, id)
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Guard:
    def __init__(self, app: App, service: Service, hosts: Collection[str] | None) -> None:
        """`hosts`: names by which we may be called, so that no web page gets at us by a name of its own; None: any."""
        self._app, self._service, self._hosts = app, service, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call: Call | None = None
        try:
            call = await self._admit(scope, receive)
        except Refusal as refusal:
            await refuse(send, refusal, scope["path"])
            if scope["method"] == "POST" and refusal.status == 413:
                await _linger(receive)
            return
        scope.setdefault("state", {})["call"] = call
        try:
            await self._app(scope, receive, send)
        finally:
            if call.ticket is not None:
                self._service.leave(call.ticket)

    async def _admit(self, scope: Scope, receive: Receive) -> Call:
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in headers and name in (b"host", b"content-length", b"authorization", b"content-type"):
                raise Refusal(400, f"the header {name.decode('latin-1')} stands twice")
            headers[name] = value
        self._check_host(headers.get(b"host", b""))
        path, post = scope["path"], scope["method"] == "POST"
        identity = ANYONE if path in OPEN else self._identify(headers)
        if not identity.may(path) and path not in OPEN:
            raise Refusal(403, "this key is not for this route: its scopes are " + ", ".join(sorted(identity.scopes)))
        size = self._check_body(headers) if post else 0
        ticket = None
        if post and path.endswith(GENERATING):
            self._service.check(identity, b"idempotency-key" in headers)
            ticket = self._service.knock(identity, size)
        try:
            body = await _read(receive, size) if post else b""
            id = _request_id(headers.get(b"x-request-id"))
            return Call(identity, id, body, ticket, _seconds(headers.get(b"x-request-timeout")))
        except BaseException:
            if ticket is not None:
                self._service.leave(ticket)
            raise

    def _check_host(self, host: bytes) -> None:
        name = host.decode("latin-1").lower()
        name = name.rpartition(":")[0] if re.search(r":\d+$", name) else name
        if self._hosts is not None and name not in self._hosts:
            raise Refusal(421, "this server is not called that", code="unknown_host")

    def _identify(self, headers: dict[bytes, bytes]) -> Identity:
        credential = headers.get(b"authorization", headers.get(b"x-api-key", b""))
        identity = self._service.keyring.find(credential.decode("latin-1"))
        if identity is None:
            hint = "send the header `Authorization: Bearer KEY`" if not credential else "this key is not known here"
            raise Refusal(401, hint, code="invalid_api_key")
        return identity

    def _check_body(self, headers: dict[bytes, bytes]) -> int:
        """Its length by its header; of one that names none, the most it may have."""
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refusal(415, "send the body as it is, without content-encoding")
        kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Refusal(415, "send JSON, and say so: content-type application/json")
        length = headers.get(b"content-length", b"")
        if length and not length.isdigit():
            raise Refusal(400, "content-length is no number")
        size = int(length) if length else MAX_BODY
        if size > MAX_BODY:
            raise Refusal(413, f"a body of {size} bytes exceeds the {MAX_BODY} that are allowed")
        return size


async def _read(receive: Receive, size: int) -> bytes:
    parts, total = list[bytes](), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(408, "the connection ended before the body")
                parts.append(message.get("body", b""))
                total += len(parts[-1])
                if total > MAX_BODY:
                    raise Refusal(413, f"the body exceeds the {MAX_BODY} bytes that are allowed")
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None


async def _linger(receive: Receive) -> None:
    total = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while total < LINGER_BYTES:
                message = await receive()
                total += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


def _request_id(given: bytes | None) -> str:
    """The caller's own, if it can stand in a log; else a new one."""
    if given is None:
        return secrets.token_hex(12)
    text = given.decode("latin-1")
    if not REQUEST_ID.fullmatch(text):
        raise Refusal(400, "x-request-id: up to 64 letters, digits, _ and -", param="x-request-id")
    return text


def _seconds(given: bytes | None) -> float | None:
    if given is None:
        return None
    text = given.decode("latin-1")
    if not re.fullmatch(r"\d{1,5}(\.\d{1,3})?", text) or not float(text):
        raise Refusal(400, "x-request-timeout: seconds, as a number", param="x-request-timeout")
    return float(text)
