"""Dialogues to learn from: JSONL files -> token ids and which of them carry loss, checked before anything is trained.

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "reasoning_content": ...}]}
    {"prompt": "2+2?", "answer": "4", "thinking": "Two and two."}

    found = read_examples([Path("mine.jsonl")], tok, longest=1024)
    train, held_out = split(found.examples, share=0.02, seed=0)

Loss falls on what the assistant writes, end of text included, and on nothing else. Each of its turns is learned once,
behind the very prompt it would get in use, where thoughts of earlier turns are gone: a dialogue with thoughts becomes
one example for each of them, one without is a single example. A message with `"weight": 0` is only read.

Lines are never cut and never skipped in silence: see `read_records`. Left out: data larger than memory.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from sputnik.errors import ConfigError, DataError, SputnikError
from sputnik.text.chat import render_turn
from sputnik.text.foreign import render_own
from sputnik.text.templates import check_template
from sputnik.text.tokenizer import END_THINK, Tokenizer

T = TypeVar("T")
Policy = Literal["refuse", "drop"]
Turn = tuple[list[int], list[int]]  # what the assistant was asked, what it wrote
START = "nothing"
FOLLOWS: Mapping[object, tuple[str, ...]] = {
    "system": (START, "system"),
    "user": (START, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


@dataclass(frozen=True, eq=False)
class Example:
    """`ids` (L,) from the first token to an end of text; `mask` (L,) is true on what carries loss."""

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    where: str
    """FILE:LINE."""
    question: str
    """Hash of what comes before the first answer."""


@dataclass
class Found(Generic[T]):
    """What some files hold: `kept` of the good lines, and why others were dropped, as "FILE:LINE: reason"."""

    kept: list[T] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Data:
    examples: list[Example]
    lines: int
    """That became examples."""
    bad: list[str]
    long: list[str]


# --- lines of JSON ---


def read_records(
    files: Iterable[Path], convert: Callable[[dict[str, Any]], T], bad_lines: Policy = "refuse"
) -> Found[tuple[str, T]]:
    """("FILE:LINE", convert(object)) for each line; one that is no JSON object, or that `convert` refuses with a
    SputnikError, is bad. All lines are tried before the first bad one is reported with the number of others."""
    found: Found[tuple[str, T]] = Found()
    names = []
    for path in files:
        names.append(str(path))
        if not path.is_file():
            raise DataError(f"{path}: no such file of examples")
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                where = f"{path}:{number}"
                try:
                    if record := _record(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw):
                        found.kept.append((where, convert(record)))
                except SputnikError as error:
                    found.bad.append(f"{where}: {error}")
    if found.bad and bad_lines == "refuse":
        others = f"; so are {len(found.bad) - 1} other lines" if len(found.bad) > 1 else ""
        raise DataError(f'{found.bad[0]}{others}. Mend them, or leave them out with bad_lines = "drop"')
    if not found.kept:
        why = f"{len(found.bad)} bad lines, the first: {found.bad[0]}" if found.bad else "they are empty"
        raise DataError(f"no examples in {', '.join(names) or 'no file'}: {why}")
    return found


def _record(raw: bytes) -> dict[str, Any] | None:
    """None for a blank line."""
    try:
        text = raw.decode("utf-8").strip()
        record = json.loads(text) if text else None
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start} of the line: convert it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}): write one object a line") from None
    if record is not None and not (isinstance(record, dict) and record):
        raise DataError("not a JSON object: write one object a line")
    return record


def digest(files: Iterable[Path]) -> str:
    """Hash of the contents of some files, in this order."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def weights_digest(checkpoint: Path) -> str:
    """Hash of the weights of a checkpoint directory or a GGUF file."""
    inside = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.gguf")]
    return digest([checkpoint] if checkpoint.is_file() else sorted(inside))


# --- dialogues ---


