"""The OpenAPI document: FastAPI's, with bodies from the records in `fields.py` and the one shape of errors.

A route names its body by `openapi_extra=has_body(ChatRequest)`.
"""

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from sputnik.serve.fields import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

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
STATUSES = {
    "GET": ("400", "401", "404", "421", "503"),
    "POST": ("400", "401", "404", "408", "413", "415", "421", "429", "500", "503"),
}


BODIES = {kind.__name__: kind for kind in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)}


def has_body(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"x-body": kind.__name__}


def describe(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes, description=app.description)
    schemas: dict[str, Any] = {"Error": ERROR}
    error = {
        "description": "refused",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for operations in document["paths"].values():
        for method, operation in operations.items():
            operation["responses"] = {"200": operation["responses"]["200"]}
            operation["responses"] |= dict.fromkeys(STATUSES[method.upper()], error)
            kind = operation.pop("x-body", None)
            if kind is not None:
                (schema,), components = msgspec.json.schema_components(
                    [BODIES[kind]], ref_template="#/components/schemas/{name}"
                )
                schemas |= components
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    document["components"] = {
        "schemas": schemas,
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    document["security"] = [{"key": []}]
    return document
