"""What clients may send, field by field: the bodies of chat completions and completions as msgspec records.

Types and bounds stand here and are enforced by `body.parse`; the OpenAPI document is made from them. What fields mean
is in `asking.py`. `Annotation` marks those that ask for nothing that would change the answer: they are taken and said
to be so here, and nowhere else is anything ignored.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=1 << 24)]
Unit = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
Annotation = Annotated[str, Meta(max_length=512, description="Kept with the request; changes nothing.")]
Text = Annotated[str, Meta(max_length=1 << 20)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]
Id = Annotated[int, Meta(ge=0, le=1 << 24)]


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Part(Strict, frozen=True):
    type: Literal["text"]
    text: Text


class Function(Strict, frozen=True):
    name: Annotated[str, Meta(max_length=64)]
    arguments: Text | dict[str, Any] = "{}"


class Call(Strict, frozen=True):
    function: Function
    id: Annotated[str, Meta(max_length=256)] | None = None
    type: Literal["function"] = "function"
    index: Count | None = None


class ChatMessage(Strict, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Meta(max_length=64)] | None = None
    reasoning_content: Text | None = None
    """Of an earlier turn; as R1 has it, earlier thoughts are not sent back to the model, unless `prefix` goes on."""
    reasoning: Text | None = None
    tool_calls: Annotated[list[Call], Meta(max_length=128)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None
    prefix: bool = False
    """Of the last message, an assistant's: the answer goes on from it."""
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None
    name: Annotation | None = None
    """Of who speaks, or of the tool: agents send it with every result."""


class StreamOptions(Strict, frozen=True):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Thinking(Strict, frozen=True):
    type: Literal["enabled", "disabled", "auto"]
    budget_tokens: Count | None = None


class TemplateSwitches(Strict, frozen=True):
    """vLLM's and SGLang's way to say `thinking`; nothing else reaches the template."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class JsonSchema(Strict, frozen=True):
    schema: dict[str, Any]
    name: Annotated[str, Meta(max_length=64)] = "answer"
    description: Text | None = None
    strict: bool | None = None


class ResponseFormat(Strict, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Strict, frozen=True):
    """What chat completions and completions have in common."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 24)] | None = None
    min_p: Unit | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=300)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Id], Meta(max_length=64)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotation | None = None
    user_id: Annotation | None = None
    """An end user of this key: what was computed for one is not reused for another."""
    metadata: Annotated[dict[str, Annotation], Meta(max_length=16)] | None = None
    safety_identifier: Annotation | None = None
    prompt_cache_key: Annotation | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None


class ChatRequest(Sampling, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2000)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    thinking: Thinking | None = None
    reasoning_effort: Effort | None = None
    thinking_budget: Annotated[int, Meta(ge=-1, le=1 << 24)] | None = None
    """Tokens a thought may have; 0: none, -1: no limit of its own."""
    chat_template_kwargs: TemplateSwitches | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(Sampling, frozen=True, kw_only=True):
    prompt: Text | Annotated[list[Text | Id | list[Id]], Meta(min_length=1, max_length=1 << 20)]
    """A text, its tokens, or up to 16 of either."""
    suffix: Text | None = None
    """The model writes what stands between prompt and suffix."""
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None


class TokenizeRequest(Strict, frozen=True):
    model: Annotated[str, Meta(max_length=256)] | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2000)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Strict, frozen=True):
    tokens: Annotated[list[Id], Meta(max_length=1 << 20)]
    model: Annotated[str, Meta(max_length=256)] | None = None
