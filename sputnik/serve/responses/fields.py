"""What clients of the Responses API may send, field by field, as msgspec records; the counterpart of `serve/fields.py`.

After Open Responses (2026-04-24) and OpenAI's reference. `input` may leave out the type of a message: see `with_types`.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta

from sputnik.serve.fields import Annotation, Effort, Penalty, Strict, Text

Id = Annotated[str, Meta(min_length=1, max_length=256)]
Name = Annotated[str, Meta(min_length=1, max_length=64)]
State = Literal["in_progress", "completed", "incomplete"]
Anything = Annotated[list[Any], Meta(max_length=1000)]


class InputText(Strict, frozen=True, tag_field="type", tag="input_text"):
    text: Text


class OutputText(Strict, frozen=True, tag_field="type", tag="output_text"):
    text: Text
    annotations: Anything | None = None
    logprobs: Anything | None = None


class RefusalText(Strict, frozen=True, tag_field="type", tag="refusal"):
    refusal: Text


class SummaryText(Strict, frozen=True):
    type: Literal["summary_text"]
    text: Text


class ReasoningText(Strict, frozen=True):
    type: Literal["reasoning_text"]
    text: Text


class OutputPart(Strict, frozen=True):
    type: Literal["input_text"]
    text: Text


Parts = Annotated[list[InputText | OutputText | RefusalText], Meta(max_length=64)]


class Item(Strict, frozen=True, tag_field="type", kw_only=True):
    id: Id | None = None
    status: State | None = None


class MessageItem(Item, frozen=True, tag="message", kw_only=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Parts
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Item, frozen=True, tag="function_call", kw_only=True):
    call_id: Id
    name: Name
    arguments: Text


class OutputItem(Item, frozen=True, tag="function_call_output", kw_only=True):
    call_id: Id
    output: Text | Annotated[list[OutputPart], Meta(max_length=64)]


class ReasoningItem(Item, frozen=True, tag="reasoning", kw_only=True):
    """Of an earlier turn: taken back, not shown to the model, as R1 has it."""

    summary: Annotated[list[SummaryText], Meta(max_length=64)] | None = None
    content: Annotated[list[ReasoningText], Meta(max_length=64)] | None = None
    encrypted_content: Text | None = None


InputItem = MessageItem | CallItem | OutputItem | ReasoningItem


class Reasoning(Strict, frozen=True):
    effort: Effort | None = None
    summary: Literal["auto"] | None = None
    """The thought itself is sent, so that none is made."""


class TextFormat(Strict, frozen=True, tag_field="type", tag="text"):
    pass


class ObjectFormat(Strict, frozen=True, tag_field="type", tag="json_object"):
    pass


class SchemaFormat(Strict, frozen=True, tag_field="type", tag="json_schema"):
    schema: dict[str, Any]
    name: Name = "answer"
    description: Text | None = None
    strict: bool | None = None


class TextSettings(Strict, frozen=True):
    format: TextFormat | ObjectFormat | SchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class Tool(Strict, frozen=True):
    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OneTool(Strict, frozen=True, tag_field="type", tag="function"):
    name: Name


class AllowedTool(Strict, frozen=True):
    type: Literal["function"]
    name: Name


class AllowedTools(Strict, frozen=True, tag_field="type", tag="allowed_tools"):
    tools: Annotated[list[AllowedTool], Meta(min_length=1, max_length=128)]
    mode: Literal["auto", "required", "none"] = "auto"


class StreamOptions(Strict, frozen=True):
    include_obfuscation: Literal[False] = False


class ResponseRequest(Strict, frozen=True, kw_only=True):
    model: Annotated[str, Meta(min_length=1, max_length=256)]
    input: Text | Annotated[list[InputItem], Meta(min_length=1, max_length=2000)]
    instructions: Text | None = None
    previous_response_id: Id | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | OneTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: None = None
    text: TextSettings | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: (
        Annotated[list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]], Meta(max_length=8)]
        | None
    ) = None
    """A thought is sent as it is, so that nothing encrypted is needed to send it back."""
    store: bool | None = None
    """Keep it; true: even if the client goes, it is written to its end. Kept by default."""
    background: bool | None = None
    """Reply at once, before it is written; it is read with GET."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[str, Annotation], Meta(max_length=16)] | None = None
    user: Annotation | None = None
    safety_identifier: Annotation | None = None
    prompt_cache_key: Annotation | None = None
    service_tier: Literal["auto", "default"] | None = None


def with_types(value: dict[str, Any]) -> None:
    """An item of the input that names no type is a message."""
    items = value.get("input")
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict):
            item.setdefault("type", "message")
