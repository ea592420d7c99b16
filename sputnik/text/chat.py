"""Messages -> ids and ids -> (thinking, answer): the one place that knows the dialogue format.

Training, evaluation and serving all call this module, so a reward can never expect another format than the prompt asked
for. Ids are built piece by piece from the rendered Jinja template (`text/templates.py`): what the template spells
becomes control tokens, what a person wrote goes through `Tokenizer.encode` and cannot. The way back works on token ids
from a start state, never by searching text for "</think>".

    chat:  <BOS>{system}<｜User｜>{q}<｜Assistant｜><think>\\n | {thinking}\\n</think>\\n\\n{answer}<EOS>
           <BOS>{system}<｜User｜>{q}<｜Assistant｜></think> | {answer}<EOS>           with thinking=False
           ...<｜tool▁output▁begin｜>{result}<｜tool▁output▁end｜> | {answer}<EOS>     after a call (text/tools.py)
    zero:  <BOS>{description}\\nUser: {q}\\nAssistant: | <think>{thinking}</think>\\n<answer>{answer}</answer><EOS>

Left of the bar is the prompt, right of it what the model writes; `render_turn` gives both for a turn of a dialogue that
is trained on. Calls of tools go in here and come out of the answer's ids in `text/tools.py`. Left out: a thought kept
for the next turn, which V3.2's tool loops do.
"""

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import jinja2

from sputnik.errors import DataError
from sputnik.text.templates import check_template, template_hash, template_source
from sputnik.text.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, TOOL_SEP, TOOLS, USER, Tokenizer
from sputnik.text.tools import ToolCall, definitions, written

__all__ = [
    "Completion", "Prompt", "StreamParser", "parse", "render", "render_example", "render_turn", "template_hash",
]  # fmt: skip

Channel = Literal["thinking", "answer"]
ROLES = ("system", "user", "assistant", "tool")
TEMPLATE_TOKENS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, *TOOLS, TOOL_SEP)
CONTROL = re.compile("(" + "|".join(re.escape(token) for token in TEMPLATE_TOKENS) + ")")
SLOT = re.compile("\ue000([0-9]+)\ue001")  # stands for what people wrote while the template is rendered


@dataclass(frozen=True)
class Prompt:
    """Token ids of a conversation; `in_thought` says whether generation starts inside a thought."""

    ids: tuple[int, ...]
    in_thought: bool

    @classmethod
    def of(cls, tok: Tokenizer, ids: Sequence[int]) -> "Prompt":
        """Ids that were rendered somewhere; a thought is open if the last tag opens one."""
        tags = [id for id in ids if id in (tok.think_id, tok.end_think_id)] if tok.has_thoughts else []
        return cls(tuple(ids), in_thought=bool(tags) and tags[-1] == tok.think_id)


@dataclass(frozen=True)
class Completion:
    """What a model wrote, taken apart. Rewards read this record, never the raw text."""

    thinking: str
    answer: str  # outside the thought; template "zero": inside the first <answer> block, else empty
    closed: bool  # no thought was left open
    truncated: bool  # ran out of tokens before EOS
    well_formed: bool  # exactly the template's form, nothing empty, no stray control token, finished


