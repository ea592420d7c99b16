"""`ladder:NAME`: easy families of many kinds with worked examples, the rungs a small model climbs while it learns.

    compare    Which number is the largest: 345, 354, 299?       sort      Sort from small to large: 5 3 8 1
    gcd        What is the greatest common divisor of 48 and 36? equation  Solve 3x+4=19 for x.
    reverse    Write "stone" backwards.                          count     How many times is a in "banana"?

The demonstrations are of mixed quality, as in arithmetic.py: guesses, hasty working full of slips, careful working, and
careful working that is checked and mended. Where a family has `spelt`, its steps are small enough for a model that can
do nothing in its head but copy, compare two signs and count on. `load_task("mix", ...)` makes one task of several. Left
out: anything that needs knowledge of the world.
"""

import random
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any, Self, cast

from sputnik.errors import ConfigError, TaskError
from sputnik.tasks.arithmetic import Style, parse_integer
from sputnik.tasks.base import Demonstration, Problem, Task, Verdict
from sputnik.tasks.spelling import CONSONANTS, VOWELS, english_word, syllables
from sputnik.tasks.wordings import wordings

Slips = Callable[[], bool]
"""Does the working go wrong here? Asked once a step."""


@dataclass(frozen=True)
class Step:
    """A line of the working, and what came out of it; it need not be right."""

    text: str
    result: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Rung(Task):
    """What the families share. `slip` is the chance of a slip in a step of the hasty style, `careful_slip` that of the
    careful ones, `miss` that of a check overlooking it."""

    style_weights: Mapping[Style, float] = field(
        default_factory=lambda: {"guess": 0.45, "sloppy": 0.15, "steps": 0.2, "checked": 0.2}
    )
    slip: float = 0.3
    careful_slip: float = 0.05
    miss: float = 0.2

    name = "ladder"

    def __post_init__(self) -> None:
        weights = self.style_weights.values()
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            raise ConfigError(f"{self.name}: style_weights must be 0 or more, and one of them above 0")

    @classmethod
    def build(cls, argument: str, options: Mapping[str, Any]) -> Self:
        if cls is not Rung:
            return super().build(argument, options)
        if argument not in RUNGS:
            raise TaskError(f"ladder has no family {argument!r}; write ladder: and one of {', '.join(RUNGS)}")
        return cast(Self, RUNGS[argument].build("", options))

    @abstractmethod
    def working(self, problem: Problem, slips: Slips) -> list[Step]:
        """The steps to the answer, with what `slips` makes of them."""

    @abstractmethod
    def guess(self, problem: Problem, rng: random.Random) -> str:
        """An answer that took no thought; seldom right."""

    def outcome(self, steps: Sequence[Step]) -> str:
        """The answer that a working leads to."""
        return steps[-1].result

    def verify(self, problem: Problem, answer: str) -> Verdict:
        gold, given = parse_integer(problem.gold), parse_integer(answer)
        if gold is None:
            return Verdict.BAD_GOLD
        if given is None:
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if given == gold else Verdict.WRONG

    def normalise(self, answer: str) -> str:
        number = parse_integer(answer)
        return super().normalise(answer) if number is None else str(number)

    def wordings(self, problem: Problem) -> tuple[str, ...]:
        return wordings(self.name, problem.meta)

    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        rng = random.Random(f"{self.name}/demonstrations/{seed}")
        problems = self.stream("train", seed)
        styles = rng.choices(list(self.style_weights), list(self.style_weights.values()), k=n)
        return [self._demonstration(next(problems), style, rng) for style in styles]

    def _demonstration(self, problem: Problem, style: Style, rng: random.Random) -> Demonstration:
        if style == "guess":
            answer, thought = self.guess(problem, rng), "A guess."
        else:
            chance = self.slip if style == "sloppy" else self.careful_slip
            steps = self.working(problem, lambda: rng.random() < chance)
            lines = ["Quickly." if style == "sloppy" else "Step by step.", *map(str, steps)]
            if style == "checked":
                overlooked = self.outcome(steps) != problem.gold and rng.random() < self.miss
                again = steps if overlooked else self.working(problem, lambda: False)
                lines += _checked(steps, again)
                steps = again
            answer, thought = self.outcome(steps), "\n".join(lines)
        return Demonstration(
            problem.prompt, thought, answer, style, correct=answer == problem.gold, wordings=self.wordings(problem)
        )


