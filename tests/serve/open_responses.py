"""What Open Responses (2026-04-24) demands of a response, of its items and of each event, as msgspec records.

response = fit(value, Response);  event = fit(value, EVENTS["output_item.added"])      # ValidationError

A field with a None in its type is there, too. Fields that the specification does not know may be there besides. Left
out: what a model of text never says, images and refusals.
"""

from typing import Any, Literal

import msgspec


class Tagged(msgspec.Struct, frozen=True, tag_field="type"):
    pass


class TopLogProb(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class LogProb(TopLogProb, frozen=True):
    top_logprobs: list[TopLogProb]


class OutputText(Tagged, frozen=True, tag="output_text"):
    text: str
    annotations: list[Any]
    logprobs: list[LogProb] = []


class ReasoningText(Tagged, frozen=True, tag="reasoning_text"):
    text: str


class Message(Tagged, frozen=True, tag="message"):
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCall(Tagged, frozen=True, tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class ReasoningItem(Tagged, frozen=True, tag="reasoning"):
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    summary: list[Any]
    content: list[ReasoningText]


Item = Message | FunctionCall | ReasoningItem


class Tool(Tagged, frozen=True, tag="function"):
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class OneTool(Tagged, frozen=True, tag="function"):
    name: str


class AllowedTools(Tagged, frozen=True, tag="allowed_tools"):
    tools: list[OneTool]
    mode: Literal["none", "auto", "required"]


class PlainForm(Tagged, frozen=True, tag="text"):
    pass


class ObjectForm(Tagged, frozen=True, tag="json_object"):
    pass


class SchemaForm(Tagged, frozen=True, tag="json_schema"):
    name: str
    description: str | None
    schema: dict[str, Any] | None
    strict: bool


class TextField(msgspec.Struct, frozen=True):
    format: PlainForm | ObjectForm | SchemaForm
    verbosity: Literal["low", "medium", "high"]


class Reasoning(msgspec.Struct, frozen=True):
    effort: Literal["none", "low", "medium", "high", "xhigh"] | None
    summary: Literal["concise", "detailed", "auto"] | None


class Cached(msgspec.Struct, frozen=True):
    cached_tokens: int


class Thought(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: Cached
    output_tokens_details: Thought


class Incomplete(msgspec.Struct, frozen=True):
    reason: str


class Error(msgspec.Struct, frozen=True):
    code: str
    message: str


class Response(msgspec.Struct, frozen=True):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    incomplete_details: Incomplete | None
    model: str
    previous_response_id: str | None
    instructions: str | None
    output: list[Item]
    error: Error | None
    tools: list[Tool]
    tool_choice: Literal["none", "auto", "required"] | OneTool | AllowedTools
    truncation: Literal["auto", "disabled"]
    parallel_tool_calls: bool
    text: TextField
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    temperature: float
    reasoning: Reasoning | None
    usage: Usage | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    store: bool
    background: bool
    service_tier: str
    metadata: dict[str, str]
    safety_identifier: str | None
    prompt_cache_key: str | None


class Event(Tagged, frozen=True, kw_only=True):
    sequence_number: int


class Snapshot(Event, frozen=True):
    response: Response


class OfItem(Event, frozen=True):
    output_index: int
    item: Item


class Within(Event, frozen=True, kw_only=True):
    item_id: str
    output_index: int
    content_index: int


class OfPart(Within, frozen=True, kw_only=True):
    part: OutputText | ReasoningText


class OfDelta(Within, frozen=True, kw_only=True):
    delta: str
    logprobs: list[LogProb] = []


class OfText(Within, frozen=True, kw_only=True):
    text: str
    logprobs: list[LogProb] = []


class ArgumentsDelta(Event, frozen=True, kw_only=True):
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Event, frozen=True, kw_only=True):
    item_id: str
    output_index: int
    arguments: str


EVENTS: dict[str, type[Event]] = {
    "created": Snapshot, "queued": Snapshot, "in_progress": Snapshot, "completed": Snapshot, "incomplete": Snapshot,
    "failed": Snapshot, "output_item.added": OfItem, "output_item.done": OfItem, "content_part.added": OfPart,
    "content_part.done": OfPart, "output_text.delta": OfDelta, "output_text.done": OfText, "reasoning.delta": OfDelta,
    "reasoning.done": OfText, "function_call_arguments.delta": ArgumentsDelta,
    "function_call_arguments.done": ArgumentsDone,
}  # fmt: skip
LAST = ("completed", "incomplete", "failed")


def fit(value: dict[str, Any], kind: type[msgspec.Struct]) -> Any:
    """Checked field by field; an event's type is checked by who asks."""
    return msgspec.convert(value | ({"type": kind.__name__} if issubclass(kind, Event) else {}), kind, strict=True)
