"""Who asks: the one record that goes from the key in a request's header through admission to the engine.

    keyring = Keyring.of(["sk-..."], issued)
    identity = keyring.find("Bearer sk-...")            # None: nobody we know
    if not identity.may("/v1/chat/completions"): ...

Keys that were given at the start are compared by their SHA-256, which is all that is kept: they have 256 random bits,
so a slow hash would protect nothing. Those of the database are found by `books/access.py`. Left out: accounts.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Class = Literal["interactive", "paid", "free", "batch"]
Scope = Literal["chat", "completions", "models"]
SCOPES = frozenset({"chat", "completions", "models"})
PATHS: Mapping[str, Scope | None] = {
    "/chat/completions": "chat",
    "/responses": "chat",
    "/messages": "chat",
    "/completions": "completions",
    "/embeddings": "completions",
    "/models": "models",
    "/tokenize": "models",
    "/detokenize": "models",
    "/requests": None,
    "/user/balance": None,
    "/openapi.json": None,
}
"""The scope that each path and what is below it need, without /v1 and /beta; None: any key may. What is not here is for
keys of all scopes."""


@dataclass(frozen=True)
class Identity:
    id: str
    """Of the account: fair shares and limits are by it. Safe to log."""
    rank: Class = "paid"
    salt: bytes = b""
    """Prompts that were computed for one salt are reused for no other."""
    name: str = ""
    """That its owner gave the key."""
    scopes: frozenset[str] = SCOPES

    def may(self, path: str) -> bool:
        if self.scopes == SCOPES:
            return True
        plain = re.sub(r"^/(v1|beta)(?=/)", "", path)
        for start, scope in PATHS.items():
            if plain == start or plain.startswith(f"{start}/"):
                return scope is None or scope in self.scopes
        return False


class Finder(Protocol):
    def find(self, key: str) -> Identity | None: ...


ANYONE = Identity("anyone")
"""Where no keys are asked for."""


def new_key() -> str:
    return f"sk-{secrets.token_urlsafe(32)}"


def key_hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Keyring:
    def __init__(self, known: Mapping[str, Identity] | None, issued: Finder | None = None) -> None:
        """`known`: by the key's hash; None: whoever comes is `ANYONE`. `issued`: knows others."""
        self._known, self._issued = known, issued

    @classmethod
    def of(cls, hashes: Iterable[str] | None, issued: Finder | None = None) -> "Keyring":
        """Identities named by the first digits of the hash."""
        if hashes is None:
            return cls(None)
        found = {each: Identity(f"key-{each[:8]}", salt=bytes.fromhex(each[:32])) for each in hashes}
        return cls(found, issued)

    def find(self, credential: str) -> Identity | None:
        """Whose credential this is: the value of an `authorization` or `x-api-key` header."""
        if self._known is None:
            return ANYONE
        scheme, _, key = credential.rpartition(" ")
        if scheme.lower() not in ("", "bearer"):
            return None
        found = self._known.get(key_hash(key.strip()))
        return found if found is not None or self._issued is None else self._issued.find(key.strip())
