"""A task so easy that a model of seconds gets some of it right: for recipes that need right answers on the way."""

import random

from sputnik.tasks.base import Demonstration, Problem, Task

NAMES = ("red", "blue", "green", "white")
THINGS = ("car", "house", "door", "coat", "bird", "boat", "cup", "hat", "rose", "shoe", "wall", "book")


class Colours(Task):
    name = "colours"
    tolerates = ("options",)

    def generate(self, rng: random.Random) -> Problem:
        colour, thing, other = rng.choice(NAMES), rng.choice(THINGS), rng.choice(THINGS)
        return Problem(prompt=f"The {thing} by the {other} is {colour}. What is the {thing}?", gold=colour)

    def verify(self, problem: Problem, answer: str) -> bool:
        return answer.strip().rstrip(".") == problem.gold

    def damage(self, gold: str) -> str:
        return NAMES[NAMES.index(gold) - 1]

    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        problems = (problem for _, problem in zip(range(n), self.stream("train", seed), strict=False))
        return [Demonstration(each.prompt, f"It is {each.gold}.", each.gold, style="plain") for each in problems]
