"""`choice:FILE.jsonl`: multiple-choice questions, one JSON object a line, the options in random order.

A line holds "question" (or "prompt"), "choices" (texts) and "answer": the letter, the number from 0, or the text of the
right one. The order of the options is drawn for each question from `order` and the question itself: a model that likes
the letter B gets no more than chance. The letter counts where it is the whole answer, or alone on lines "Answer: B".

Lines are split by hash like any task; with `benchmark = true` the whole file is the test split and nothing may be
trained on.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Self

import msgspec

from sputnik.errors import DataError, TaskError
from sputnik.tasks.base import Problem, Split, Task, Verdict, hash_of, split_of

ASKED = (
    'Choose the right one of the options below. Think first; then end with a line "Answer: X", X being the letter of '
    "your choice."
)
GAP = r"[ \t*]{0,9}"
LETTER = r"[(*$]{0,9}(?:\\boxed\{)?([A-Z])[)}$*.]{0,9}"
LINE = re.compile(rf"^{GAP}(?:the |my |final )*answer(?: is)?{GAP}:?{GAP}{LETTER}{GAP}$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class ChoiceFile(Task):
    """Questions of one JSONL file."""

    file: str
    benchmark: bool = False
    order: int = 0
    """Seed of the order of the options."""

    name = "choice"
    version = "1"

    @classmethod
    def build(cls, argument: str, options: Mapping[str, Any]) -> Self:
        if not argument:
            raise TaskError("name the file: choice:FILE.jsonl")
        return super().build("", {"file": argument, **options})

    def generate(self, rng: random.Random) -> Problem:
        return rng.choice(self._problems)

    def stream(self, split: Split, seed: int) -> Iterator[Problem]:
        """The file's questions of one split, each once, in an order of this seed."""
        mine = [problem for problem in self._problems if self.benchmark or split_of(int(problem.id, 16)) == split]
        if self.benchmark and split != "test":
            mine = []
        random.Random(hash_of(f"{self.name}/{split}/{seed}")).shuffle(mine)
        yield from mine

    def verify(self, problem: Problem, answer: str) -> Verdict:
        letter = chosen(answer)
        if letter is None or letter not in ascii_uppercase[: problem.meta["options"]]:
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if letter == problem.gold else Verdict.WRONG

    def normalise(self, answer: str) -> str:
        letter = chosen(answer)
        return super().normalise(answer) if letter is None else letter

    @cached_property
    def _problems(self) -> list[Problem]:
        try:
            lines = Path(self.file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.file}: cannot be read: {error}") from None
        found = [self._problem(line, f"{self.file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise DataError(
                f"{self.file}: holds no questions; write one JSON object with question, choices, answer a line"
            )
        return found

    def _problem(self, line: str, where: str) -> Problem:
        try:
            row = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise DataError(f"{where}: not a JSON object: {error}") from None
        question, choices = row.get("question", row.get("prompt")), row.get("choices")
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: needs a text under question")
        if not isinstance(choices, list) or not 2 <= len(set(map(str, choices))) == len(choices) <= 26:
            raise DataError(f"{where}: needs 2 to 26 different texts under choices")
        right = _right(row.get("answer"), [str(choice) for choice in choices])
        if right is None:
            raise DataError(
                f"{where}: answer {row.get('answer')!r} is neither letter, number from 0 nor text of a choice"
            )
        if isinstance(row["answer"], int) and row["answer"] in choices and choices[right] != row["answer"]:
            raise DataError(f"{where}: answer {row['answer']} is one choice and the number of another: use text")
        number = hash_of(f"choice/{question}")
        places = list(range(len(choices)))
        random.Random(f"{self.order}/{number}").shuffle(places)
        options = "\n".join(f"{letter}) {choices[place]}" for letter, place in zip(ascii_uppercase, places))
        return Problem(
            prompt=f"{ASKED}\n\n{question.strip()}\n\n{options}",
            gold=ascii_uppercase[places.index(right)],
            meta={"options": len(choices), "chance": 1 / len(choices)},
            id=f"{number:016x}",
        )


def chosen(answer: str) -> str | None:
    """The one letter that is answered."""
    whole = re.fullmatch(LETTER, answer.strip())
    letters = {whole[1]} if whole else {letter.upper() for letter in LINE.findall(answer)}
    return letters.pop() if len(letters) == 1 else None


def _right(answer: Any, choices: list[str]) -> int | None:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    letters = ascii_uppercase[: len(choices)]
    return letters.index(answer) if isinstance(answer, str) and len(answer) == 1 and answer in letters else None
