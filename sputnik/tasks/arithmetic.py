"""Chains of + and - (and *) over small integers: our own family, cheap on tokens, hard enough that thinking pays.

"What is 7+5-3?" has the gold answer "9". The demonstrations are of mixed quality, as the web is: blunt guesses, hasty
working full of slips, careful working, and careful working that is checked and mended. A base model that imitates the
mix scores low, and reinforcement learning can raise it by preferring the careful styles it has already seen. There are
no spaces ("7+5=12"): fewer tokens, and a term in the working is the very tokens of the question.

Left out: division and brackets (see countdown), and answers in words.
"""

import operator
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sputnik.errors import ConfigError
from sputnik.tasks.base import Demonstration, Problem, Task, Verdict
from sputnik.tasks.wordings import wordings

Style = Literal["guess", "sloppy", "steps", "checked"]
STYLES: tuple[Style, ...] = ("guess", "sloppy", "steps", "checked")


def parse_integer(text: str) -> int | None:
    """The integer that `text` consists of, or None; spaces, a full stop, a typographic minus are fine."""
    text = text.strip().replace("\N{MINUS SIGN}", "-").removesuffix(".")
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else None


@dataclass(frozen=True)
class Arithmetic(Task):
    """`terms` is the shortest and longest chain, `largest` the largest number in it, `operators` the signs drawn from.

    `non_negative` keeps every intermediate result at zero or more. `style_weights` mixes the demonstrations; `slip` is
    the chance of a slip in a step of the sloppy style, `careful_slip` that of the steps and checked styles, `miss` that
    of a check overlooking it.
    """

    terms: tuple[int, int] = (3, 6)
    largest: int = 9
    operators: str = "+-"
    non_negative: bool = False
    style_weights: Mapping[Style, float] = field(
        default_factory=lambda: {"guess": 0.45, "sloppy": 0.15, "steps": 0.2, "checked": 0.2}
    )
    slip: float = 0.3
    careful_slip: float = 0.05
    miss: float = 0.2

    name = "arithmetic"

    def __post_init__(self) -> None:
        if not 2 <= self.terms[0] <= self.terms[1] <= 50:
            raise ConfigError(f"arithmetic: terms = {self.terms}: write [shortest, longest], 2 <= shortest <= longest")
        if not self.operators or set(self.operators) - set("+-*"):
            raise ConfigError(f"arithmetic: operators = {self.operators!r}: choose from '+-*'")
        if self.largest < 1:
            raise ConfigError(f"arithmetic: largest = {self.largest}: must be 1 or more")
        if not self.style_weights or min(self.style_weights.values()) < 0 or sum(self.style_weights.values()) <= 0:
            raise ConfigError("arithmetic: style_weights must be 0 or more, and one of them above 0")

    def generate(self, rng: random.Random) -> Problem:
        while True:
            words = [str(rng.randint(1, self.largest))]
            for _ in range(rng.randint(*self.terms) - 1):
                words += [rng.choice(self.operators), str(rng.randint(1, self.largest))]
            lines = working(words)
            if not self.non_negative or all(line.result >= 0 for line in lines):
                return Problem(prompt=f"What is {''.join(words)}?", gold=str(lines[-1].result), meta={"words": words})

    def verify(self, problem: Problem, answer: str) -> Verdict:
        gold, given = parse_integer(problem.gold), parse_integer(answer)
        if gold is None:
            return Verdict.BAD_GOLD
        if given is None:
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if given == gold else Verdict.WRONG

    def normalise(self, answer: str) -> str:
        """The integer: "+7", "07" and "7." are 7."""
        number = parse_integer(answer)
        return super().normalise(answer) if number is None else str(number)

    def wordings(self, problem: Problem) -> tuple[str, ...]:
        return wordings("arithmetic", problem.meta)

    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        rng = random.Random(f"demonstrations/{seed}")
        problems = self.stream("train", seed)
        styles = rng.choices(list(self.style_weights), list(self.style_weights.values()), k=n)
        return [self._demonstration(next(problems), style, rng) for style in styles]

    def _demonstration(self, problem: Problem, style: Style, rng: random.Random) -> Demonstration:
        words: list[str] = problem.meta["words"]
        right = int(problem.gold)
        if style == "guess":
            answer = right + rng.randint(-3, 3)
            thought = "A guess."
        else:
            first = working(words, rng, self.slip if style == "sloppy" else self.careful_slip)
            answer = first[-1].result
            opening = "Quickly." if style == "sloppy" else "Step by step."
            thought = "\n".join([opening, *map(str, first)])
            if style == "checked":
                overlooked = answer != right and rng.random() < self.miss
                second = first if overlooked else working(words)
                answer = second[-1].result
                thought += "\n" + _check(first, second)
        others = self.wordings(problem)
        return Demonstration(problem.prompt, thought, str(answer), style, correct=answer == right, wordings=others)


@dataclass(frozen=True)
class Line:
    """One step of the working; `result` need not be right."""

    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.sign}{self.right}={self.result}"


def working(words: list[str], rng: random.Random | None = None, slip: float = 0.0) -> list[Line]:
    """Reduce "7 + 5 * 3" step by step, products first; with `rng`, each step slips by 1 or 2 with chance `slip`."""
    compute = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    numbers, signs = [int(word) for word in words[::2]], list(words[1::2])
    lines = []
    while signs:
        place = signs.index("*") if "*" in signs else 0
        left, right, sign = numbers[place], numbers.pop(place + 1), signs.pop(place)
        result = compute[sign](left, right)
        if rng is not None and rng.random() < slip:
            result += rng.choice((-2, -1, 1, 2))
        numbers[place] = result
        lines.append(Line(left, sign, right, result))
    return lines


def _check(first: list[Line], second: list[Line]) -> str:
    """The second pass over the working, saying aloud the first place where it differs."""
    thought = []
    found = False
    for before, after in zip(first, second):
        thought.append(str(after))
        if before.result != after.result and not found:
            found = True
            thought.append(f"Wait, not {before.result}.")
    return "Check: " + "\n".join(thought)
