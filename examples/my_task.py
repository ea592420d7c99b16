"""A task of your own in one file: write a number as a Roman numeral. Name this file in a recipe to train on it.

`generate` makes one random problem, `verify` judges an answer; splits, seeds and the self-check come from `Task`.
"""

import random
from dataclasses import dataclass

from sputnik.tasks.base import Problem, Task, Verdict

NUMERALS = (
    *((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L")),
    *((40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")),
)


def roman(number: int) -> str:
    text = ""
    for value, letters in NUMERALS:
        text += letters * (number // value)
        number %= value
    return text


@dataclass(frozen=True)
class Roman(Task):
    largest: int = 3999  # a field is an option: `options = { largest = 100 }` in the recipe

    name = "roman"

    def generate(self, rng: random.Random) -> Problem:
        number = rng.randint(1, self.largest)
        return Problem(prompt=f"Write {number} as a Roman numeral.", gold=roman(number))

    def verify(self, problem: Problem, answer: str) -> Verdict:
        answer = answer.strip()
        if not answer or set(answer) - set("MDCLXVI"):
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if answer == problem.gold else Verdict.WRONG
