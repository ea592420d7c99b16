"""`gym:NAME`: the problem families of reasoning-gym, with their own scorers, behind our splits and verdicts.

Options are the fields of the family's own configuration, and `size`, how many problems it holds. A problem is stored as
its index and made again by the verifier, which refuses it as ERROR should it come out different. Only a full score is
CORRECT: partial credit such as the 0.01 of countdown teaches a model to collect crumbs.

Some scorers are lenient, and the self-check refuses those; `tolerates = ["several"]` takes one knowingly.

Left out: families that cannot be trusted, listed in `REFUSED` with the reason. `gsm_symbolic` is made from GSM8K test
questions: do not train on it and then report GSM8K.
"""

import random
import re
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, Self

from sputnik.config import check_keys
from sputnik.errors import ConfigError, MissingPackage, TaskError
from sputnik.tasks.base import Problem, Task, Verdict

HASH_ORDER = "it makes different problems in every process (it depends on string hashing)"
NO_GOLD = "it stores no gold answer, so its scorer cannot be checked"
REFUSED = (
    ("game_of_life_halting", "its scorer pays any text"),
    ("coin_flip", 'its scorer pays the constant answer "0"'),
    ("complex_arithmetic", 'its scorer pays the constant answer "nan"'),
    ("puzzle24", 'its scorer pays the constant answer "1*2*3*4": it does not look which numbers were given'),
    ("intermediate_integration", "it stores integrals that are not worked out as gold answers, and pays them"),
    ("boxnet", NO_GOLD),
    ("graph_color", NO_GOLD),
    ("propositional_logic", NO_GOLD),
    ("rubiks_cube", NO_GOLD),
    ("rush_hour", NO_GOLD),
    ("isomorphic_strings", HASH_ORDER),
    ("knight_swap", HASH_ORDER),
    ("polynomial_multiplication", HASH_ORDER),
    ("ransom_note", HASH_ORDER),
    ("composite", "it needs a list of other families; name one of those"),
)
LISTS = r"[A-Z0-9_\s,\[\]'\"-]*"
SUMS = r"(?!.*\*\*)[0-9+\-*/() ]*"
WORD = "(?:sin|cos|tan|asin|acos|atan|sinh|cosh|tanh|exp|log|sqrt|[aA]bs|pi|[A-Za-z])(?![A-Za-z0-9])"
FORMULAS = rf"(?:{WORD}|[-0-9+*/^() ]|(?<=[0-9])\.(?=[0-9]))*"
EVALUATED = MappingProxyType(
    {
        "binary_matrix": LISTS, "n_queens": LISTS, "spiral_matrix": LISTS, "string_insertion": LISTS,
        "countdown": SUMS, "simple_integration": FORMULAS,
    }
)  # fmt: skip
"""Families whose scorers hand the answer to `eval`, plainly or by sympy, and the answers with which that does no harm:
a list without calls, lower-case letters (`for`, `entry`) or dots; numbers; functions of mathematics."""
FULL_SCORE = 0.999
SIZE = 100_000
TRIES = 20


class Gym(Task):
    """One family of reasoning-gym."""

    version = "reasoning-gym"

    def __init__(self, dataset: Any, name: str, version: str, tolerates: tuple[str, ...]) -> None:
        self.name = f"gym:{name}"
        self.version = version
        self.tolerates = tolerates
        self._dataset = dataset
        self._entry = lru_cache(maxsize=256)(self._make)  # the answers of a group share their problem

    @classmethod
    def build(cls, argument: str, options: Mapping[str, Any]) -> Self:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise MissingPackage("reasoning-gym", "gym") from None
        reason = dict(REFUSED).get(argument)
        if reason:
            raise TaskError(f"gym:{argument} is refused: {reason}")
        if argument not in DATASETS:
            raise TaskError(f"gym has no family {argument!r}; known: {', '.join(sorted(DATASETS))}")
        known = [name for name in DATASETS[argument][1].__dataclass_fields__ if name != "seed"]
        check_keys(options, [*known, "tolerates"], f"task 'gym:{argument}'")
        settings = {"size": SIZE} | {key: options[key] for key in options if key != "tolerates"} | {"seed": 0}
        try:
            dataset = reasoning_gym.create_dataset(argument, **settings)
        except (AssertionError, ValueError, TypeError) as error:
            raise ConfigError(f"task 'gym:{argument}': {error}") from None
        return cls(dataset, argument, f"reasoning-gym {version('reasoning-gym')}", tuple(options.get("tolerates", ())))

    def _make(self, index: int) -> tuple[dict[str, Any], bool]:
        """The entry at `index`, and whether its own gold answer earns the full score."""
        entry: dict[str, Any] = self._dataset[index]
        return entry, self._dataset.score_answer(answer=entry["answer"], entry=entry) >= FULL_SCORE

    def generate(self, rng: random.Random) -> Problem:
        for tries_left in reversed(range(TRIES)):
            index = rng.randrange(self._dataset.size)
            try:
                entry, _ = self._entry(index)
                break
            except (RuntimeError, ValueError):  # e.g. maze finds no path now and then
                if tries_left == 0:
                    raise
        return Problem(prompt=entry["question"], gold=entry["answer"], meta={"index": index})

    def damage(self, gold: str) -> str:
        """The first digit changed, for many scorers round, or forgive a unit at the end; else the default."""
        digit = re.search("[0-9]", gold)
        if digit is None:
            return super().damage(gold)
        return gold[: digit.start()] + str((int(digit.group()) + 1) % 10) + gold[digit.end() :]

    def normalise(self, answer: str) -> str:
        """A number by its value; else the text up to case, a full stop and runs of spaces, its lines kept."""
        text = "\n".join(" ".join(line.split()) for line in answer.strip().splitlines()).removesuffix(".").casefold()
        return str(Fraction(text)) if re.fullmatch(r"[+-]?[0-9]{1,20}(\.[0-9]{1,20})?", text) else text

    def verify(self, problem: Problem, answer: str) -> Verdict:
        entry, gold_pays = self._entry(problem.meta["index"])
        if entry["question"] != problem.prompt or entry["answer"] != problem.gold:
            raise TaskError(f"{self.name}: problem {problem.meta['index']} came out different when made again")
        if not gold_pays:
            return Verdict.BAD_GOLD
        answer = answer.strip()
        if not answer or any(c.isdecimal() and not c.isascii() for c in answer):
            return Verdict.UNPARSEABLE
        if not re.fullmatch(EVALUATED.get(self.name.removeprefix("gym:"), ".*"), answer, re.DOTALL):
            return Verdict.UNPARSEABLE
        try:
            score = self._dataset.score_answer(answer=answer, entry=entry)
        except Exception:  # noqa: BLE001 - it has read the gold answer, so it is this text it cannot read
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if score >= FULL_SCORE else Verdict.WRONG
