"""Bodies of requests: bytes to checked records, with limits on everything that costs before it is checked.

    request = parse(body, ChatRequest)          # Refusal 400, its `param` the place that is wrong

Refused: what is not JSON, nests deeper than `DEPTH`, names a key twice or one we do not know (the nearest known one is
named), or has a value of another type; nothing is coerced.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import msgspec

from sputnik.serve.refusals import Refusal

DEPTH = 64
MEDIA = re.compile(r"Invalid (?:enum )?value '(\w*(?:image|audio|video|file|document)\w*)'")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
SHOWN = 200
"""Characters of what a caller wrote that a refusal repeats."""
T = TypeVar("T", bound=msgspec.Struct)


def read_json(body: bytes) -> Any:
    """The value of a body; Refusal if it is not JSON as RFC 8259 has it."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
        if SURROGATE.search(body):  # each half by itself is no text that could be sent on
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: byte {error.start}") from None
    except UnicodeEncodeError:
        raise Refusal(400, "the body has half of a surrogate pair: remove or repair it") from None
    except RecursionError:
        raise Refusal(400, f"the body nests deeper than {DEPTH} levels") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    _check_depth(value)
    return value


def parse(body: bytes, kind: type[T], prepare: Callable[[dict[str, Any]], None] = lambda value: None) -> T:
    """`prepare` may fill in what may be left out, before types are checked."""
    value = read_json(body)
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object")
    prepare(value)
    known = [field.encode_name for field in msgspec.structs.fields(kind)]
    for name in value:
        if name not in known:
            shown = name[:SHOWN]
            near = difflib.get_close_matches(shown, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out: what it asks for would not be done"
            raise Refusal(400, f"unknown parameter {shown!r}; {hint}", code="unknown_parameter", param=shown)
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        head, at, tail = str(error).rpartition(" - at `")
        text = (head if at else tail)[:SHOWN]
        param = tail.removesuffix("`").removeprefix("$.") if at else None
        if media := MEDIA.search(text):
            text = f"{media[1]} is not offered, this model reads text alone"
        raise Refusal(400, f"{param}: {text}" if param else text, code="invalid_value", param=param) from None


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        inner = [each for each in level if each and isinstance(each, list | dict)]
        if not inner:
            return
        level = [each for found in inner for each in (found.values() if isinstance(found, dict) else found)]
    if any(isinstance(each, list | dict) for each in level):
        raise Refusal(400, f"the body nests deeper than {DEPTH} levels")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:100]!r} stands twice in one object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")