def _checked(first: Sequence[Step], again: Sequence[Step]) -> Iterator[str]:
    """The second pass, saying aloud the first place where it differs."""
    differs = next((n for n, (old, new) in enumerate(zip(first, again)) if old != new), None)
    for place, step in enumerate(again):
        yield f"Check: {step}" if place == 0 else str(step)
        if place == differs:
            yield f"Wait, not {first[place].result}."


# --- numbers ---


@dataclass(frozen=True)
class Compare(Rung):
    """`count` is the fewest and most numbers; half of the time they differ in their last digits only. `spelt`: two
    numbers are compared digit by digit."""

    count: tuple[int, int] = (2, 4)
    largest: int = 999
    spelt: bool = False

    name = "ladder:compare"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.count[0] <= self.count[1] <= 9 or self.largest < 20:
            raise ConfigError(f"{self.name}: need 2 <= count <= 9 and largest >= 20")

    def generate(self, rng: random.Random) -> Problem:
        count = rng.randint(*self.count)
        low = rng.randint(1, self.largest - 10) if rng.random() < 0.5 else 1
        high = low + 10 if low > 1 else self.largest
        numbers = rng.sample(range(low, high + 1), count)
        prompt = f"Which number is the largest: {', '.join(map(str, numbers))}?"
        return Problem(prompt=prompt, gold=str(max(numbers)), meta={"numbers": numbers})

    def identity(self, problem: Problem) -> str:
        return str(sorted(problem.meta["numbers"]))

    def working(self, problem: Problem, slips: Slips) -> list[Step]:
        best, *rest = problem.meta["numbers"]
        steps = []
        for number in rest:
            larger = (number > best) != slips()
            text = _digitwise(best, number, larger) if self.spelt else f"{best}{'<' if larger else '>'}{number}"
            best = number if larger else best
            steps.append(Step(f"{text}: {best}", str(best)))
        return steps

    def guess(self, problem: Problem, rng: random.Random) -> str:
        return str(rng.choice(problem.meta["numbers"]))


def _digitwise(a: int, b: int, larger: bool) -> str:
    """327 and 332: "327 332 3=3 2<3", up to the first digits that differ, or to the lengths where those do."""
    pairs = list(zip(str(a), str(b), strict=True)) if len(str(a)) == len(str(b)) else [(len(str(a)), len(str(b)))]
    differs = next((place for place, (x, y) in enumerate(pairs) if x != y), len(pairs) - 1)
    same = [f"{x}={y}" for x, y in pairs[:differs]]
    x, y = pairs[differs]
    return " ".join([str(a), str(b), *same, f"{x}{'<' if larger else '>'}{y}"])


