"""The OpenAPI document: FastAPI's, with bodies from the records that check them, replies and the shapes of errors.

add(path, route, methods=["POST"], openapi_extra=speaks("ChatRequest", "ChatCompletion"))
describe(app, ["quickstart"])            # the names that `model` may have
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from sputnik.serve.fields import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from sputnik.serve.guard import OPEN
from sputnik.serve.messages.fields import CountRequest, MessagesRequest
from sputnik.serve.refusals import speaks_anthropic
from sputnik.serve.responses.fields import ResponseRequest
from sputnik.serve.schemas import REPLIES

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": ["string", "null"]},
    },
}
STATUSES = {
    "GET": ("400", "401", "403", "404", "421", "503"),
    "DELETE": ("400", "401", "403", "404", "421", "503"),
    "POST": (
        "400", "401", "402", "403", "404", "408", "409", "413", "415", "421", "422", "429", "500", "501", "503", "507",
    ),
}  # fmt: skip
BODIES: tuple[type[msgspec.Struct], ...] = (
    ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, MessagesRequest, CountRequest, ResponseRequest,
)  # fmt: skip
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
"""Of a stream, each."""
STREAMED = ("ChatRequest", "CompletionRequest", "MessagesRequest", "ResponseRequest")


def speaks(body: str | None, reply: str) -> dict[str, Any]:
    """The names of what a route takes and what it answers."""
    return {"x-reply": reply} | ({} if body is None else {"x-body": body})


def describe(app: FastAPI, models: Sequence[str]) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes, description=app.description)
    kinds = [*BODIES, *REPLIES]
    found, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    refs = {kind.__name__: ref for kind, ref in zip(kinds, found)}
    for kind in BODIES:
        model = schemas[refs[kind.__name__]["$ref"].rpartition("/")[2]]["properties"].get("model")
        if model is not None:
            model["enum"] = [*models, None] if "anyOf" in model else [*models]
    schemas["MessageItem"]["required"].remove("type")  # an item that names none is a message
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _describe(path, method.upper(), operation, refs)
            if path in OPEN:
                operation["security"] = []
    document["components"] = {
        "schemas": schemas | {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR},
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    document["security"] = [{"key": []}]
    return document


def _describe(path: str, method: str, operation: dict[str, Any], refs: Mapping[str, Any]) -> None:
    body, reply = operation.pop("x-body", None), operation.pop("x-reply", None)
    anthropic = speaks_anthropic(path)
    error = _said("refused", {"$ref": f"#/components/schemas/{'AnthropicError' if anthropic else 'Error'}"})
    found: dict[str, Any] = {}
    if reply is not None:
        found["200"] = _said("done", refs[reply])
        if body in STREAMED or "stream" in [each["name"] for each in operation.get("parameters", ())]:
            found["200"]["content"]["text/event-stream"] = {"schema": EVENT}
    operation["responses"] = found | dict.fromkeys((*STATUSES[method], *(("529",) if anthropic else ())), error)
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": refs[body]}}}


def _said(description: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
