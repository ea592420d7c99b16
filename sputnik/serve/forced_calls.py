"""A grammar under which the answer is one or more calls of tools, their arguments after each tool's schema.

For `tool_choice` required or a name, and where the model may either call or answer in a form: begun where the thought
ends, as any grammar. DeepSeek's tags are control tokens, which a text cannot spell; the grammar names them by id.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sputnik.errors import DataError
from sputnik.serve.refusals import Refusal
from sputnik.text.tokenizer import TOOL_SEP, TOOLS, Tokenizer
from sputnik.text.tools import definitions


def call_grammar(
    tok: Tokenizer, tools: Sequence[Mapping[str, Any]], only: str | None, many: bool, schema: str | None = None
) -> str:
    """In llguidance's Lark; `only`: the one tool that may be called, `many`: several times. `schema`: of the answer if
    nothing has to be called; arguments are any object then, as always when the model calls by itself."""
    try:
        begin, end, call_begin, call_end = (f"<[{tok.control_id(name)}]>" for name in TOOLS[:4])
        sep = f"<[{tok.control_id(TOOL_SEP)}]>"
    except DataError:
        raise Refusal(400, "this model has no tokens for tool calls", param="tool_choice") from None
    shapes = [
        f'"{each["name"]}" {sep} %json {json.dumps(_object(json.loads(each["parameters"]) if schema is None else {}))}'
        for each in definitions(tools)
        if only in (None, each["name"])
    ]
    return "\n".join(
        [
            f"start: {begin} call{'+' if many else ''} {end}" + ("" if schema is None else f" | %json {schema}"),
            f"call: {call_begin} ({' | '.join(f'tool{place}' for place in range(len(shapes)))}) {call_end}",
            *(f"tool{place}: {shape}" for place, shape in enumerate(shapes)),
        ]
    )


def _object(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object"} | schema
