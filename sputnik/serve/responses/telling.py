"""From the deltas of an answer to events and to the response itself, as Open Responses (2026-04-24) has them.

    teller = ResponseTeller(head, echo(request), spoken, applied)
    teller.begin("in_progress"), teller.events(deltas), teller.end()    # -> events, as dicts without their numbers
    teller.response()                                                   # as it stands

A thought is an item of type reasoning with its text as content; there is no summary of it. `applied` and
`finish_details` stand beside the fields of the API, as in chat completions.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from sputnik.serve.blocks import Block, Blocks, Step
from sputnik.serve.fields import Call, ChatMessage, Function
from sputnik.serve.reading import Delta
from sputnik.serve.refusals import Refusal
from sputnik.serve.responses.fields import ResponseRequest
from sputnik.serve.telling import Head, Spoken

Event = dict[str, Any]
State = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
CUT: Mapping[str, str] = {
    "length": "max_output_tokens", "length while thinking": "max_output_tokens", "loop": "loop", "deadline": "deadline",
    "content_filter": "content_filter",
}  # fmt: skip
"""Ends of an answer that is not whole, and their reasons here."""


def echo(request: ResponseRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    plain = msgspec.to_builtins
    reasoning, text = request.reasoning, request.text
    missing = {"description": None, "parameters": None, "strict": None}
    form = plain(text.format) if text and text.format else {"type": "text"}
    if form["type"] == "json_schema":
        form |= {"strict": form["strict"] is not False}
    return {
        "previous_response_id": request.previous_response_id, "instructions": request.instructions,
        "tools": [missing | plain(tool) for tool in request.tools or ()],
        "tool_choice": plain(request.tool_choice) or "auto",
        "truncation": "disabled", "parallel_tool_calls": request.parallel_tool_calls is not False,
        "text": {"format": form, "verbosity": "medium"},
        "presence_penalty": request.presence_penalty or 0.0, "frequency_penalty": request.frequency_penalty or 0.0,
        "top_logprobs": request.top_logprobs or 0,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "max_output_tokens": request.max_output_tokens, "max_tool_calls": None, "store": request.store is not False,
        "background": bool(request.background), "service_tier": "default", "metadata": request.metadata or {},
        "user": request.user, "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }  # fmt: skip


class ResponseTeller:
    def __init__(self, head: Head, echo: Mapping[str, Any], spoken: Spoken, applied: Mapping[str, Any]) -> None:
        self._head, self._echo, self._spoken, self._applied = head, echo, spoken, applied
        self._hex = head.id.removeprefix("resp_")
        self._blocks = Blocks()
        self._states: dict[int, str] = {}
        """Of blocks that have ended."""
        self._state: State = "queued"
        self._error: Refusal | None = None
        self._ended_at: int | None = None
        self._created = False

    def begin(self, state: Literal["queued", "in_progress"]) -> list[Event]:
        """What comes before the first item; of one that waits, what comes before that, too."""
        self._state = state
        created = [] if self._created else [self._snapshot("created")]
        self._created = True
        return [*created, self._snapshot(state)]

    def events(self, deltas: Sequence[Delta]) -> list[Event]:
        return [event for step in self._blocks.steps(deltas) for event in self._told(step)]

    def end(self) -> list[Event]:
        """The last event: by how the answer ended, or that it was cancelled."""
        finish = self._spoken.outcome().finish
        if finish is None:
            return self._last("cancelled", "incomplete")
        state: State = "incomplete" if finish in CUT else "completed"
        return self._last(state, state)

    def fail(self, refusal: Refusal) -> list[Event]:
        self._error = refusal
        return self._last("failed", "failed")

    def response(self) -> dict[str, Any]:
        head, outcome = self._head, self._spoken.outcome()
        found = {
            "id": head.id, "object": "response", "created_at": head.created, "completed_at": self._ended_at,
            "status": self._state, "incomplete_details": self._why_incomplete(), "error": self._told_error(),
            "model": head.model, "output": [self._item(block) for block in self._blocks.all],
            "temperature": self._applied["temperature"], "top_p": self._applied["top_p"], "usage": self._usage(),
            "applied": self._applied, "system_fingerprint": head.fingerprint,
        }  # fmt: skip
        if outcome.finish is not None:
            found["finish_details"] = outcome.details
        return found | dict(self._echo)

    def turn(self) -> ChatMessage:
        """What was answered, for the next request."""
        text = "".join(block.text for block in self._blocks.all if block.kind == "text")
        calls = [
            Call(Function(block.call.name, block.text), self._call_id(block))
            for block in self._blocks.all
            if block.call
        ]
        return ChatMessage("assistant", text, tool_calls=calls or None)

    # --- events ---

    def _snapshot(self, name: str) -> Event:
        return {"type": f"response.{name}", "response": self.response()}

    def _last(self, state: State, name: str) -> list[Event]:
        self._state = state
        if state == "completed":
            self._ended_at = int(time.time())
        else:
            self._states |= {block.index: "incomplete" for block in self._blocks.all if block.index not in self._states}
        return [self._snapshot(name)]

    def _told(self, step: Step) -> Iterator[Event]:
        block, index = step.block, step.block.index
        at = {"item_id": self._item(block)["id"], "output_index": index}
        within = at | {"content_index": 0}
        match step.what:
            case "begin":
                yield {"type": "response.output_item.added", "output_index": index, "item": self._item(block, True)}
                if block.kind != "call":
                    yield {"type": "response.content_part.added", **within, "part": self._part(block, True)}
            case "more":
                scores = {"logprobs": self._scores(step.scores)} if block.kind == "text" else {}
                place = at if block.kind == "call" else within
                yield {"type": f"{_kind(block)}.delta", **place, "delta": step.text, **scores}
            case "end":
                cut = step.last and self._spoken.outcome().finish in CUT
                self._states[index] = "incomplete" if cut else "completed"
                if block.call is not None:
                    called = {"name": block.call.name, "arguments": block.text}
                    yield {"type": f"{_kind(block)}.done", **at, **called}
                else:
                    scores = {"logprobs": self._scores(block.scores)} if block.kind == "text" else {}
                    yield {"type": f"{_kind(block)}.done", **within, "text": block.text, **scores}
                    yield {"type": "response.content_part.done", **within, "part": self._part(block)}
                yield {"type": "response.output_item.done", "output_index": index, "item": self._item(block)}

    # --- items ---

    def _item(self, block: Block, new: bool = False) -> dict[str, Any]:
        """`new`: as it is when it begins."""
        state = self._states.get(block.index, "in_progress")
        name = f"{self._hex}_{block.index}"
        if block.call is not None:
            return {
                "type": "function_call", "id": f"fc_{name}", "call_id": self._call_id(block),
                "name": block.call.name, "arguments": "" if new else block.text, "status": state,
            }  # fmt: skip
        content = [] if new else [self._part(block)]
        if block.kind == "thinking":
            return {"type": "reasoning", "id": f"rs_{name}", "summary": [], "content": content, "status": state}
        return {"type": "message", "id": f"msg_{name}", "role": "assistant", "content": content, "status": state}

    def _part(self, block: Block, new: bool = False) -> dict[str, Any]:
        text = "" if new else block.text
        if block.kind == "thinking":
            return {"type": "reasoning_text", "text": text}
        scores = [] if new else self._scores(block.scores)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}

    def _call_id(self, block: Block) -> str:
        return f"call_{self._hex}_{block.index}"

    def _scores(self, scores: Sequence[Any]) -> list[dict[str, Any]]:
        return self._spoken.scored(scores)

    # --- the response ---

    def _why_incomplete(self) -> dict[str, str] | None:
        if self._state == "cancelled":
            return {"reason": "cancelled"}
        return {"reason": CUT[self._spoken.outcome().finish or ""]} if self._state == "incomplete" else None

    def _told_error(self) -> dict[str, str] | None:
        error = self._error
        return None if error is None else {"code": error.code or "server_error", "message": error.message}

    def _usage(self) -> dict[str, Any] | None:
        if self._state in ("queued", "in_progress"):
            return None
        found = self._spoken.outcome()
        usage = {
            "input_tokens": found.prompt, "output_tokens": found.written, "total_tokens": found.prompt + found.written,
            "input_tokens_details": {"cached_tokens": found.cached},
            "output_tokens_details": {"reasoning_tokens": found.thought},
        }  # fmt: skip
        return usage | ({"estimated": True} if found.estimated else {})


def _kind(block: Block) -> str:
    """How the events of a block are called."""
    names = {"thinking": "reasoning", "text": "output_text", "call": "function_call_arguments"}
    return f"response.{names[block.kind]}"
