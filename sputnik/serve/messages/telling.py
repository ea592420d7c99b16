"""From the deltas of an answer to what clients of Anthropic's API read: its events, or one message.

    teller = MessagesTeller(head, spoken, applied)
    teller.events(deltas), teller.end()            # -> bytes of server-sent events
    teller.reply(deltas)                           # -> bytes of the message

Input tokens are those that were not in the cache, as Anthropic counts. A thought has no signature: nothing is checked
when it comes back. `applied` and `finish_details` stand beside Anthropic's fields as in chat completions.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from sputnik.serve.blocks import Block, Blocks, Step
from sputnik.serve.reading import Delta
from sputnik.serve.refusals import Refusal
from sputnik.serve.telling import Head, Spoken

REASONS: Mapping[str, str] = {
    "length": "max_tokens", "length while thinking": "max_tokens", "loop": "max_tokens", "deadline": "max_tokens",
    "content_filter": "refusal",
}  # fmt: skip
PATH = "/messages"


class MessagesTeller:
    def __init__(self, head: Head, spoken: Spoken, applied: Mapping[str, Any]) -> None:
        self._head, self._spoken, self._applied = head, spoken, applied
        self._blocks = Blocks()
        self._begun = False

    def events(self, deltas: Sequence[Delta]) -> bytes:
        return b"".join(_event(each) for each in self._events(deltas))

    def end(self) -> bytes:
        ending = self._ending()
        delta = {"stop_reason": ending["stop_reason"], "stop_sequence": ending["stop_sequence"]}
        more = {"finish_details": ending["finish_details"], "applied": self._applied}
        last = {"type": "message_delta", "delta": delta, "usage": self._usage()} | more
        return _event(last) + _event({"type": "message_stop"})

    def failed(self, refusal: Refusal) -> bytes:
        return b"event: error\ndata: " + refusal.told(PATH, self._head.id.removeprefix("msg_"))[2] + b"\n\n"

    def silence(self, text: str) -> bytes:
        return _event({"type": "ping"})

    def reply(self, deltas: Sequence[Delta]) -> bytes:
        list(self._blocks.steps(deltas))
        content = [self._content(block, block.text) for block in self._blocks.all]
        return msgspec.json.encode(self._message(content) | self._ending() | {"usage": self._usage()})

    def _events(self, deltas: Sequence[Delta]) -> Iterator[dict[str, Any]]:
        if not self._begun:
            self._begun = True
            none = {"stop_reason": None, "stop_sequence": None, "usage": self._usage() | {"output_tokens": 0}}
            yield {"type": "message_start", "message": self._message([]) | none}
        for step in self._blocks.steps(deltas):
            yield self._told(step)

    def _told(self, step: Step) -> dict[str, Any]:
        block = step.block
        match step.what:
            case "begin":
                return {
                    "type": "content_block_start", "index": block.index, "content_block": self._content(block, ""),
                }  # fmt: skip
            case "more":
                kind, name = {
                    "thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text"),
                    "call": ("input_json_delta", "partial_json"),
                }[block.kind]  # fmt: skip
                return {
                    "type": "content_block_delta", "index": block.index, "delta": {"type": kind, name: step.text},
                }  # fmt: skip
            case "end":
                return {"type": "content_block_stop", "index": block.index}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = self._head
        found = {"id": head.id, "type": "message", "role": "assistant", "model": head.model, "content": content}
        return found | {"system_fingerprint": head.fingerprint}

    def _content(self, block: Block, text: str) -> dict[str, Any]:
        if block.call is None:
            if block.kind == "text":
                return {"type": "text", "text": text}
            return {"type": "thinking", "thinking": text, "signature": ""}
        name = f"toolu_{self._head.id.removeprefix('msg_')}_{block.index}"
        return {"type": "tool_use", "id": name, "name": block.call.name, "input": json.loads(text or "{}")}

    def _ending(self) -> dict[str, Any]:
        found = self._spoken.outcome()
        reason = REASONS.get(found.finish or "", "end_turn")
        if found.stopped is not None:
            reason = "stop_sequence"
        elif found.called and reason == "end_turn":
            reason = "tool_use"
        ending = {"stop_reason": reason, "stop_sequence": found.stopped, "applied": self._applied}
        return ending | {"finish_details": found.details}

    def _usage(self) -> dict[str, Any]:
        found = self._spoken.outcome()
        usage = {
            "input_tokens": found.prompt - found.cached, "cache_read_input_tokens": found.cached,
            "cache_creation_input_tokens": 0, "output_tokens": found.written,
            "output_tokens_details": {"thinking_tokens": found.thought},
        }  # fmt: skip
        return usage | ({"estimated": True} if found.estimated else {})


def _event(data: dict[str, Any]) -> bytes:
    return b"event: " + data["type"].encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"
