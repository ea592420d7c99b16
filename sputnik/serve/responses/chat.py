"""A request for a response as the chat request that it means; `asking.py` does the rest.

    turns = turns_of(request, before)              # `before`: the turns of previous_response_id
    asked, applied = asking.chat(as_chat(request, turns), identity)

Instructions are of one request: they do not go on to the next. Neighbouring texts and calls of the assistant are one
turn. Refusals name the fields of this API.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sputnik.serve.fields import Call, ChatMessage, ChatRequest, Function, JsonSchema, ResponseFormat
from sputnik.serve.refusals import Refusal
from sputnik.serve.responses.fields import (
    AllowedTools,
    CallItem,
    InputText,
    MessageItem,
    ObjectFormat,
    OneTool,
    OutputItem,
    OutputPart,
    OutputText,
    RefusalText,
    ResponseRequest,
    SchemaFormat,
    Tool,
)

NAMES: Mapping[str, str] = {
    "messages": "input", "max_completion_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}  # fmt: skip
"""Fields of a chat request by what they are called here."""


def turns_of(request: ResponseRequest, before: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The conversation without instructions."""
    turns, called = list(before), {call.id for turn in before for call in turn.tool_calls or ()}
    if isinstance(request.input, str):
        return [*turns, ChatMessage("user", request.input)]
    for item in request.input:
        match item:
            case MessageItem(role="assistant"):
                _said(turns, _plain(item.content), [])
            case MessageItem():
                turns.append(ChatMessage(item.role, _plain(item.content)))
            case CallItem():
                called.add(item.call_id)
                _said(turns, "", [Call(Function(item.name, item.arguments), item.call_id)])
            case OutputItem():
                if item.call_id not in called:
                    message = f"function_call_output: no function_call before it is {item.call_id!r}"
                    raise Refusal(400, message, param="input")
                turns.append(ChatMessage("tool", _plain(item.output), tool_call_id=item.call_id))
    if not turns or turns[-1].role == "assistant":
        raise Refusal(400, "the input ends with the assistant: end it with a message or a function_call_output")
    return turns


def _said(turns: list[ChatMessage], text: str, calls: list[Call]) -> None:
    """More of what the assistant has said last."""
    before = turns.pop() if turns and turns[-1].role == "assistant" else ChatMessage("assistant", "")
    assert isinstance(before.content, str)
    turns.append(
        ChatMessage("assistant", before.content + text, tool_calls=[*(before.tool_calls or ()), *calls] or None)
    )


def _plain(content: str | Sequence[InputText | OutputText | OutputPart | RefusalText]) -> str:
    if isinstance(content, str):
        return content
    return "".join([part.refusal if isinstance(part, RefusalText) else part.text for part in content])


def as_chat(request: ResponseRequest, turns: Sequence[ChatMessage]) -> ChatRequest:
    tools, choice = _tools(request)
    system = [ChatMessage("system", request.instructions)] if request.instructions else []
    scores = request.top_logprobs is not None or "message.output_text.logprobs" in (request.include or ())
    return ChatRequest(
        model=request.model, messages=[*system, *turns], max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature, top_p=request.top_p, presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty, seed=request.seed, stream=request.stream,
        logprobs=scores, top_logprobs=request.top_logprobs, tools=tools, tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls, response_format=_format(request),
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
    )  # fmt: skip


def renamed(refusal: Refusal) -> Refusal:
    """A refusal of the chat request, in the words of this API."""
    name = NAMES.get(refusal.param or "")
    if name is not None:
        refusal.message = refusal.message.replace(f"{refusal.param}: ", f"{name}: ").replace("response_format", name)
        refusal.param = name
    return refusal


def _tools(request: ResponseRequest) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
    """The tools that may be called, and the choice among them."""
    tools, choice = request.tools or [], request.tool_choice
    if isinstance(choice, AllowedTools):
        allowed = {each.name for each in choice.tools}
        if not allowed <= {tool.name for tool in tools}:
            raise Refusal(400, "tool_choice allows a tool that is not in tools", param="tool_choice")
        return [_tool(tool) for tool in tools if tool.name in allowed], choice.mode
    shown = [_tool(tool) for tool in tools] or None
    if isinstance(choice, OneTool):
        return shown, {"type": "function", "function": {"name": choice.name}}
    return shown, choice


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _format(request: ResponseRequest) -> ResponseFormat | None:
    wanted = request.text.format if request.text else None
    if isinstance(wanted, SchemaFormat):
        return ResponseFormat("json_schema", JsonSchema(wanted.schema, wanted.name))
    return ResponseFormat("json_object") if isinstance(wanted, ObjectFormat) else None
