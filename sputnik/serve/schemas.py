"""What routes answer, field by field, for the OpenAPI document: msgspec records that nobody makes, only describes.

The tellers build these replies as plain dicts. That they fit is tested: every reply of the test suite's fuzzing is
checked against the document, and clients' own records read them. Left out: the events of streams, which the guides of
OpenAI and Anthropic describe better than a schema of text/event-stream could.
"""

from typing import Any, Literal

import msgspec


class Struct(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class Function(Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    id: str
    type: Literal["function"]
    function: Function


class ChatAnswer(Struct, frozen=True):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(Struct, frozen=True):
    index: int
    message: ChatAnswer
    finish_reason: Literal["stop", "length", "tool_calls", "insufficient_system_resource"]
    finish_details: dict[str, Any]
    logprobs: dict[str, Any] | None


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class ChatCompletion(Struct, frozen=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    applied: dict[str, Any]


class TextChoice(Struct, frozen=True):
    index: int
    text: str
    finish_reason: Literal["stop", "length", "insufficient_system_resource"]
    finish_details: dict[str, Any]
    logprobs: dict[str, Any] | None


class Completion(Struct, frozen=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str
    applied: dict[str, Any]


class Model(Struct, frozen=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | msgspec.UnsetType = msgspec.UNSET


class ModelList(Struct, frozen=True):
    object: Literal["list"]
    data: list[Model]


class RequestStatus(Struct, frozen=True):
    id: str
    status: Literal["waiting", "running", "answering", "cancelled"]
    tokens: int | msgspec.UnsetType = msgspec.UNSET
    position: int | msgspec.UnsetType = msgspec.UNSET
    wait_seconds: float | msgspec.UnsetType | None = msgspec.UNSET


class MessageUsage(Struct, frozen=True):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens_details: dict[str, int]


class ContentBlock(Struct, frozen=True):
    type: Literal["text", "thinking", "tool_use"]
    text: str | msgspec.UnsetType = msgspec.UNSET
    thinking: str | msgspec.UnsetType = msgspec.UNSET
    signature: str | msgspec.UnsetType = msgspec.UNSET
    id: str | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    input: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class Message(Struct, frozen=True):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage
    finish_details: dict[str, Any]
    applied: dict[str, Any]


class TokenCount(Struct, frozen=True):
    input_tokens: int


class ResponseUsage(Struct, frozen=True):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class Item(Struct, frozen=True):
    type: Literal["reasoning", "message", "function_call"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET
    summary: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET
    call_id: str | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str | msgspec.UnsetType = msgspec.UNSET


class ResponseObject(Struct, frozen=True):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    incomplete_details: dict[str, str] | None
    error: dict[str, str | None] | None
    model: str
    previous_response_id: str | None
    instructions: str | None
    output: list[Item]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    truncation: Literal["disabled"]
    parallel_tool_calls: bool
    text: dict[str, Any]
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    reasoning: dict[str, str | None]
    usage: ResponseUsage | None
    max_output_tokens: int | None
    max_tool_calls: None
    store: bool
    background: bool
    service_tier: str
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    applied: dict[str, Any]
    finish_details: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class DeletedResponse(Struct, frozen=True):
    id: str
    object: Literal["response.deleted"]
    deleted: Literal[True]


class Tokens(Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]


class Prompt(Struct, frozen=True):
    prompt: str


class Status(Struct, frozen=True):
    status: str


class BalanceInfo(Struct, frozen=True):
    currency: str
    total_balance: str
    granted_balance: str
    topped_up_balance: str


class Balance(Struct, frozen=True):
    is_available: bool
    balance_infos: list[BalanceInfo]


class Version(Struct, frozen=True):
    version: str


REPLIES: tuple[type[msgspec.Struct], ...] = (
    ChatCompletion, Completion, Model, ModelList, RequestStatus, Message, TokenCount, ResponseObject, DeletedResponse,
    Tokens, Prompt, Status, Version, Balance,
)  # fmt: skip
