"""`math:FILE.jsonl`: questions with a mathematical answer, one JSON object a line, judged by math-verify.

A line holds "prompt" (or "problem", "question") and "answer" (or "gold"); a GSM8K answer may keep its "... #### 18".
Numbers, fractions, sets and formulas count as equal when they are equal, not when they are written alike.

Lines are split by hash like any task; with `benchmark = true` the whole file is the test split and nothing may be
trained on. math-verify's own time limits use signals and are switched off: judge in a `VerifierPool`, which kills what
hangs.
"""

import logging
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import msgspec

from sputnik.errors import DataError, MissingPackage, TaskError
from sputnik.tasks.base import Problem, Split, Task, Verdict, hash_of, split_of
from sputnik.tasks.final import boxes

PROMPT_KEYS = ("prompt", "problem", "question")
ANSWER_KEYS = ("answer", "gold")
NOT_BARE = r"(?<!\\)\b[A-Za-z]{2,}\s+[A-Za-z]{2,}|</?[a-z]+>|\\boxed"  # prose, tags, a box that never closes
TWO_NUMBERS = r"[0-9]\s+[0-9]+(?![0-9]*\s*/)"  # math-verify adds them up, as in the mixed number 5 1/2
OPERATION = r".[-+*/^!]|\\(?:frac|sqrt|binom|cdot|times|div|int|sum|prod|lim|log|ln|sin|cos|tan|gcd)(?![a-z])"


@dataclass(frozen=True)
class MathFile(Task):
    """Problems of one JSONL file."""

    file: str
    benchmark: bool = False

    name = "math"
    version = "math-verify 0.9.0"

    @classmethod
    def build(cls, argument: str, options: Mapping[str, Any]) -> Self:
        if not argument:
            raise TaskError("name the file: math:FILE.jsonl")
        task = super().build("", {"file": argument, **options})
        same(
            read(r"\frac12"), read("0.5")
        )  # loads math-verify now: it takes a second that no answer's deadline should pay
        return task

    def generate(self, rng: random.Random) -> Problem:
        return rng.choice(self._problems)

    def stream(self, split: Split, seed: int) -> Iterator[Problem]:
        """The file's problems of one split, each once, in an order of this seed."""
        mine = [problem for problem in self._problems if self.benchmark or split_of(int(problem.id, 16)) == split]
        if self.benchmark and split != "test":
            mine = []
        random.Random(hash_of(f"{self.name}/{split}/{seed}")).shuffle(mine)
        yield from mine

    def verify(self, problem: Problem, answer: str) -> Verdict:
        gold, given = read(problem.gold), read(answer)
        if not gold:
            return Verdict.BAD_GOLD
        if not given:
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if not copied(problem, answer) and same(gold, given) else Verdict.WRONG

    def normalise(self, answer: str) -> str:
        """Without box, dollars, spaces and the like, plain numbers and fractions by their value. Text alone: comparing
        what math-verify reads may take for ever. So equal formulas of other form, as x+1 and 1+x, stay apart."""
        contents = set(boxes(answer)) or {answer}
        return plain(contents.pop()) if len(contents) == 1 else super().normalise(answer)

    @cached_property
    def _problems(self) -> list[Problem]:
        try:
            lines = Path(self.file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.file}: cannot be read: {error}") from None
        found = [_problem(line, f"{self.file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise DataError(f"{self.file}: holds no problems; write one JSON object with prompt and answer a line")
        return found


def _problem(line: str, where: str) -> Problem:
    try:
        row = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise DataError(f"{where}: not a JSON object: {error}") from None
    prompt = next((row[key] for key in PROMPT_KEYS if key in row), None)
    answer = next((row[key] for key in ANSWER_KEYS if key in row), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: needs a text under one of {', '.join(PROMPT_KEYS)}")
    if not isinstance(answer, str | int | float) or not str(answer).strip():
        raise DataError(f"{where}: needs an answer under one of {', '.join(ANSWER_KEYS)}")
    gold = str(answer).rpartition("####")[2].strip()
    return Problem(prompt=prompt, gold=gold, id=f"{hash_of(f'math/{prompt}'):016x}")


def read(text: str) -> list[Any]:
    """What the text means to math-verify: empty if nothing. One box in it is the answer, two different ones are none.

    Without a box the text must be the bare answer. It goes in as LaTeX only: the other readers of math-verify search a
    sentence for its last number, and `eval` it.
    """
    try:
        from math_verify import LatexExtractionConfig, parse
    except ImportError:
        raise MissingPackage("math-verify", "math") from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the missing time limit, which is ours to set
    contents = {content.strip() for content in boxes(text)}
    if not contents and not re.search(NOT_BARE, re.sub(r"\\text *{[^}]*}", "", text)):
        contents = {text.strip().strip("$")}
    if len(contents) != 1 or any(re.search(TWO_NUMBERS, content) for content in contents):
        return []
    boxed = f"\\boxed{{{contents.pop()}}}"
    found: list[Any] = parse(boxed, [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return found


def copied(problem: Problem, answer: str) -> bool:
    """Is this a formula of the question, and the gold answer not written so? "17*24" is equal to what 17*24 is."""
    content = (boxes(answer) or [answer])[0]
    found = re.search(OPERATION, spelt(content)) and spelt(content) in spelt(problem.prompt)
    return bool(found) and plain(content) != plain(problem.gold)


def spelt(text: str) -> str:
    """Without spaces, dollars, sizes and a full stop."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,;:! ]|[$\s]", "", text).removesuffix(".")
    return re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)


def plain(text: str) -> str:
    r"""Formula text in one spelling: "\dfrac{1}{2}", "1/2", "0.50" and "$\frac12$." are all "1/2"."""
    text = spelt(text)
    number = re.sub(r"^([+-]?)\\frac(?:\{([0-9]+)\}|([0-9]))(?:\{([0-9]+)\}|([0-9]))$", r"\1\2\3/\4\5", text)
    if re.fullmatch(r"[+-]?[0-9]{1,20}(\.[0-9]{1,20}|/0{0,9}[1-9][0-9]{0,9})?", number):
        return str(Fraction(number))
    return text


def same(gold: list[Any], given: list[Any]) -> bool:
    """Are two things that were read equal? May run for ever; call it where it can be killed."""
    from math_verify import verify

    return bool(verify(gold, given, timeout_seconds=None))
