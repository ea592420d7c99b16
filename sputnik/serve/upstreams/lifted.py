"""Responses and Messages over servers that know chat completions alone: the `Source` of a gateway before upstreams.

    source = Lifting(service, fleet)
    prepared = await source.prepare(request, lambda: as_chat(body))

The chat request that a dialect means goes out as JSON, always streamed, and its chunks come back as deltas, from which
the dialects' own tellers make their events. Calls are passed on whole, when the answer ends. Left out: what only tokens
or our own templates can do (log-probabilities, going on from a prefix, counting), which is refused.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request

from sputnik.serve.answering import reading
from sputnik.serve.fields import ChatMessage, ChatRequest
from sputnik.serve.guard import Call
from sputnik.serve.reading import Delta, Score
from sputnik.serve.refusals import Refusal
from sputnik.serve.service import Service
from sputnik.serve.sources import Prepared
from sputnik.serve.telling import Outcome, Spoken
from sputnik.serve.upstreams.fleet import Fleet
from sputnik.serve.upstreams.forward import Forward
from sputnik.serve.upstreams.plain import Wish, cached_tokens, choices, count, thought_tokens, wish_of
from sputnik.text.tools import ToolCall

PATH = "/chat/completions"
SAME = (
    "model", "temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "seed", "stop", "tools",
    "tool_choice", "parallel_tool_calls", "max_tokens", "reasoning_effort",
)  # fmt: skip
"""Fields of a chat request that go out as they are, if they are given."""
STOPS = ("stop_reason", "matched_stop")
"""Where vLLM and SGLang say which stop string it was."""
ENDS: Mapping[str, str] = {"tool_calls": "stop", "function_call": "stop", "insufficient_system_resource": "deadline"}

MOST_CALLS = 128


def enter(service: Service, fleet: Fleet, request: Request, path: str, wish: Wish) -> Forward:
    """Queue it; it is sent when its turn comes."""
    call: Call = request.state.call
    assert call.ticket is not None
    fleet.trusted(wish.model)
    forward = Forward(fleet, path, wish, call.seconds, request.scope["state"].get("trace"))
    sizes = wish.prompt, wish.answer, wish.samples
    service.enter((call.identity.id, call.id), call.ticket, forward, *sizes, call.seconds, wish.model)
    return forward


class Lifting:
    def __init__(self, service: Service, fleet: Fleet) -> None:
        self._service, self._fleet = service, fleet

    @property
    def fingerprint(self) -> str:
        return "fp_upstream"

    async def prepare(self, request: Request, chat: Callable[[], ChatRequest]) -> Prepared:
        settings = self._service.settings
        usual = {"temperature": settings.temperature, "top_p": settings.top_p}
        fields = await reading(request.state.call, lambda: usual | lowered(chat()))
        wish = wish_of(fields, "chat")
        names = ("temperature", "top_p", "max_tokens", "seed", "reasoning_effort")
        applied = {name: fields[name] for name in names if name in fields}
        if "thinking" in fields:
            applied["thinking"] = fields["thinking"]["type"] == "enabled"

        def begin() -> Spoken:
            return Lifted(enter(self._service, self._fleet, request, PATH, wish), fields.get("stop") or ())

        return Prepared(applied, begin)

    async def count(self, request: Request, chat: Callable[[], ChatRequest]) -> int:
        raise Refusal(501, "other servers answer here, and do not say how many tokens a text has", retry=False)


# --- on the way out ---


def lowered(chat: ChatRequest) -> dict[str, Any]:
    """What any server of chat completions reads."""
    if chat.logprobs or chat.top_logprobs:
        text = "log-probabilities are not passed on from other servers here: chat completions have them"
        raise Refusal(400, text, code="not_offered", param="top_logprobs")
    fields = {name: msgspec.to_builtins(value) for name in SAME if (value := getattr(chat, name)) is not None}
    if chat.max_completion_tokens is not None:
        fields["max_tokens"] = chat.max_completion_tokens
    if chat.user_id is not None:
        fields["user"] = chat.user_id
    if chat.response_format is not None:
        fields["response_format"] = _form(msgspec.to_builtins(chat.response_format))
    for tool in fields.get("tools", ()):  # llama.cpp takes no null
        tool["function"] = {name: value for name, value in tool["function"].items() if value is not None}
    messages = [_message(each) for each in chat.messages]
    return fields | _thinking(chat) | {"messages": messages, "stream": True}


def _message(message: ChatMessage) -> dict[str, Any]:
    if message.prefix:
        text = "a beginning of the answer is not passed on to other servers, which each take it in their own way"
        raise Refusal(400, f"{text}: end with the user", code="not_offered", param="messages")
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.content}
    if message.tool_calls:
        found["content"] = message.content or None
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": msgspec.to_builtins(call.function)}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


def _form(form: dict[str, Any]) -> dict[str, Any]:
    if form["json_schema"] is None:
        return {"type": form["type"]}
    schema = {name: form["json_schema"][name] for name in ("name", "schema")}
    return {"type": form["type"], "json_schema": schema | {"strict": True}}


def _thinking(chat: ChatRequest) -> dict[str, Any]:
    """A wish to think or not, as DeepSeek takes it, and as the templates of vLLM, SGLang and llama.cpp do."""
    wish = chat.thinking.type if chat.thinking else "disabled" if chat.reasoning_effort == "none" else "auto"
    if wish == "auto":
        return {}
    thinking: dict[str, Any] = {"type": wish}
    if chat.thinking is not None and chat.thinking.budget_tokens is not None:
        thinking["budget_tokens"] = chat.thinking.budget_tokens
    switch = wish == "enabled"
    return {"thinking": thinking, "chat_template_kwargs": {"thinking": switch, "enable_thinking": switch}}


# --- on the way back ---


@dataclass
class _Piece:
    """A call that is being written."""

    name: str = ""
    arguments: str = ""


class Lifted:
    def __init__(self, forward: Forward, stops: str | Sequence[str]) -> None:
        self._forward, self._stops = forward, (stops,) if isinstance(stops, str) else stops
        self._calls: list[_Piece] = []
        self._called = False
        self._stopped: str | None = None
        self._finish: str | None = None
        self._details: dict[str, Any] = {}

    @property
    def done(self) -> bool:
        return self._finish is not None

    async def deltas(self) -> list[Delta]:
        while frames := await self._forward.more():
            if found := [delta for frame in frames for choice in choices(frame) for delta in self._read(choice)]:
                return found
        return []

    def close(self) -> None:
        self._forward.close()

    def outcome(self) -> Outcome:
        usage = self._forward.usage
        return Outcome(
            self._finish, count(usage, "prompt_tokens"), cached_tokens(usage) or 0, count(usage, "completion_tokens"),
            thought_tokens(usage), self._called, self._stopped, self._details, bool(usage.get("estimated")),
        )  # fmt: skip

    def scored(self, scores: Sequence[Score]) -> list[dict[str, Any]]:
        return []

    def _read(self, choice: dict[str, Any]) -> Iterator[Delta]:
        said = choice.get("delta")
        said = said if isinstance(said, dict) else {}
        if isinstance(thought := said.get("reasoning_content"), str) and thought:
            yield Delta(0, "thinking", thought)
        for text in (said.get("content"), said.get("refusal")):
            if isinstance(text, str) and text:
                yield Delta(0, "answer", text)
        pieces = said.get("tool_calls")
        for piece in pieces if isinstance(pieces, list) else ():
            self._gather(piece)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and self._finish is None:
            self._details["type"] = reason
            yield from self._whole_calls()
            self._end(choice, reason)
            yield Delta(0, "answer", finish="stop")

    def _gather(self, piece: Any) -> None:
        """Of a call: its name comes first, its arguments in any number of pieces."""
        function = piece.get("function") if isinstance(piece, dict) else None
        if not isinstance(function, dict):
            return
        name, arguments, place = function.get("name"), function.get("arguments"), piece.get("index")
        known = isinstance(place, int) and 0 <= place < len(self._calls)
        if not known and isinstance(name, str) and name and len(self._calls) < MOST_CALLS:
            self._calls.append(_Piece())
        if not self._calls:
            return
        call = self._calls[place if known else -1]
        call.name += name if isinstance(name, str) else ""
        call.arguments += arguments if isinstance(arguments, str) else json.dumps(arguments) if arguments else ""

    def _whole_calls(self) -> Iterator[Delta]:
        """What is no call is text, as with our own engine."""
        for call in self._calls:
            try:
                good = bool(call.name) and isinstance(msgspec.json.decode(call.arguments or "{}"), dict)
            except (msgspec.DecodeError, RecursionError):
                good = False
            if good:
                self._called = True
                yield Delta(0, "answer", call=ToolCall(call.name, call.arguments or "{}"))
            else:
                text = call.name + call.arguments
                told = {"text": text, "reason": "its arguments are no JSON object"}
                self._details["broken_calls"] = [*self._details.get("broken_calls", ()), told]
                yield Delta(0, "answer", text)

    def _end(self, choice: dict[str, Any], reason: str) -> None:
        self._finish = ENDS.get(reason, reason)
        details = choice.get("finish_details")
        told = [choice.get(name) for name in STOPS] + [details.get("stop") if isinstance(details, dict) else None]
        for stop in told:
            if isinstance(stop, str) and stop in self._stops:
                self._stopped = self._details["stop"] = stop