@dataclass(frozen=True)
class Sort(Rung):
    """`count` is the fewest and most numbers, all different."""

    count: tuple[int, int] = (3, 6)
    largest: int = 99

    name = "ladder:sort"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.count[0] <= self.count[1] <= min(20, self.largest):
            raise ConfigError(f"{self.name}: need 2 <= count <= 20 and no more numbers than largest = {self.largest}")

    def generate(self, rng: random.Random) -> Problem:
        numbers = rng.sample(range(1, self.largest + 1), rng.randint(*self.count))
        gold = " ".join(map(str, sorted(numbers)))
        prompt = f"Sort from small to large: {' '.join(map(str, numbers))}"
        return Problem(prompt=prompt, gold=gold, meta={"numbers": numbers})

    def identity(self, problem: Problem) -> str:
        return problem.gold

    def working(self, problem: Problem, slips: Slips) -> list[Step]:
        left, steps = list(problem.meta["numbers"]), []
        while left:
            taken = sorted(left)[1 if slips() and len(left) > 1 else 0]
            steps.append(Step(f"{' '.join(map(str, left))}: {taken}", str(taken)))
            left.remove(taken)
        return steps

    def outcome(self, steps: Sequence[Step]) -> str:
        return " ".join(step.result for step in steps)

    def guess(self, problem: Problem, rng: random.Random) -> str:
        numbers = list(problem.meta["numbers"])
        rng.shuffle(numbers)
        return " ".join(map(str, numbers))

    def verify(self, problem: Problem, answer: str) -> Verdict:
        given = _numbers(answer)
        if given is None:
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if given == _numbers(problem.gold) else Verdict.WRONG

    def normalise(self, answer: str) -> str:
        numbers = _numbers(answer)
        return super().normalise(answer) if numbers is None else " ".join(map(str, numbers))


def _numbers(text: str) -> list[int] | None:
    """Integers with spaces or commas between, and nothing else."""
    text = text.strip().removesuffix(".")
    return [int(n) for n in re.findall("[0-9]+", text)] if re.fullmatch(r"[0-9]{1,9}(,? +[0-9]{1,9})*", text) else None


