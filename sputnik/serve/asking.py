"""From a checked request to what the engine is asked: prompt tokens, sampling, thinking. And what of it is refused.

    asked, applied = Asking(speech, defaults).chat(request, identity)        # Refusal 400 with the reason

Every parameter is honoured or refused; `applied` is what the reply says was done. Thinking is on where the model has
thoughts. One switch decides it (`thinking`, `reasoning_effort` none, the template switches of vLLM, the model names
deepseek-chat and deepseek-reasoner); two that disagree are refused. A quarter of the tokens is kept for the answer, so
that thinking cannot use them all up; effort low thinks for a quarter at most, max keeps an eighth for the answer.
"""

import hashlib
import itertools
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from sputnik.engine.params import SamplingParams
from sputnik.errors import ConfigError, DataError
from sputnik.serve.fields import ChatMessage, ChatRequest, CompletionRequest, Effort, Sampling, TokenizeRequest
from sputnik.serve.forced_calls import call_grammar
from sputnik.serve.generations import Asked
from sputnik.serve.identity import Identity
from sputnik.serve.reading import Speech
from sputnik.serve.refusals import Refusal
from sputnik.text.chat import Prompt, render
from sputnik.text.foreign import render_own
from sputnik.text.tools import definitions

ALIASES: Mapping[str, bool] = {"deepseek-chat": False, "deepseek-reasoner": True}
"""Names of DeepSeek's API for the one model there is, and whether it thinks under this name."""
EFFORTS: Mapping[Effort, Effort] = {"minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"}
ANYTHING = {"type": "object"}


