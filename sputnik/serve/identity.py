"""Who asks: the one record that goes from the key in a request's header through admission to the engine.

    keyring = Keyring.of(["sk-..."])
    identity = keyring.find("Bearer sk-...")            # None: nobody we know

Keys are compared by their SHA-256, which is all that is kept: they have 256 random bits, so a slow hash would protect
nothing. Left out: accounts, budgets and scopes, which will make identities of the same shape.
"""

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Class = Literal["interactive", "paid", "free", "batch"]


@dataclass(frozen=True)
class Identity:
    id: str
    """Of the account: fair shares and limits are by it. Safe to log."""
    rank: Class = "paid"
    salt: bytes = b""
    """Prompts that were computed for one salt are reused for no other."""


ANYONE = Identity("anyone")
"""Where no keys are asked for."""


def new_key() -> str:
    return f"sk-{secrets.token_urlsafe(32)}"


def key_hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Keyring:
    def __init__(self, known: Mapping[str, Identity] | None) -> None:
        """`known`: by the key's hash; None: whoever comes is `ANYONE`."""
        self._known = known

    @classmethod
    def of(cls, hashes: Iterable[str] | None) -> "Keyring":
        """Identities named by the first digits of the hash."""
        if hashes is None:
            return cls(None)
        return cls({each: Identity(f"key-{each[:8]}", salt=bytes.fromhex(each[:32])) for each in hashes})

    def find(self, credential: str) -> Identity | None:
        """Whose credential this is: the value of an `authorization` or `x-api-key` header."""
        if self._known is None:
            return ANYONE
        scheme, _, key = credential.rpartition(" ")
        return self._known.get(key_hash(key.strip())) if scheme.lower() in ("", "bearer") else None
