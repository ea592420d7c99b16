"""What is changed on the way through: a request as upstreams take it, chunks and replies as our clients read them.

    wish = read(body, "chat")                      # Refusal 400; what admission and choice of a replica need
    wish = wish_of(fields, "chat")                 # the same of a request that is read already
    chunk = told(frame, wish)                      # thoughts under both names, usage completed, the model's public name

Parameters go to the upstream as they are, and it honours or refuses them. Thoughts come under `reasoning_content`
(DeepSeek) or `reasoning` (vLLM, OpenRouter) and leave under both. What an upstream does not say of its cache is not
made up: `prompt_cache_told` is false then.
"""

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from sputnik.serve.body import read_json
from sputnik.serve.refusals import Refusal

Kind = Literal["chat", "text"]
BYTES_PER_TOKEN = 4
PROMPTS, ANSWERS = 16, 32
"""At most, of one request."""
USUAL = 1024
"""Tokens an answer is taken to have at most, of requests that do not say."""
PREFIX = 2048
"""Bytes of a beginning by which its replica is chosen."""


@dataclass(frozen=True)
class Wish:
    """A request, as far as we have to understand it."""

    fields: dict[str, Any]
    model: str
    stream: bool
    usage: bool
    """The client asked for it."""
    samples: int
    answer: int
    """Tokens at most, of all samples."""
    prompt: int
    """Tokens, guessed by length."""
    prefix: bytes


def read(body: bytes, kind: Kind) -> Wish:
    fields = read_json(body)
    if not isinstance(fields, dict):
        raise Refusal(400, "the body must be a JSON object")
    return wish_of(fields, kind)


def wish_of(fields: dict[str, Any], kind: Kind) -> Wish:
    name = "messages" if kind == "chat" else "prompt"
    said = fields.get(name)
    if not isinstance(said, list if kind == "chat" else list | str) or not said:
        raise Refusal(400, f"{name} is missing or empty", code="invalid_value", param=name)
    model = fields.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= 200:
        raise Refusal(400, "model: a name, see /v1/models", code="invalid_value", param="model")
    stream, options = fields.get("stream"), fields.get("stream_options")
    if stream is not None and not isinstance(stream, bool):
        raise Refusal(400, "stream: true or false", code="invalid_value", param="stream")
    if options is not None and not (isinstance(options, dict) and stream):
        raise Refusal(400, "stream_options: an object, for streams alone", param="stream_options")
    prompts, n = 1 if kind == "chat" else _prompts(said), _count(fields, "n", 8) or 1
    written = prompts * max(n, _count(fields, "best_of", 8) or 1)
    if written > ANSWERS:
        raise Refusal(400, f"at most {ANSWERS} answers to one request: send fewer prompts or a lower n", param="n")
    limits = [_count(fields, name, 1 << 24) for name in ("max_completion_tokens", "max_tokens")]
    most = max(filter(None, limits), default=USUAL)
    wanted = dict(fields)
    if stream:
        wanted["stream_options"] = (options or {}) | {"include_usage": True}
    if kind == "chat":
        wanted["messages"] = [_with_both(message) for message in said]
    text, beginning = msgspec.json.encode(said), msgspec.json.encode(_beginning(said))
    usage = bool(options and options.get("include_usage"))
    prompt = len(text) // BYTES_PER_TOKEN
    return Wish(wanted, model, bool(stream), usage, prompts * n, most * written, prompt, beginning[:PREFIX])


def _prompts(said: str | list[Any]) -> int:
    """Each is answered by itself; a list of ids is one."""
    if isinstance(said, str) or isinstance(said[0], int):
        return 1
    if len(said) > PROMPTS:
        raise Refusal(400, f"prompt: at most {PROMPTS} in one request", code="invalid_value", param="prompt")
    return len(said)


def _beginning(said: Any) -> Any:
    """What a conversation has in common with its later turns: as far as the first message of the user."""
    if isinstance(said, list):
        for place, message in enumerate(said):
            if isinstance(message, dict) and message.get("role") == "user":
                return [(each.get("role"), each.get("content")) for each in said[: place + 1] if isinstance(each, dict)]
    return said


def _count(fields: dict[str, Any], name: str, most: int) -> int | None:
    value = fields.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most):
        raise Refusal(400, f"{name}: a whole number from 1 to {most}", code="invalid_value", param=name)
    return value


def told(frame: dict[str, Any], wish: Wish) -> dict[str, Any]:
    """A chunk or a reply, for our client."""
    for choice in choices(frame):
        for name in ("delta", "message"):
            if isinstance(choice.get(name), dict):
                choice[name] = _with_both(choice[name])
    if isinstance(frame.get("usage"), dict):
        frame["usage"] = completed(frame["usage"])
    return frame | {"model": wish.model}


def choices(frame: dict[str, Any]) -> list[dict[str, Any]]:
    found = frame.get("choices")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def brings_text(choice: dict[str, Any]) -> bool:
    """About a token, where the upstream does not count them."""
    delta = choice.get("delta")
    said = delta if isinstance(delta, dict) else choice
    return any(
        said.get(name) for name in ("content", "reasoning_content", "reasoning", "text", "tool_calls", "refusal")
    )


def says_something(choice: dict[str, Any]) -> bool:
    """A chunk that brings more than a role."""
    return brings_text(choice) or choice.get("finish_reason") is not None


def _with_both(said: Any) -> Any:
    """A message or a delta whose thought stands under one of its names, with both."""
    if not isinstance(said, dict):
        return said
    thought = said.get("reasoning_content") or said.get("reasoning")
    return said | {"reasoning_content": thought, "reasoning": thought} if isinstance(thought, str) else said


def completed(usage: dict[str, Any]) -> dict[str, Any]:
    """With DeepSeek's figures of the cache, where the upstream gives any."""
    prompt, cached = count(usage, "prompt_tokens"), cached_tokens(usage)
    if cached is None:
        return usage | {"prompt_cache_told": False}
    return usage | {
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
        "prompt_tokens_details": _details(usage, "prompt_tokens_details") | {"cached_tokens": cached},
    }


def cached_tokens(usage: dict[str, Any]) -> int | None:
    """None: it does not tell."""
    for found, name in (
        (usage, "prompt_cache_hit_tokens"),
        (_details(usage, "prompt_tokens_details"), "cached_tokens"),
    ):
        if isinstance(found.get(name), int):
            return min(count(found, name), count(usage, "prompt_tokens"))
    return None


def thought_tokens(usage: dict[str, Any]) -> int:
    found = _details(usage, "completion_tokens_details")
    return count(found, "reasoning_tokens") or count(usage, "reasoning_tokens")


def count(usage: dict[str, Any], name: str) -> int:
    """A number of tokens; 0 where there is none that makes sense."""
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _details(usage: dict[str, Any], name: str) -> dict[str, Any]:
    found = usage.get(name)
    return found if isinstance(found, dict) else {}