@dataclass(frozen=True)
class Divisor(Rung):
    """Both numbers are at most `largest`; the working is Euclid's. `spelt`: multiple and remainder are a step each."""

    largest: int = 200
    spelt: bool = False

    name = "ladder:gcd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.largest < 20:
            raise ConfigError(f"{self.name}: largest = {self.largest}: set it to 20 or more")

    def generate(self, rng: random.Random) -> Problem:
        shared = rng.randint(2, max(3, self.largest // 6))
        a, b = rng.sample(range(1, self.largest // shared + 1), 2)
        prompt = f"What is the greatest common divisor of {shared * a} and {shared * b}?"
        return Problem(prompt=prompt, gold=str(gcd(shared * a, shared * b)), meta={"numbers": [shared * a, shared * b]})

    def identity(self, problem: Problem) -> str:
        return str(sorted(problem.meta["numbers"]))

    def working(self, problem: Problem, slips: Slips) -> list[Step]:
        b, a = sorted(problem.meta["numbers"])
        steps = []
        while b:
            times, rest = divmod(a, b)
            if slips():
                rest = (rest + 1) % b
            if self.spelt:
                steps.append(Step(f"{times}*{b}={times * b}", str(times * b)))
                steps.append(Step(f"{a}-{times * b}={rest}", str(rest)))
            else:
                steps.append(Step(f"{a}={times}*{b}+{rest}", str(rest)))
            a, b = b, rest
        return [*steps, Step(f"so {a}", str(a))]

    def guess(self, problem: Problem, rng: random.Random) -> str:
        return str(rng.randint(1, min(problem.meta["numbers"])))


@dataclass(frozen=True)
class Equation(Rung):
    """ax+b=c or ax-b=c, with a whole solution of at most `largest`."""

    largest: int = 20

    name = "ladder:equation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.largest < 5:
            raise ConfigError(f"{self.name}: largest = {self.largest}: set it to 5 or more")

    def generate(self, rng: random.Random) -> Problem:
        x, a, b, sign = rng.randint(1, self.largest), rng.randint(2, 9), rng.randint(1, 20), rng.choice("+-")
        c = a * x + (b if sign == "+" else -b)
        return Problem(prompt=f"Solve {a}x{sign}{b}={c} for x.", gold=str(x), meta={"parts": [a, sign, b, c]})

    def working(self, problem: Problem, slips: Slips) -> list[Step]:
        a, sign, b, c = problem.meta["parts"]
        back = "-" if sign == "+" else "+"
        product = c - b if sign == "+" else c + b
        product += slips()
        x = product // a + slips()
        return [Step(f"{a}x={c}{back}{b}={product}", str(product)), Step(f"x={product}/{a}={x}", str(x))]

    def guess(self, problem: Problem, rng: random.Random) -> str:
        return str(int(problem.gold) + rng.randint(-3, 3))


# --- letters ---


@dataclass(frozen=True)
class Letters(Rung):
    """`letters` is the shortest and longest word; words are made up of syllables, or `english`."""

    letters: tuple[int, int] = (3, 7)
    english: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.letters[0] <= self.letters[1] <= 30:
            raise ConfigError(f"{self.name}: letters = {self.letters}: write [shortest, longest], 2 to 30")

    def word(self, rng: random.Random, consonants: str = CONSONANTS, vowels: str = VOWELS) -> str:
        if self.english:
            return english_word(rng, *self.letters)
        return syllables(rng, rng.randint(*self.letters), consonants, vowels)


@dataclass(frozen=True)
class Reverse(Letters):
    """A slip swaps the first two letters of what it has."""

    name = "ladder:reverse"

    def generate(self, rng: random.Random) -> Problem:
        word = self.word(rng)
        return Problem(prompt=f'Write "{word}" backwards.', gold=word[::-1], meta={"word": word})

    def working(self, problem: Problem, slips: Slips) -> list[Step]:
        spelled = problem.meta["word"]
        if slips():
            spelled = spelled[1] + spelled[0] + spelled[2:]
        turned = spelled[::-1]
        if slips():
            turned = turned[1] + turned[0] + turned[2:]
        return [Step(" ".join(spelled), spelled), Step(" ".join(turned), turned)]

    def guess(self, problem: Problem, rng: random.Random) -> str:
        return "".join(rng.sample(problem.meta["word"], len(problem.meta["word"])))

    def verify(self, problem: Problem, answer: str) -> Verdict:
        given = self.normalise(answer)
        if not re.fullmatch("[a-z]+", given):
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if given == problem.gold else Verdict.WRONG

    def normalise(self, answer: str) -> str:
        """In small letters, without a full stop or quotes around it."""
        return answer.strip().removesuffix(".").strip('"').lower()

    def conclude(self, problem: Problem, answer: str) -> str:
        """In quotes, as the question has its word: its tokens are not those of a word after a space."""
        return super().conclude(problem, f'"{self.normalise(answer)}"')


@dataclass(frozen=True)
class Count(Letters):
    """Of one letter, in words of few different ones. `spelt`: each step has its letter beside the one sought."""

    letters: tuple[int, int] = (4, 9)
    spelt: bool = False

    name = "ladder:count"

    def generate(self, rng: random.Random) -> Problem:
        consonants, vowels = "".join(rng.sample(CONSONANTS, 2)), "".join(rng.sample(VOWELS, 2))
        word = self.word(rng, consonants, vowels)
        letter = rng.choice(word if self.english else consonants + vowels)
        prompt = f'How many times is {letter} in "{word}"?'
        return Problem(prompt=prompt, gold=str(word.count(letter)), meta={"word": word, "letter": letter})

    def working(self, problem: Problem, slips: Slips) -> list[Step]:
        sought, count, steps = problem.meta["letter"], 0, []
        for letter in problem.meta["word"]:
            found = (letter == sought) != slips()
            count += found
            seen = f"{letter}{'=' if found else '-'}{sought}" if self.spelt else letter
            steps.append(Step(f"{seen} {count}", str(count)))
        return steps

    def guess(self, problem: Problem, rng: random.Random) -> str:
        return str(rng.randint(0, 3))


RUNGS: Mapping[str, type[Rung]] = {
    "compare": Compare, "sort": Sort, "gcd": Divisor, "equation": Equation, "reverse": Reverse, "count": Count,
}  # fmt: skip
