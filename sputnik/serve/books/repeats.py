"""`Idempotency-Key` on POST: the same request sent again is answered from what is kept, and costs nothing again.

    app = Repeats(app, books)               # inside the guard, which knows who asks and has read the body

Kept for a day, per key: complete answers of status 200, as they were sent, streams too, up to `LARGEST` bytes. A kept
answer comes back with `idempotent-replayed: true`; a stream then comes at once. While the first one runs: 409. With
another body: 422. Refusals are not kept, nor what was cut short, by either side: sent again, it is a new request.

What is kept can be read by who sends the Idempotency-Key and the API key again, and by nobody who has the database
alone: it is sealed with ChaCha20-Poly1305 under a secret made of those two.
"""

import asyncio
import functools
import hashlib
import re
import secrets
import time
import zlib
from collections.abc import MutableMapping
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from sqlalchemy import Connection, delete, select, update

from sputnik.serve.books.books import Books
from sputnik.serve.books.ledger import DAY, kind_of
from sputnik.serve.books.tables import Repeat
from sputnik.serve.guard import App, Call, Receive, Scope, Send, refuse
from sputnik.serve.refusals import Refusal

LARGEST = 4 << 20
SHAPE = re.compile(rb"[\x21-\x7e]{1,255}")
NONCE = 12


class Kept(msgspec.Struct, array_like=True):
    """A whole response."""

    headers: list[tuple[bytes, bytes]]
    body: bytes


class Repeats:
    def __init__(self, app: App, books: Books | None) -> None:
        self._app, self._books = app, books

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        key = headers.get(b"idempotency-key")
        if scope["type"] != "http" or scope["method"] != "POST" or key is None:
            await self._app(scope, receive, send)
            return
        call: Call = scope["state"]["call"]
        try:
            if not SHAPE.fullmatch(key):
                raise Refusal(400, "idempotency-key: up to 255 visible ASCII characters", param="idempotency-key")
            if self._books is None:
                raise Refusal(400, "nothing is kept here: leave out idempotency-key", param="idempotency-key")
            credential = headers.get(b"authorization", headers.get(b"x-api-key", b""))
            entry = _Entry(self._books, call, scope["path"], key, credential.rpartition(b" ")[2])
            found = await entry.claim()
        except Refusal as refusal:
            await refuse(send, refusal, scope["path"], call.id)
            return
        if found is not None:
            await send({"type": "http.response.start", "status": 200, "headers": found.headers})
            await send({"type": "http.response.body", "body": found.body})
            return
        copy, kept = _Copy(send), False
        try:
            await self._app(scope, receive, copy)
            under_way = call.ticket is not None and call.ticket.state != "gone"  # in the background: this was its reply
            if copy.whole and (call.ticket is None or call.ticket.whole or under_way):
                kept = await entry.keep(Kept(copy.headers, b"".join(copy.parts)))
        finally:
            if not kept:
                entry.drop()
        if copy.last is not None:
            await send(copy.last)


class _Copy:
    """Passes a response on and copies it, but holds back the last message until the answer is kept."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.headers: list[tuple[bytes, bytes]] = []
        self.parts: list[bytes] = []
        self.last: MutableMapping[str, Any] | None = None
        self._status = self._size = 0

    @property
    def whole(self) -> bool:
        return self._status == 200 and self.last is not None and self._size <= LARGEST

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self.headers = [(bytes(name), bytes(value)) for name, value in message["headers"]]
        else:
            self._size += len(message.get("body", b""))
            if self._size <= LARGEST:
                self.parts.append(message.get("body", b""))
            if not message.get("more_body"):
                self.last = message
                return
        await self._send(message)


class _Entry:
    """What the database has of one Idempotency-Key."""

    def __init__(self, books: Books, call: Call, path: str, key: bytes, credential: bytes) -> None:
        self._books = books
        self._name = _hash(call.identity.id.encode(), key)
        self._body = _hash(path.encode(), call.body)
        self._secret = hashlib.sha256(credential + b"\0" + key).digest()
        self._at = int(time.time())

    async def claim(self) -> Kept | None:
        """What is kept; None: nothing, and this request is the first. Refusal: it runs, or was another one."""
        try:
            found = await self._books.write(self._claim)
        except (Refusal, asyncio.CancelledError):  # its commit may have come about all the same
            self.drop()
            raise
        if found is None:
            return None
        body, answer = found
        if body != self._body:
            raise Refusal(422, "this idempotency-key was sent with another request: choose a new one", retry=False)
        if answer is None:
            text = "the request of this idempotency-key is under way"
            raise Refusal(409, text, code="request_in_progress", retry_after=1)
        try:
            opened = unseal(answer, self._secret)
        except InvalidTag:  # where no key is asked for, all have the same identity
            text = "this idempotency-key was sent with another API key: choose a new one"
            raise Refusal(422, text, retry=False) from None
        kept = msgspec.msgpack.decode(zlib.decompress(opened), type=Kept)
        kept.headers.append((b"idempotent-replayed", b"true"))
        return kept

    async def keep(self, kept: Kept) -> bool:
        try:
            await self._books.write(functools.partial(self._keep, kept=kept))
        except Refusal:  # the client has its answer; it is only not kept
            return False
        return True

    def drop(self) -> None:
        """Take the claim back, and no other request's of this Idempotency-Key."""
        ours = Repeat.name == self._name, Repeat.gateway == self._books.id, Repeat.at == self._at
        gone = delete(Repeat).where(*ours, Repeat.answer.is_(None))
        self._books.clerk.write(lambda connection: connection.execute(gone).rowcount, keep=True)

    def _claim(self, connection: Connection) -> tuple[str, bytes | None] | None:
        """Hash of the body and the answer that are there; None: there was nothing, and now it is said to run."""
        connection.execute(delete(Repeat).where(Repeat.name == self._name, Repeat.at < self._at - DAY))
        row = dict(name=self._name, body=self._body, gateway=self._books.id, at=self._at)
        asked = kind_of(connection).insert(Repeat).values(**row).on_conflict_do_nothing().returning(Repeat.name)
        if connection.execute(asked).first() is not None:
            return None
        found = connection.execute(select(Repeat.body, Repeat.answer).where(Repeat.name == self._name)).one()
        return found.body, found.answer

    def _keep(self, connection: Connection, kept: Kept) -> None:
        sealed = seal(zlib.compress(msgspec.msgpack.encode(kept), 1), self._secret)
        connection.execute(update(Repeat).where(Repeat.name == self._name).values(answer=sealed))


def seal(text: bytes, secret: bytes) -> bytes:
    nonce = secrets.token_bytes(NONCE)
    return nonce + ChaCha20Poly1305(secret).encrypt(nonce, text, None)


def unseal(sealed: bytes, secret: bytes) -> bytes:
    """InvalidTag if it was not sealed with this secret of 32 bytes."""
    return ChaCha20Poly1305(secret).decrypt(sealed[:NONCE], sealed[NONCE:], None)


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
