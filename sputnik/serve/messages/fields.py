"""What clients of Anthropic's API may send, as msgspec records: the counterpart of `serve/fields.py`."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from sputnik.serve.fields import Annotation, Count, Stop, Strict, Text

Id = Annotated[str, Meta(min_length=1, max_length=256)]
Name = Annotated[str, Meta(min_length=1, max_length=64)]


class CacheControl(Strict, frozen=True):
    """Prompts are cached without being asked; to ask changes nothing."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class PlainText(Strict, frozen=True):
    """Where only text may stand."""

    text: Text
    type: Literal["text"]
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Meta(max_length=0)] | None = None


class Block(Strict, frozen=True, tag_field="type", kw_only=True):
    cache_control: CacheControl | None = None


class TextBlock(Block, frozen=True, tag="text"):
    text: Text
    citations: Annotated[list[Any], Meta(max_length=0)] | None = None


class ThinkingBlock(Block, frozen=True, tag="thinking"):
    """Of an earlier turn: taken back, not shown to the model, as R1 has it."""

    thinking: Text
    signature: Text = ""


class RedactedBlock(Block, frozen=True, tag="redacted_thinking"):
    data: Text


class ToolUse(Block, frozen=True, tag="tool_use"):
    id: Id
    name: Name
    input: dict[str, Any]
    caller: Any = None


class ToolResult(Block, frozen=True, tag="tool_result"):
    tool_use_id: Id
    content: Text | Annotated[list[PlainText], Meta(max_length=64)] = ""
    is_error: bool | None = None
    """The model reads the content, which says so itself."""


Content = TextBlock | ThinkingBlock | RedactedBlock | ToolUse | ToolResult


class Message(Strict, frozen=True):
    role: Literal["user", "assistant"]
    content: Text | Annotated[list[Content], Meta(max_length=256)]


class Thinking(Strict, frozen=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None
    """Of `enabled`: tokens that the thought may have."""
    display: Literal["summarized"] | None = None


class Tool(Strict, frozen=True):
    name: Name
    input_schema: dict[str, Any]
    description: Text = ""
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None
    strict: bool | None = None


class ToolChoice(Strict, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Strict, frozen=True):
    user_id: Annotation | None = None
    """An end user of this key: what was computed for one is not reused for another."""


class Format(Strict, frozen=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Strict, frozen=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Format | None = None


class CountRequest(Strict, frozen=True, kw_only=True):
    """What of a request makes its prompt."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    messages: Annotated[list[Message], Meta(min_length=1, max_length=2000)]
    system: Text | Annotated[list[PlainText], Meta(max_length=64)] | None = None
    thinking: Thinking | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1, le=1 << 24)]
    stop_sequences: Annotated[list[Stop], Meta(max_length=16)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Count | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


def plain(content: str | list[PlainText]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)