@dataclass(frozen=True)
class Defaults:
    """Of requests that say nothing."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 4096


@dataclass(frozen=True)
class Asking:
    speech: Speech
    defaults: Defaults
    name: str
    """Of the model."""

    def check_model(self, name: str) -> None:
        if name != self.name and name not in ALIASES:
            known = ", ".join([self.name, *ALIASES])
            raise Refusal(404, f"no model {name!r} here; there are {known}", code="model_not_found", param="model")

    # --- chat ---

    def chat(self, request: ChatRequest, identity: Identity) -> tuple[Asked, dict[str, Any]]:
        self.check_model(request.model)
        if request.stream_options is not None and not request.stream:
            raise Refusal(400, "stream_options are for streams: leave them out", param="stream_options")
        thinks = self._thinks(request)
        tools, choice = self._tools(request)
        prompt = self.prompt(request.messages, thinks, tools if choice != "none" else ())
        most = _same("max_tokens", request.max_tokens, "max_completion_tokens", request.max_completion_tokens)
        form = self._form(request, tools, choice)
        params = self._params(
            request, len(prompt.ids), most,
            self._budget(request, thinks) | form | _scores(request.logprobs, request.top_logprobs),
        )  # fmt: skip
        params, thought = self._with_reserve(params, request, prompt)
        names = frozenset(each["name"] for each in definitions(tools)) if tools and choice != "none" else None
        one = request.parallel_tool_calls is False and names is not None
        asked = Asked(prompt.ids, params, prompt.in_thought, names, one, _salt(identity, request), model=request.model)
        return asked, _applied(params, thinking=thinks, **thought)

    def count(self, request: ChatRequest) -> int:
        """Tokens of the prompt alone."""
        self.check_model(request.model)
        tools, choice = self._tools(request)
        return len(self.prompt(request.messages, self._thinks(request), tools if choice != "none" else ()).ids)

    def prompt(self, messages: Sequence[ChatMessage], thinks: bool, tools: Sequence[Mapping[str, Any]]) -> Prompt:
        """Ids of a conversation, and of the beginning of its answer if the last message has `prefix`."""
        *before, last = messages
        if any(message.prefix for message in before) or (last.prefix and last.role != "assistant"):
            raise Refusal(400, "prefix is for the last message, an assistant's", param="messages")
        spoken = [_plain(message) for message in _in_order(before if last.prefix else messages)]
        self._check_size(sum(len(each["content"]) for each in spoken), "messages")
        if not last.prefix and last.role == "assistant":
            raise Refusal(400, 'the last message is the assistant\'s: give it "prefix": true to go on from it')
        try:
            prompt = self._rendered(spoken, thinks, tools)
        except (DataError, ConfigError) as error:
            raise Refusal(400, f"messages: {error}", param="messages") from None
        return self._begun(prompt, last) if last.prefix else prompt

    def _check_size(self, size: int, param: str) -> None:
        """Refuse what cannot fit, whatever its tokens are, before they are made."""
        if size > self.speech.context * self.speech.longest:
            message = f"the context has {self.speech.context} tokens, far fewer than {size} characters have"
            raise Refusal(400, message, code="context_length_exceeded", param=param)

    def _rendered(self, messages: list[dict[str, Any]], thinks: bool, tools: Sequence[Mapping[str, Any]]) -> Prompt:
        if self.speech.template == "own":
            if tools:
                raise ConfigError("this model speaks its makers' format, in which tools are not supported here")
            return render_own(self.speech.tok, messages, thinking=thinks)
        return render(self.speech.tok, messages, template=self.speech.template, thinking=thinks, tools=tools)

    def _begun(self, prompt: Prompt, message: ChatMessage) -> Prompt:
        """The prompt with the answer's beginning; a content closes the thought that the template opens."""
        tok, content = self.speech.tok, _text(message.content)
        thought = _same("reasoning_content", message.reasoning_content, "reasoning", message.reasoning)
        ids = [*prompt.ids]
        if thought is not None and not prompt.in_thought:
            raise Refusal(400, "a prefix with reasoning_content needs thinking", param="messages")
        ids += tok.encode(thought or "")
        if content and prompt.in_thought:
            ids += [*tok.encode("\n" if thought else ""), tok.end_think_id, *tok.encode("\n\n")]
        return Prompt((*ids, *tok.encode(content)), prompt.in_thought and not content)

    def _thinks(self, request: ChatRequest) -> bool:
        """Whether the model thinks first."""
        kwargs, able = request.chat_template_kwargs, self.speech.thought is not None
        kind = request.thinking.type if request.thinking else "auto"
        wishes = {
            "thinking": None if kind == "auto" else kind == "enabled",
            "reasoning_effort": None if request.reasoning_effort is None else request.reasoning_effort != "none",
            "chat_template_kwargs.thinking": kwargs.thinking if kwargs else None,
            "chat_template_kwargs.enable_thinking": kwargs.enable_thinking if kwargs else None,
        }  # fmt: skip
        given = {name: wish for name, wish in wishes.items() if wish is not None}
        if len(set(given.values())) > 1:
            raise Refusal(400, f"{' and '.join(given)} disagree about thinking: keep one", param=next(iter(given)))
        if not given:
            return able and ALIASES.get(request.model, True)
        (wanted,) = set(given.values())
        if wanted and not able:
            raise Refusal(400, "this model has no thoughts: it was not trained to think", param=next(iter(given)))
        return wanted

    def _budget(self, request: ChatRequest, thinks: bool) -> dict[str, Any]:
        inner = request.thinking.budget_tokens if request.thinking else None
        budget = _same("thinking_budget", request.thinking_budget, "thinking.budget_tokens", inner)
        if budget is None or budget == -1:
            return {} if thinks or self.speech.thought is None else {"thinking_budget": 0}  # not even by itself
        if not thinks:
            raise Refusal(400, "thinking_budget is of no use without thinking: leave it out", param="thinking_budget")
        return {"thinking_budget": budget}

    def _with_reserve(
        self, params: SamplingParams, request: ChatRequest, prompt: Prompt
    ) -> tuple[SamplingParams, dict[str, Any]]:
        """Room for the answer, and what effort means for the thought."""
        if self.speech.thought is None or not (prompt.in_thought or self.speech.template == "zero"):
            return params, {}
        effort = EFFORTS.get(request.reasoning_effort, request.reasoning_effort) if request.reasoning_effort else None
        reserve = params.max_tokens // (8 if effort == "max" else 4)
        budget = params.thinking_budget
        if effort == "low" and budget is None:
            budget = max(1, params.max_tokens // 4)
        params = replace(params, answer_reserve=reserve, thinking_budget=budget)
        return params, {"thinking_budget": budget, "answer_reserve": reserve}

    def _tools(self, request: ChatRequest) -> tuple[Sequence[Mapping[str, Any]], str]:
        """The tools, and which may or must be called: none, auto, required or a name."""
        tools, choice = request.tools or [], request.tool_choice
        try:
            names = [each["name"] for each in definitions(tools)]
        except DataError as error:
            raise Refusal(400, f"tools: {error}", param="tools") from None
        if isinstance(choice, dict):
            function = choice.get("function")
            choice = function.get("name") if choice.get("type") == "function" and isinstance(function, dict) else None
            if not isinstance(choice, str) or choice not in names:
                raise Refusal(400, "tool_choice names no tool of tools", param="tool_choice")
            return tools, f"={choice}"
        if choice is not None and choice not in ("none", "auto", "required"):
            raise Refusal(400, "tool_choice: none, auto, required or a function of tools", param="tool_choice")
        if choice == "required" and not tools:
            raise Refusal(400, "tool_choice required needs tools", param="tool_choice")
        return tools, choice or ("auto" if tools else "none")

    def _form(self, request: ChatRequest, tools: Sequence[Mapping[str, Any]], choice: str) -> dict[str, Any]:
        """The grammar of the answer."""
        wanted, many = request.response_format, request.parallel_tool_calls is not False
        forced = choice == "required" or choice.startswith("=")
        if wanted is None or wanted.type == "text":
            if not forced:
                return {}
            only = None if choice == "required" else choice[1:]
            return {"grammar": call_grammar(self.speech.tok, tools, only, many)}
        if forced:
            raise Refusal(400, "response_format and a forced tool call exclude each other", param="response_format")
        if (wanted.type == "json_schema") != (wanted.json_schema is not None):
            raise Refusal(400, "json_schema goes with type json_schema", param="response_format")
        schema = json.dumps(ANYTHING if wanted.json_schema is None else wanted.json_schema.schema)
        if tools and choice == "auto":
            return {"grammar": call_grammar(self.speech.tok, tools, None, many, schema)}
        return {"schema": schema}  # as text: it may hold numbers that no message to the worker could

    # --- completions ---

    def completions(self, request: CompletionRequest, identity: Identity) -> tuple[list[Asked], dict[str, Any]]:
        self.check_model(request.model)
        if request.stream_options is not None and not request.stream:
            raise Refusal(400, "stream_options are for streams: leave them out", param="stream_options")
        if request.echo:
            raise Refusal(400, "echo is not offered: the prompt is known to who sent it", param="echo")
        prompts = [self._completion_prompt(each, request.suffix) for each in _prompts(request)]
        if len(prompts) * (request.n or 1) > 32:
            raise Refusal(400, "at most 32 answers to one request: send fewer prompts or a lower n", param="n")
        scores = {} if request.logprobs is None else {"logprobs": request.logprobs}
        every = [self._params(request, len(ids), request.max_tokens or 16, scores) for ids in prompts]
        salt = _salt(identity, request)
        asked = [Asked(ids, params, None, salt=salt, model=request.model) for ids, params in zip(prompts, every)]
        return asked, _applied(every[0])

    def _completion_prompt(self, prompt: str | list[int], suffix: str | None) -> tuple[int, ...]:
        tok = self.speech.tok
        if isinstance(prompt, str):
            self._check_size(len(prompt) + len(suffix or ""), "prompt")
        try:
            if suffix is None:
                if isinstance(prompt, list):
                    self._check_ids(prompt, "prompt")
                    return tuple(prompt)
                return (*tok.text_start, *tok.encode(prompt))
            if isinstance(prompt, list):
                raise Refusal(400, "a suffix needs a prompt that is text", param="suffix")
            return (
                *tok.text_start, tok.fim_begin_id, *tok.encode(prompt), tok.fim_hole_id, *tok.encode(suffix),
                tok.fim_end_id,
            )  # fmt: skip
        except DataError as error:
            raise Refusal(400, str(error), param="prompt" if suffix is None else "suffix") from None

    # --- beside answers ---

    def tokens(self, request: TokenizeRequest) -> list[int]:
        """Ids of a text or a conversation."""
        if request.model is not None:
            self.check_model(request.model)
        if request.messages is not None:
            return list(self.prompt(request.messages, self.speech.thought is not None, request.tools or ()).ids)
        try:
            start = self.speech.tok.text_start if request.add_special_tokens else ()
            return [*start, *self.speech.tok.encode(request.prompt or "")]
        except DataError as error:
            raise Refusal(400, str(error), param="prompt") from None

    def text(self, ids: Sequence[int], model: str | None) -> str:
        if model is not None:
            self.check_model(model)
        self._check_ids(ids, "tokens")
        return self.speech.tok.decode(ids)

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        if ids and max(ids) >= self.speech.tok.vocab_size:
            raise Refusal(400, f"token {max(ids)} is not in the vocabulary", param=param)

    # --- both ---

    def _params(self, request: Sampling, prompt: int, most: int | None, more: dict[str, Any]) -> SamplingParams:
        room = self.speech.context - prompt
        if room < 1 or (most is not None and most > room):
            wanted = f" and {most} for the answer" if most is not None else ""
            message = f"the context has {self.speech.context} tokens, but the prompt has {prompt}{wanted}"
            raise Refusal(400, message, code="context_length_exceeded", param="messages")
        given: dict[str, Any] = {
            "temperature": _or(request.temperature, self.defaults.temperature),
            "top_p": _or(request.top_p, self.defaults.top_p),
            "top_k": max(0, request.top_k or 0), "min_p": request.min_p or 0.0,
            "presence_penalty": request.presence_penalty or 0.0,
            "frequency_penalty": request.frequency_penalty or 0.0,
            "repetition_penalty": _or(request.repetition_penalty, 1.0),
            "logit_bias": _biases(request.logit_bias or {}),
            "stop": (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
            "stop_ids": tuple(request.stop_token_ids or ()), "ignore_eos": bool(request.ignore_eos),
            "min_tokens": request.min_tokens or 0, "n": request.n or 1, "break_loops": True,
            "max_tokens": most if most is not None else min(room, self.defaults.max_tokens),
            "seed": request.seed if request.seed is not None else secrets.randbits(63),
        }  # fmt: skip
        try:
            params = SamplingParams(**given | more)
            params.check_vocabulary(self.speech.tok.vocab_size)
        except ConfigError as error:
            raise Refusal(400, str(error).removeprefix("sampling: ")) from None
        return params


def _in_order(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Results of tools in the order of the calls that they answer: the model is shown no ids."""
    found, places = list[ChatMessage](), dict[str | None, int]()
    for results, group in itertools.groupby(messages, lambda message: message.role == "tool"):
        run = list(group)
        found += sorted(run, key=lambda each: places.get(each.tool_call_id, len(places))) if results else run
        places = {call.id: place for place, call in enumerate(run[-1].tool_calls or ())}
    return found


def _plain(message: ChatMessage) -> dict[str, Any]:
    """As the renderers take it. Thoughts of earlier turns stay behind."""
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": _text(message.content)}
    if message.tool_calls:
        if role != "assistant":
            raise Refusal(400, "tool_calls are for messages of the assistant", param="messages")
        found["tool_calls"] = [msgspec.to_builtins(call) for call in message.tool_calls]
    return found


def _text(content: Any) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _same(name: str, value: Any, other_name: str, other: Any) -> Any:
    """The one of two names for the same thing that was given."""
    if value is not None and other is not None and value != other:
        raise Refusal(400, f"{name} and {other_name} mean the same and differ: keep one", param=name)
    return value if value is not None else other


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _scores(logprobs: bool | None, top: int | None) -> dict[str, Any]:
    if top is not None and not logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return {"logprobs": top or 0} if logprobs else {}


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    if not all(name.isdecimal() and len(name) < 10 for name in given):
        raise Refusal(400, "the keys of logit_bias are token ids", param="logit_bias")
    return {int(name): bias for name, bias in given.items()}


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    """Each prompt by itself: a text or ids."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(each) for each in prompt}
    if kinds == {int}:
        return [[each for each in prompt if isinstance(each, int)]]
    if len(kinds) > 1 or len(prompt) > 16 or not all(prompt):
        raise Refusal(400, "prompt: a text, token ids, or up to 16 of one kind, none of them empty", param="prompt")
    return [each for each in prompt if not isinstance(each, int)]


def _salt(identity: Identity, request: Sampling) -> bytes:
    """Cached prompts are shared within it: one per account, and per end user that it names."""
    who = request.user_id or ""
    return hashlib.blake2b(who.encode(), key=identity.salt, digest_size=16).digest()


def _applied(params: SamplingParams, **more: Any) -> dict[str, Any]:
    found = {name: getattr(params, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    return found | {name: value for name, value in more.items() if value is not None}
