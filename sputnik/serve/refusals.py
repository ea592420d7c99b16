"""What a client is told when it gets no answer: a status, and OpenAI's shape or on Anthropic's routes theirs.

    raise Refusal(400, "max_tokens must be at least 1", param="max_tokens")
    -> 400 {"error": {"message": ..., "type": "invalid_request_error", "param": "max_tokens", "code": null}}
    -> 400 {"type": "error", "error": {"type": "invalid_request_error", "message": ...}, "request_id": ...}

Refused for lack of room (429: this key's share, 503: the server's) says when to come again. Whatever fails after tokens
were produced says that trying again costs them again (`x-should-retry`, which OpenAI's clients obey).
"""

import math
from collections.abc import Mapping

import msgspec

TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_implemented_error",
    503: "overloaded_error",
    507: "server_error",
}
ANTHROPIC: Mapping[int, str] = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
"""Their names; all others are invalid_request_error. What is 503 elsewhere is 529 there."""


class Refusal(Exception):
    """Not answered, and why; `message` is for the caller to read and names the fix."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after
        self.retry = retry
        """False tells clients not to try again by themselves."""

    def body(self) -> bytes:
        error = {"message": self.message, "type": TYPES[self.status], "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def headers(self) -> list[tuple[bytes, bytes]]:
        found = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            found.append((b"retry-after", str(max(1, math.ceil(self.retry_after))).encode()))
        if self.retry is not None:
            found.append((b"x-should-retry", b"true" if self.retry else b"false"))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found

    def told(self, path: str, id: str | None) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body in the shape of a route."""
        headers = self.headers()
        if id is not None:
            headers += [(b"x-request-id", id.encode()), (b"request-id", id.encode())]
        if not speaks_anthropic(path):
            return self.status, headers, self.body()
        kind = ANTHROPIC.get(self.status, "invalid_request_error")
        body = {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": id}
        return 529 if self.status == 503 else self.status, headers, msgspec.json.encode(body)


def speaks_anthropic(path: str) -> bool:
    return path.endswith(("/messages", "/messages/count_tokens"))
