"""Conversations for models of other makers (SmolLM2, Llama, Qwen): rendered with the chat template they bring.

    prompt = render_own(tok, messages)          # a `chat.Prompt`; DataError for a template or conversation that fails

A template is somebody's program: it runs in Jinja's sandbox, with what transformers offers it. People's words must not
become control tokens, yet templates look at them and trim them. So the letters with which control tokens begin and
end (mostly < and >) are replaced in those words, before rendering, by letters that occur nowhere, and put back after
the control tokens have been found. The ids are those of transformers for words without control tokens.

Left out: tools, and contents that are not text.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sputnik.errors import DataError
from sputnik.text.chat import Prompt, check_message
from sputnik.text.tokenizer import END_THINK, Tokenizer

ROLES = ("system", "user", "assistant")
UNUSED = range(0xF0000, 0xFFFFE)  # a plane of Unicode that is nobody's


def render_own(
    tok: Tokenizer, messages: Sequence[Mapping[str, Any]], *, thinking: bool = True, add_generation_prompt: bool = True
) -> Prompt:
    """Ids of `messages` ({"role", "content"}); `thinking` is told to templates that know such a switch."""
    source = tok.chat_template
    if source is None:
        raise DataError("this model brings no chat template, so it cannot hold a conversation: give it plain text")
    words = [_content(message) for message in messages]
    hidden, shown = _stand_ins(tok.control_tokens, words)
    try:
        text = _compiled(source).render(
            messages=[
                {"role": message["role"], "content": word.translate(hidden)}
                for message, word in zip(messages, words, strict=True)
            ],
            add_generation_prompt=add_generation_prompt,
            thinking=thinking,
            enable_thinking=thinking,
            tools=None,
            documents=None,
            **tok.named_tokens,
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise DataError(f"the model's chat template refuses this conversation: {error}") from None
    ids: list[int] = []
    for piece in re.split(_any_of(tok.control_tokens), text):
        control = tok.control_tokens.get(piece)
        ids += tok.encode(piece.translate(shown)) if control is None else [control]
    return Prompt.of(tok, ids)


def _content(message: Mapping[str, Any]) -> str:
    """Checked; of an assistant's turn what follows its thought."""
    check_message(message)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or not isinstance(content, str) or message.get("tool_calls"):
        raise DataError(
            f"for a model with a chat template of its own a message needs a role ({', '.join(ROLES)}) and a content "
            f"text, not role {role!r}; tools are for models that speak DeepSeek's format"
        )
    return content.rpartition(END_THINK)[2].lstrip() if role == "assistant" and END_THINK in content else content


def _stand_ins(control: Iterable[str], words: Sequence[str]) -> tuple[dict[int, int], dict[int, int]]:
    """Tables that hide the first and last letters of control tokens, and show them again."""
    edges = sorted({ord(token[place]) for token in control for place in (0, -1)})
    taken = {letter for word in words for letter in word}
    free = (code for code in UNUSED if chr(code) not in taken)
    hidden = dict(zip(edges, free, strict=False))
    if len(hidden) < len(edges):
        raise DataError("the conversation uses every private letter of Unicode")
    return hidden, {stand_in: edge for edge, stand_in in hidden.items()}


def _any_of(control: Iterable[str]) -> str:
    """A pattern for `re.split`: the longest of the control tokens that begin at a place."""
    return "(" + "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)) + ")"


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for those who train on it; here it is only passed over."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise DataError(f"the model's chat template is not Jinja: {error}") from None


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
