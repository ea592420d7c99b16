"""A request of Anthropic's form as the chat request that it means; `asking.py` does the rest.

    asked, applied = asking.chat(as_chat(request), identity)

Thinking is as Anthropic has it: off unless `thinking` asks for it (or the model is named deepseek-reasoner). A last
message of the assistant is the beginning of the answer. Results of tools become messages of their own, in order.
"""

import json
from typing import Any, Literal

from sputnik.serve.asking import ALIASES
from sputnik.serve.fields import Call, ChatMessage, ChatRequest, Function, JsonSchema, ResponseFormat
from sputnik.serve.fields import Thinking as ChatThinking
from sputnik.serve.messages.fields import (
    Content,
    CountRequest,
    Message,
    MessagesRequest,
    TextBlock,
    Tool,
    ToolResult,
    ToolUse,
    plain,
)
from sputnik.serve.refusals import Refusal


def as_chat(request: CountRequest) -> ChatRequest:
    thinking = _thinking(request)
    choice, config = request.tool_choice, request.output_config
    common: dict[str, Any] = {
        "model": request.model, "messages": _messages(request), "thinking": thinking,
        "tools": [_tool(each) for each in request.tools] if request.tools else None,
        "tool_choice": _choice(request),
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "reasoning_effort": config.effort if config is not None and thinking.type == "enabled" else None,
    }  # fmt: skip
    if config is not None and config.format is not None:
        common["response_format"] = ResponseFormat("json_schema", JsonSchema(config.format.schema))
    if isinstance(request, MessagesRequest):
        common |= {
            "max_tokens": request.max_tokens, "stop": request.stop_sequences, "temperature": request.temperature,
            "top_p": request.top_p, "top_k": request.top_k, "stream": request.stream,
            "user_id": request.metadata.user_id if request.metadata else None,
        }  # fmt: skip
    return ChatRequest(**common)


def _thinking(request: CountRequest) -> ChatThinking:
    wanted = request.thinking
    if wanted is None:
        return ChatThinking("enabled" if ALIASES.get(request.model) else "disabled")
    budget = wanted.budget_tokens
    if (wanted.type == "enabled") != (budget is not None):
        raise Refusal(400, "thinking: enabled goes with budget_tokens, disabled and adaptive without", param="thinking")
    if budget is not None and isinstance(request, MessagesRequest) and budget >= request.max_tokens:
        raise Refusal(400, "thinking.budget_tokens must be less than max_tokens", param="thinking")
    return ChatThinking("disabled" if wanted.type == "disabled" else "enabled", budget)


def _choice(request: CountRequest) -> str | dict[str, Any] | None:
    choice = request.tool_choice
    if choice is None:
        return None
    if (choice.type == "tool") != (choice.name is not None):
        raise Refusal(400, "tool_choice: a name goes with type tool, and only with it", param="tool_choice")
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    names: dict[Literal["auto", "any", "none"], str] = {"auto": "auto", "any": "required", "none": "none"}
    return names[choice.type]


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _messages(request: CountRequest) -> list[ChatMessage]:
    found: list[ChatMessage] = []
    if request.system:
        found.append(ChatMessage("system", plain(request.system)))
    called: set[str] = set()
    for place, message in enumerate(request.messages):
        blocks: list[Content] = (
            [TextBlock(text=message.content)] if isinstance(message.content, str) else message.content
        )
        last = place == len(request.messages) - 1
        found += _answered(message, blocks, called, last) if message.role == "assistant" else _said(blocks, called)
    return found


def _answered(message: Message, blocks: list[Content], called: set[str], last: bool) -> list[ChatMessage]:
    if any(isinstance(block, ToolResult) for block in blocks):
        raise Refusal(400, "a tool_result is the user's: the assistant has tool_use", param="messages")
    uses = [block for block in blocks if isinstance(block, ToolUse)]
    called |= {use.id for use in uses}
    calls = [Call(Function(use.name, json.dumps(use.input, ensure_ascii=False)), use.id) for use in uses]
    text = "".join(block.text for block in blocks if isinstance(block, TextBlock))
    if last and calls:
        raise Refusal(400, "the last message has tool_use: send the tool_result after it", param="messages")
    return [ChatMessage("assistant", text, tool_calls=calls or None, prefix=last)]


def _said(blocks: list[Content], called: set[str]) -> list[ChatMessage]:
    found: list[ChatMessage] = []
    for block in blocks:
        match block:
            case TextBlock():
                if found and found[-1].role == "user":
                    block, before = TextBlock(text=f"{found[-1].content}{block.text}"), found.pop()
                    assert isinstance(before.content, str)
                found.append(ChatMessage("user", block.text))
            case ToolResult():
                if block.tool_use_id not in called:
                    raise Refusal(400, f"tool_result: no tool_use before it is {block.tool_use_id!r}", param="messages")
                found.append(ChatMessage("tool", plain(block.content), tool_call_id=block.tool_use_id))
            case _:
                raise Refusal(400, "tool_use and thinking are the assistant's: the user has text and tool_result")
    return found or [ChatMessage("user", "")]
