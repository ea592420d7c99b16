"""Tool calls both ways, in DeepSeek's form: OpenAI's records -> what the chat template writes, ids -> calls.

    prompt = render(tok, messages, tools=tools)               # of text/chat.py, which uses `definitions` and `written`
    text_ids, calls = split_calls(tok, answer_ids, names)     # or CallParser, id by id

    V3.1:   <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON<｜tool▁call▁end｜>...<｜tool▁calls▁end｜>
    V3, R1: the same with `function` before the separator and NAME and a fenced block of JSON after it

Prompts are written as V3.1, and both forms are read. Calls are found by token ids: a text that spells the tags is text.
What cannot be read as a call comes back as a `BrokenCall` with its text and the reason, never as an error and never as
nothing. Left out: arguments are checked to be a JSON object, not against the tool's schema (see `engine/constrain.py`).
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from sputnik.errors import DataError
from sputnik.text.tokenizer import TOOL_SEP, TOOLS, Tokenizer

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
FENCED = re.compile(r"\s*([^\n]*)\n```json\n(.*?)\n?```\s*", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is the text of a JSON object, to the letter as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class BrokenCall:
    """What looked like a call: its text, and why it is none."""

    text: str
    reason: str


def definitions(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's tool records, checked: name, description ("" if missing) and parameters ({} if missing) of each."""
    found: list[dict[str, Any]] = []
    for number, tool in enumerate(tools):
        known = isinstance(tool, Mapping) and tool.get("type") == "function"
        function = tool.get("function") if known else None
        if not isinstance(function, Mapping) or not _is_name(function.get("name")):
            raise DataError(
                f'tool {number}: need {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}, '
                "the name of up to 64 letters, digits, _ and -"
            )
        name, description = function["name"], function.get("description") or ""
        parameters = function.get("parameters") or {}
        if not isinstance(description, str) or not isinstance(parameters, Mapping):
            raise DataError(f"tool {name}: its description is a text and its parameters a JSON schema")
        if any(name == other["name"] for other in found):
            raise DataError(f"tool {name} is defined twice")
        found.append({"name": name, "description": description, "parameters": _dumped(parameters, f"tool {name}")})
    return found


def written(calls: Sequence[Mapping[str, Any]]) -> list[ToolCall]:
    """The `tool_calls` of an assistant's message; arguments may be a JSON text or an object."""
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not _is_name(function.get("name")):
            raise DataError('a tool call needs {"type": "function", "function": {"name": ..., "arguments": ...}}')
        name, arguments = function["name"], function.get("arguments")
        text = arguments if isinstance(arguments, str) else _dumped(arguments, f"call of {name}")
        if reason := _not_an_object(text):
            raise DataError(f"call of {name}: {reason}")
        found.append(ToolCall(name, text))
    return found


class CallParser:
    """Takes the calls out of an answer, one id at a time; `names`: the tools that exist, None to take any name.

    `feed` gives an id back if it is part of the text, a call when one is complete, None while inside the markup.
    """

    def __init__(self, tok: Tokenizer, names: Collection[str] | None = None) -> None:
        self._tok = tok
        self._names = names
        begin, end, self._call_begin, self._call_end = (tok.control_id(name) for name in TOOLS[:4])
        self._edges = {begin: True, end: False}
        self._sep = tok.control_id(TOOL_SEP)
        self._inside = False
        self._found = 0
        self._stray: list[int] = []
        self._call: list[int] | None = None

    def feed(self, id: int) -> int | ToolCall | BrokenCall | None:
        if id in self._edges or id == self._call_begin:
            broken = self._left("it does not end")
            if id == self._call_begin:
                self._call = []
            elif self._edges[id]:
                self._inside, self._found = True, 0
            else:
                broken = broken or self._empty()
                self._inside = False
            return broken
        if self._call is not None:
            if id != self._call_end:
                self._call.append(id)
                return None
            ids, self._call = self._call, None
            return self._read(ids)
        if self._inside:
            self._stray.append(id)
            return None
        return id

    def finish(self) -> BrokenCall | None:
        """Call once after the last id (the end-of-text token may be among them or not)."""
        left = self._left("it is cut off") or self._empty()
        self._inside = False
        return left

    def _left(self, reason: str) -> BrokenCall | None:
        """What stands before a tag and belongs to no complete call; white space between calls is nothing."""
        ids, between = (self._stray, True) if self._call is None else (self._call, False)
        self._call, self._stray = None, []
        text = self._tok.decode(ids, skip_special=True)
        if between and not text.strip():
            return None
        self._found += 1
        return BrokenCall(text, "text between calls" if between else reason)

    def _empty(self) -> BrokenCall | None:
        return BrokenCall("", "a block of calls without a call") if self._inside and not self._found else None

    def _read(self, ids: Sequence[int]) -> ToolCall | BrokenCall:
        self._found += 1
        text = self._tok.decode(ids)
        if ids.count(self._sep) != 1:
            return BrokenCall(text, "need one separator between name and arguments")
        cut = ids.index(self._sep)
        name, arguments = self._tok.decode(ids[:cut]).strip(), self._tok.decode(ids[cut + 1 :])
        if name == "function" and (fenced := FENCED.fullmatch(arguments)):
            name, arguments = fenced[1].strip(), fenced[2]
        if not _is_name(name):
            return BrokenCall(text, "no name of a tool")
        if self._names is not None and name not in self._names:
            return BrokenCall(text, f"there is no tool {name}")
        if reason := _not_an_object(arguments):
            return BrokenCall(text, reason)
        return ToolCall(name, arguments)


def split_calls(
    tok: Tokenizer, ids: Sequence[int], names: Collection[str] | None = None
) -> tuple[list[int], list[ToolCall | BrokenCall]]:
    """The ids of an answer's text, and its calls in order. `ids` are what follows the thought."""
    parser = CallParser(tok, names)
    events = [*map(parser.feed, ids), parser.finish()]
    text = [event for event in events if isinstance(event, int)]
    return text, [event for event in events if isinstance(event, ToolCall | BrokenCall)]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _not_an_object(text: str) -> str:
    """Why `text` is not a JSON object; empty if it is one."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        return "arguments are nested too deeply"
    except ValueError as error:
        return f"arguments are not JSON: {error}"
    return "" if isinstance(value, dict) else "arguments are not a JSON object"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _dumped(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