def read_examples(
    files: Iterable[Path],
    tok: Tokenizer,
    *,
    longest: int,
    template: str = "chat",
    bad_lines: Policy = "refuse",
    too_long: Policy = "refuse",
) -> Data:
    """All examples of some files in order. One of more than `longest` tokens is refused or dropped, never cut."""
    found = read_records(files, partial(_examples, turn_of(tok, template)), bad_lines)
    short, long = [], []
    for where, (question, sequences) in found.kept:
        tokens = max(len(ids) for ids, _ in sequences)
        if tokens > longest:
            long.append(f"{where}: {tokens} tokens")
        else:
            short.append([Example(np.array(ids), np.array(mask), where, question) for ids, mask in sequences])
    if long and (too_long == "refuse" or not short):
        raise DataError(
            f"{len(long)} of {len(found.kept)} examples are longer than {longest} tokens, the first {long[0]}: raise "
            'length, or leave them out with too_long = "drop"'
        )
    return Data([example for group in short for example in group], len(short), found.bad, long)


def turn_of(tok: Tokenizer, template: str) -> Callable[..., Turn]:
    """(messages, tools) -> ids before and ids of the last message, in the template of that name: "chat" or "zero" of
    text/chat.py, or "own", which the tokenizer brings."""
    if template == "own":
        if tok.chat_template is None:
            raise ConfigError("this model brings no chat template of its own: give it one of ours, chat or zero")
        return partial(_own_turn, tok)
    check_template(template)
    if not tok.has_dialogue:
        raise ConfigError(
            f'this tokenizer has no tokens for template "{template}": use template "own", or a model they were added to'
        )
    return partial(_turn, tok, template)


