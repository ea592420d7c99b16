"""Sums thought about in English, in Chinese, or in both at once: what a base model has read is a mixture.

A task of one's own (docs/tasks.md) for recipes/findings/pipeline.toml. The working is the same and equally careful in
all three, so nothing but the reader cares about the language; answers are plain numbers, and guesses abound.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from sputnik.tasks.arithmetic import Arithmetic, working
from sputnik.tasks.base import Demonstration

OPENINGS = {"english": "Step by step.", "chinese": "一步一步。", "mixed": "Step 一步。"}
FIRST = {"english": "First", "chinese": "先"}
THEN = {"english": "then", "chinese": "再"}


@dataclass(frozen=True)
class Tongues(Arithmetic):
    """Options as of `arithmetic`; `mix` weighs the styles of the demonstrations."""

    mix: Mapping[str, float] = field(
        default_factory=lambda: {"guess": 0.4, "english": 0.2, "chinese": 0.1, "mixed": 0.3}
    )

    name = "tongues"

    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        rng = random.Random(f"demonstrations/{seed}")
        problems = self.stream("train", seed)
        found = []
        for style in rng.choices(list(self.mix), list(self.mix.values()), k=n):
            problem = next(problems)
            right = int(problem.gold)
            if style == "guess":
                answer, thought = right + rng.randint(-3, 3), "A guess."
            else:
                lines = working(problem.meta["words"], rng, self.careful_slip)
                words = [FIRST, *[THEN] * (len(lines) - 1)]
                tongues = [rng.choice(list(FIRST)) if style == "mixed" else style for _ in lines]
                said = [f"{word[tongue]}:{line}" for word, tongue, line in zip(words, tongues, lines, strict=True)]
                answer, thought = lines[-1].result, "\n".join([OPENINGS[style], *said])
            found.append(Demonstration(problem.prompt, thought, str(answer), style, correct=answer == right))
        return found