def render(
    tok: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str = "chat",
    thinking: bool = True,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Prompt:
    """Ids of `messages` ({"role", "content"}; roles system, user, assistant, tool), without thoughts of earlier turns.

    An assistant's message may have `tool_calls`; it and `tools` have the form of OpenAI's API. `thinking` matters to
    "chat" alone: "zero" always leaves it to the model to open the thought, and has no tools. After a tool's output
    the model goes on without a thought, as V3.1 does.
    """
    check_template(template)
    contents: list[str] = []

    def slot(text: str) -> str:
        if not text:  # templates ask whether there is any
            return ""
        contents.append(text)
        return f"\ue000{len(contents) - 1}\ue001"

    described = [{"function": {name: slot(text) for name, text in each.items()}} for each in definitions(tools)]
    shown = [_slotted(message, slot) for message in messages]
    _check_order(messages, template, bool(tools))
    text = _compiled(template).render(
        messages=shown,
        tools=described,
        bos_token=BOS,
        eos_token=EOS,
        thinking=thinking,
        add_generation_prompt=add_generation_prompt,
    )
    ids: list[int] = []
    for piece in CONTROL.split(text):
        if CONTROL.fullmatch(piece):
            ids.append(tok.control_id(piece))
        else:  # neighbouring text is encoded as one run, as any other program would
            ids += tok.encode(SLOT.sub(lambda slot: contents[int(slot[1])], piece))
    return Prompt.of(tok, ids)


def render_example(
    tok: Tokenizer, prompt: str, thinking: str | None, answer: str, *, template: str = "chat"
) -> tuple[list[int], list[bool]]:
    """A whole document (BOS .. EOS) and its loss mask: true where the model itself writes, EOS included.

    `thinking=None` is a direct answer: the closed thought of V3.1 in "chat", a bare <answer> block in "zero".
    """
    start = render(tok, [{"role": "user", "content": prompt}], template=template, thinking=thinking is not None)
    reply = _reply(tok, thinking, answer, (), template)
    return [*start.ids, *reply], [False] * len(start.ids) + [True] * len(reply)


def render_turn(
    tok: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str = "chat",
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[int], list[int]]:
    """The last of `messages`, an assistant's: what it was asked, as `render` gives it, and what it wrote, EOS included.

    Its thought is its `reasoning_content`, or what its content has before </think>. None is a direct answer, an empty
    one a thought that was opened and closed.
    """
    *before, last = messages
    if last.get("role") != "assistant":
        raise DataError(f"the last message is of role {last.get('role')!r}, not the assistant's")
    thinking, answer = _reply_texts(last)
    if thinking is not None and before and before[-1].get("role") == "tool":
        raise DataError("after a tool's output the assistant goes on without a thought: leave it out")
    asked = render(tok, before, template=template, thinking=thinking is not None, tools=tools)
    _check_order(messages, template, bool(tools))
    return list(asked.ids), _reply(tok, thinking, answer, written(last.get("tool_calls") or ()), template)


def _reply_texts(message: Mapping[str, Any]) -> tuple[str | None, str]:
    """Thought and answer of an assistant's message. White space around a thought is layout, the template's own."""
    thinking, content = message.get("reasoning_content"), message.get("content")
    if not isinstance(thinking, str | None) or not isinstance(content, str | None):
        raise DataError("content and reasoning_content of an assistant's message must be texts")
    content = content or ""
    if thinking is None and END_THINK in content:
        thinking, _, content = content.rpartition(END_THINK)
        thinking = thinking.lstrip().removeprefix(THINK)
    if thinking is None and content.lstrip().startswith(THINK):
        raise DataError(f"the answer ends within its thought: there is no {END_THINK}")
    return (None, content) if thinking is None else (thinking.strip(), content.lstrip())


def _reply(tok: Tokenizer, thinking: str | None, answer: str, calls: Sequence[ToolCall], template: str) -> list[int]:
    """Ids of what a model writes behind its prompt, EOS included."""
    if template == "zero":
        ids = [] if thinking is None else [tok.think_id, *tok.encode(thinking), tok.end_think_id]
        return [*ids, *tok.encode(f"\n<answer>{answer}</answer>"), tok.eos_id]
    if thinking is not None:
        ids = [*tok.encode(f"{thinking}\n"), tok.end_think_id, *tok.encode(f"\n\n{answer}")]
    else:
        ids = tok.encode(answer)
    if calls:
        begin, end, call_begin, call_end = (tok.control_id(name) for name in TOOLS[:4])
        ids.append(begin)
        for call in calls:
            arguments = tok.encode(call.arguments)
            ids += [call_begin, *tok.encode(call.name), tok.control_id(TOOL_SEP), *arguments, call_end]
        ids.append(end)
    return [*ids, tok.eos_id]


def parse(
    tok: Tokenizer, ids: Sequence[int], *, in_thought: bool, finished: bool, template: str = "chat"
) -> Completion:
    """Take apart what was generated after a `Prompt`; `finished` = ended with EOS (which `ids` may hold or not).

    A `<think>` outside a thought opens one, `</think>` inside closes it; any other tag is dropped and spoils the form.
    """
    check_template(template)
    if ids and ids[-1] == tok.eos_id:
        ids = ids[:-1]
    segments = _segments(tok, ids, in_thought)
    thinking, outside = (
        "".join(tok.decode(part, skip_special=True) for channel, part in segments if channel == wanted).strip()
        for wanted in ("thinking", "answer")
    )
    control = [id for id in ids if id in tok.control_ids]
    if template == "zero":
        answer, shaped = answer_block(outside)
        shaped = shaped and (in_thought or not tok.decode(segments[0][1]).strip())  # nothing before the thought
        expected = [tok.end_think_id] if in_thought else [tok.think_id, tok.end_think_id]
    else:
        answer, shaped = outside, True
        expected = [tok.end_think_id] if in_thought else []
    filled = bool(answer) and (bool(thinking) or not expected)
    return Completion(
        thinking=thinking,
        answer=answer,
        closed=segments[-1][0] == "answer",
        truncated=not finished,
        well_formed=finished and shaped and filled and control == expected,
    )


class StreamParser:
    """`parse` one token at a time: the pieces of a channel, joined, are exactly what `parse` gives (template "chat").

    A piece never holds half a UTF-8 character or white space that might turn out to be the end of its channel.
    With template "zero" the answer channel is all text outside the thought, tags included.
    """

    def __init__(self, tok: Tokenizer, in_thought: bool, through: Callable[[str], str] = str) -> None:
        """All text of the answer goes `through` a filter of stop strings, which see its white space as it comes."""
        self._tok, self._through = tok, through
        self._inside = in_thought
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: dict[Channel, str] = {"thinking": "", "answer": ""}
        self._started: set[Channel] = set()

    @property
    def in_thought(self) -> bool:
        return self._inside

    def feed(self, id: int) -> list[tuple[Channel, str]]:
        """What became certain with this token: at most one piece."""
        if id in (self._tok.think_id, self._tok.end_think_id):
            if (id == self._tok.think_id) == self._inside:
                return []
            pieces = self.finish()
            self._inside = not self._inside
            return pieces
        return self._emit(self._decoder.decode(self._tok.token_bytes(() if id in self._tok.special_ids else (id,))))

    def finish(self) -> list[tuple[Channel, str]]:
        """Call once after the last token: half a character left behind comes out as U+FFFD."""
        return self._emit(self._decoder.decode(b"", final=True))

    def after_all(self, text: str) -> list[tuple[Channel, str]]:
        """Call after `finish` with what the filter has kept back."""
        return self._hold("answer", text)

    def _emit(self, text: str) -> list[tuple[Channel, str]]:
        channel: Channel = "thinking" if self._inside else "answer"
        if channel not in self._started:
            text = text.lstrip()
        if not text:
            return []
        self._started.add(channel)
        return self._hold(channel, self._through(text) if channel == "answer" else text)

    def _hold(self, channel: Channel, text: str) -> list[tuple[Channel, str]]:
        text = self._held[channel] + text
        body = text.rstrip()
        self._held[channel] = text[len(body) :]
        return [(channel, body)] if body else []


def _segments(tok: Tokenizer, ids: Sequence[int], in_thought: bool) -> list[tuple[Channel, list[int]]]:
    """Runs of ids by channel, cut where a thought opens or closes; a tag that does neither is dropped."""
    inside = in_thought
    segments: list[tuple[Channel, list[int]]] = [("thinking" if inside else "answer", [])]
    for id in ids:
        if id not in (tok.think_id, tok.end_think_id):
            segments[-1][1].append(id)
        elif (id == tok.think_id) != inside:
            inside = not inside
            segments.append(("thinking" if inside else "answer", []))
    return segments


def answer_block(text: str) -> tuple[str, bool]:
    """The first <answer> block of `text`, and whether `text` is that one block and nothing else."""
    before, opened, rest = text.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    alone = not before and not after and "<answer>" not in answer
    return (answer.strip(), alone) if opened and closed else ("", False)


def _slotted(message: Mapping[str, Any], slot: Callable[[str], str]) -> dict[str, Any]:
    """The message with its texts replaced by slots; of an assistant's turn only what follows its last thought."""
    check_message(message)
    role, content = message.get("role"), message.get("content")
    calls = written(message.get("tool_calls") or ()) if role == "assistant" else []
    if calls and content is None:
        content = ""
    if role not in ROLES or not isinstance(content, str):
        raise DataError(f"a message needs a role ({', '.join(ROLES)}) and a content text, not role {role!r}")
    if role == "assistant" and END_THINK in content:
        content = content.rpartition(END_THINK)[2].lstrip()
    functions = [{"function": {"name": slot(call.name), "arguments": slot(call.arguments)}} for call in calls]
    return {"role": role, "content": slot(content), "tool_calls": functions}


def check_message(message: object) -> None:
    if not isinstance(message, Mapping):
        raise DataError(f'messages are a list of {{"role", "content"}}, and {message!r:.40} is none of these')


def _check_order(messages: Sequence[Mapping[str, Any]], template: str, tools: bool) -> None:
    calling = False
    for message in messages:
        if message["role"] == "tool" and not calling:
            raise DataError("a tool's message must follow the assistant's message whose tool_calls it answers")
        calling = message["role"] == "tool" or bool(message.get("tool_calls"))
        tools = tools or calling
    if tools and template != "chat":
        raise DataError(f'template "{template}" has no tools: use "chat", or leave them out')


def _json(value: Any) -> str:
    """As transformers' filter; a slot stands for JSON already."""
    return value if isinstance(value, str) and SLOT.fullmatch(value) else json.dumps(value, ensure_ascii=False)


@lru_cache
def _compiled(template: str) -> jinja2.Template:
    # The switches transformers renders chat templates with.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _json
    return environment.from_string(template_source(template))
