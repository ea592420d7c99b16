"""Judged answers, as people write them down: one JSON object a line, a preference pair or a safety label.

    {"prompt": "What is a hat?", "chosen": "You wear it on your head.", "rejected": "Hat hat hat."}
    {"prompt": "Tell me a joke.", "response": "<think>\\nA kind one.\\n</think>\\n\\nKnock, knock.", "safe": true}

`messages` (a conversation that ends with the user) may stand for `prompt`. An answer may begin with its thought, up to
</think>. "defect", "why" or "kind" of a line names its group in the scores; other keys are left alone. Files of such
lines are read by train/examples.py.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sputnik.errors import DataError

Kind = Literal["pairwise", "pointwise"]
CARD = "reward_model.json"
"""In a checkpoint's directory: it is a model that judges, not one that writes."""


@dataclass(frozen=True)
class Judged:
    """A conversation with two answers, the better one first, or with one answer and its label."""

    messages: tuple[Mapping[str, str], ...]
    answers: tuple[str, ...]
    safe: bool = True
    """Of the one answer; says nothing of a pair."""
    group: str = ""

    @property
    def key(self) -> str:
        """What the split goes by: all answers to one conversation are on one side."""
        return json.dumps([[message["role"], message["content"]] for message in self.messages], ensure_ascii=False)


def judged(kind: Kind, record: Mapping[str, Any]) -> Judged:
    """The pair or label that a parsed line holds; DataError with the reason if it holds none."""
    messages = conversation(record)
    group = str(record.get("defect") or record.get("why") or record.get("kind") or "")
    if kind == "pairwise":
        chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
        if chosen == rejected:
            raise DataError('"chosen" and "rejected" are the same text')
        return Judged(messages, (chosen, rejected), group=group)
    if not isinstance(record.get("safe"), bool):
        raise DataError('"safe" must be true or false')
    return Judged(messages, (_text(record, "response"),), record["safe"], group)


def conversation(record: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    """The messages before the answer, from "messages" or "prompt"."""
    if ("prompt" in record) == ("messages" in record):
        raise DataError('needs either "prompt" or "messages"')
    if "prompt" in record:
        return ({"role": "user", "content": _text(record, "prompt")},)
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise DataError('"messages" must be a list of {"role", "content"}')
    found = tuple({"role": str(each.get("role")), "content": _text(each, "content")} for each in messages)
    if found[-1]["role"] != "user":
        raise DataError(f'"messages" must end with the user, not with {found[-1]["role"]!r}')
    return found


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'"{key}" must be a text that is not empty')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f'"{key}" holds half of a surrogate pair, which is no text') from None
    return value


def split_thought(text: str) -> tuple[str | None, str]:
    """(thought, answer) of a written answer; the thought is None where there is none."""
    thought, closed, answer = text.rpartition("</think>")
    if not closed and text.lstrip().startswith("<think>"):
        thought, closed, answer = text, "</think>", ""  # never came to an end
    if not closed:
        return None, text.strip()
    return thought.strip().removeprefix("<think>").strip(), answer.strip()


def join_thought(thinking: str | None, answer: str) -> str:
    """Inverse of `split_thought`."""
    return answer if thinking is None else f"<think>\n{thinking}\n</think>\n\n{answer}"


def share_of(key: str) -> float:
    """A number in 0..1 that depends on the text alone: below the held-out share, it is held out."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_held_out(items: Sequence[Judged], share: float) -> tuple[list[Judged], list[Judged]]:
    """(training, held out): a conversation stays on its side whatever else is in the files."""
    held = [share_of(item.key) < share for item in items]
    return [i for i, out in zip(items, held) if not out], [i for i, out in zip(items, held) if out]