def _turn(tok: Tokenizer, template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> Turn:
    return render_turn(tok, messages, template=template, tools=tools)


def _own_turn(tok: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> Turn:
    if tools:
        raise DataError("tools are for models that speak DeepSeek's format")
    if messages[-1].get("reasoning_content") or END_THINK in (messages[-1].get("content") or ""):
        raise DataError("a model's own template has no thoughts: leave them out, or use a model with DeepSeek's tokens")
    asked = render_own(tok, messages[:-1], thinking=False).ids
    whole = render_own(tok, messages, thinking=False, add_generation_prompt=False).ids
    answer = list(whole[len(asked) :])
    if whole[: len(asked)] != asked or tok.eos_id not in answer:
        raise DataError(
            "the model's own template does not write an answer behind the prompt it gives for it and end it with "
            "its end-of-text token: a model that learned from this would not stop"
        )
    end = len(answer) - answer[::-1].index(tok.eos_id)  # what the template puts behind that is nobody's
    return list(asked), answer[:end]


def _examples(turn: Callable[..., Turn], record: Mapping[str, Any]) -> tuple[str, list[tuple[list[int], list[bool]]]]:
    """Hash of the question, and sequences with their masks."""
    messages, tools = dialogue(record)
    turns = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and _is_learned(message, place + 1):
            try:
                turns.append(turn(messages[: place + 1], tools))
            except DataError as error:
                raise DataError(f"message {place + 1}: {error}") from None
    if not turns:
        raise DataError("no message of the assistant has a weight: there is nothing to learn")
    first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    asked = json.dumps([[message["role"], message.get("content")] for message in messages[:first]])
    return hashlib.sha256(asked.encode()).hexdigest()[:16], _merged(turns)


def _merged(turns: Sequence[Turn]) -> list[tuple[list[int], list[bool]]]:
    """A turn whose prompt and answer stand at the beginning of a later sequence is learned in the next such."""
    found: list[tuple[list[int], list[bool]]] = []
    for asked, wrote in reversed(turns):
        whole = asked + wrote
        home = next((each for each in reversed(found) if each[0][: len(whole)] == whole), None)
        if home is None:
            home = whole, [False] * len(whole)
            found.append(home)
        home[1][len(asked) : len(whole)] = [True] * len(wrote)
    return found[::-1]


def dialogue(record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages and tools of a line in either form, with roles in an order that can be; keys beside them are ignored."""
    if ("messages" in record) == ("prompt" in record):
        raise DataError('need {"messages": [...]} or {"prompt": TEXT, "answer": TEXT}')
    messages, tools = record.get("messages"), record.get("tools") or []
    if messages is None:
        prompt, answer, thinking = (record.get(key) for key in ("prompt", "answer", "thinking"))
        if not (isinstance(prompt, str) and isinstance(answer, str) and isinstance(thinking, str | None)):
            raise DataError("prompt, answer and thinking must be texts")
        reply = {"role": "assistant", "content": answer, "reasoning_content": thinking}
        messages = [{"role": "user", "content": prompt}, reply]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError('messages must be a list of {"role": ..., "content": ...}')
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("tools must be a list of objects, as in OpenAI's API")
    before: str = START
    for number, message in enumerate(messages, 1):
        role = message.get("role")
        if not isinstance(role, str) or role not in FOLLOWS:
            raise DataError(f"message {number}: no role {role!r}; choose one of {', '.join(map(str, FOLLOWS))}")
        if before not in FOLLOWS[role]:
            raise DataError(f"message {number}: {role} after {before}; it may follow {' or '.join(FOLLOWS[role])}")
        content, calls = message.get("content"), message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise DataError(f"message {number}: tool_calls must be a list of objects, as in OpenAI's API")
        if not isinstance(content, str) and not (content is None and calls):
            raise DataError(f"message {number}: content must be a text")
        before = role
    if before != "assistant":
        raise DataError("the last message must be the assistant's")
    return messages, tools


def _is_learned(message: Mapping[str, Any], number: int) -> bool:
    weight, content = message.get("weight", 1), message.get("content") or ""
    if weight not in (0, 1):
        raise DataError(f"message {number}: weight is 0 or 1")
    if weight and not content.rpartition(END_THINK)[2].strip() and not message.get("tool_calls"):
        raise DataError(f"message {number}: the assistant's answer is empty")
    return bool(weight)


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out): all answers to a question are on one side. At least one question is held out unless `share`
    is 0 or there is only one."""
    questions = {example.question for example in examples}
    ranked = sorted(questions, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    count = min(max(1, round(share * len(ranked))), len(ranked) - 1) if share else 0
    held = set(ranked[:count])
    return [e for e in examples if e.question not in held], [e for e in examples if e.question in held]


# --- looking at them ---


def runs(example: Example) -> list[tuple[bool, NDArray[np.int64]]]:
    """The ids cut where loss begins or ends: (carries loss, ids)."""
    cuts = np.flatnonzero(np.diff(example.mask)) + 1
    places = [0, *cuts.tolist(), len(example.ids)]
    return [(bool(example.mask[a]), example.ids[a:b]) for a, b in pairwise(places)]


def shown(example: Example, tok: Tokenizer, characters: int = 1500) -> Text:
    """The beginning of an example for the console: what carries loss stands out."""
    text = Text(f"{example.where}, what carries loss in green:\n")
    for learned, ids in runs(example):
        text.append(tok.decode(ids.tolist()), style="green" if learned else "dim")
    if len(text) > characters:
        text.truncate(characters)
        text.append(" ... (whole in samples.md)")
    return text


def preview(examples: Sequence[Example], tok: Tokenizer) -> str:
    """Markdown: every token as it is trained on, in lines that begin with + where it carries loss."""
    parts = ["# What is trained on\n\nLines with + carry loss, the others are only read; ⏎ is a line break.\n"]
    for example in examples:
        lines = []
        for learned, ids in runs(example):
            text = tok.decode(ids.tolist()).replace("\n", "⏎\n")
            lines += [("+ " if learned else "  ") + line for line in text.split("\n") if line]
        fence = "`" * (1 + max([3, *map(len, re.findall("`+", "".join(lines)))]))
        count = f"{len(example.ids)} tokens, {int(example.mask.sum())} carry loss"
        parts += [f"## {example.where}: {count}\n\n{fence}diff", *lines, f"{fence}\n"]
    return "\n".join(parts)
