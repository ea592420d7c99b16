"""Exercises for beginners of programming: a few steps on a list of integers, in words and in Python.

Our own, made at random from 14 steps and 5 endings with a number of one digit in them: about 500 with one step, tens of
thousands with two. The Python of each step is the only definition of what it means; task `code` (code.py) makes
problems of them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Form = Literal["function", "program"]
Step = tuple[str, str]
STEPS: tuple[Step, ...] = (
    ("keep the numbers above {n}", "[x for x in xs if x > {n}]"),
    ("keep the numbers below {n}", "[x for x in xs if x < {n}]"),
    ("keep the even numbers", "[x for x in xs if x % 2 == 0]"),
    ("keep the odd numbers", "[x for x in xs if x % 2 == 1]"),
    ("drop the multiples of {n}", "[x for x in xs if x % {n}]"),
    ("add {n} to each", "[x + {n} for x in xs]"),
    ("multiply each by {n}", "[x * {n} for x in xs]"),
    ("take each modulo {n}", "[x % {n} for x in xs]"),
    ("square each", "[x * x for x in xs]"),
    ("change each one's sign", "[-x for x in xs]"),
    ("sort them", "sorted(xs)"),
    ("reverse their order", "xs[::-1]"),
    ("drop repeated numbers", "list(dict.fromkeys(xs))"),
    ("keep the first {n}", "xs[:{n}]"),
)
ENDINGS: tuple[Step, ...] = (
    ("the list", "xs"),
    ("the sum", "sum(xs)"),
    ("how many there are", "len(xs)"),
    ("the largest, or 0 if there is none", "max(xs, default=0)"),
    ("the smallest, or 0 if there is none", "min(xs, default=0)"),
)
SIZES = (0, 1, 3, 5, 8, 10, 12, 20)  # of the lists it is tested with
FEWEST_RESULTS = 4  # different ones among the tests: else one constant is nearly right


@dataclass(frozen=True)
class Exercise:
    """Steps and the ending, each in words and in Python over `xs`."""

    steps: Sequence[Step]
    ending: Step

    def prompt(self, form: Form) -> str:
        words = "; ".join(words for words, _ in self.steps)
        if form == "function":
            return f"Write a Python function f(xs) for a list of integers: {words}; return {self.ending[0]}."
        return f"Write a Python program that reads integers from one line: {words}; print {self.ending[0]}."

    def program(self, form: Form) -> str:
        body = [f"xs = {code}" for _, code in self.steps]
        result = self.ending[1]
        if form == "function":
            return "\n    ".join(["def f(xs):", *body, f"return {result}"])
        shown = f"print(*{result})" if result == "xs" else f"print({result})"
        return "\n".join(["xs = [int(x) for x in input().split()]", *body, shown])

    def result(self, xs: list[int]) -> Any:
        for _, code in (*self.steps, self.ending):
            xs = eval(code, {"xs": xs})
        return xs

    def with_slips(self, rng: random.Random, chance: float) -> "Exercise":
        """Every step, with this chance, has the Python of another one."""
        return replace(
            self, steps=[(words, _draw(rng)[1] if rng.random() < chance else code) for words, code in self.steps]
        )


def draw_exercise(rng: random.Random, steps: tuple[int, int]) -> tuple[Exercise, list[list[int]]]:
    """An exercise of that many steps, and lists to test it with."""
    while True:
        exercise = Exercise([_draw(rng) for _ in range(rng.randint(*steps))], rng.choice(ENDINGS))
        inputs = [[rng.randint(-20, 20) for _ in range(size)] for size in SIZES]
        if len({str(exercise.result(xs)) for xs in inputs}) >= FEWEST_RESULTS:
            return exercise, inputs


def _draw(rng: random.Random) -> Step:
    words, code = rng.choice(STEPS)
    number = rng.randint(2, 9)
    return words.format(n=number), code.format(n=number)


def spaced(value: Any) -> str:
    """As a program prints it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
