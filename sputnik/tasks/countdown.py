"""Countdown: reach a target from a few numbers with + - * /, the game R1-Zero reproductions are tried on.

"Make 22 from 3, 5, 7 ..." has many right answers; the gold is the expression the problem was built from. Answers are
read by Python's own parser and computed in exact fractions; nothing is ever evaluated as code.
"""

import ast
import operator
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

from sputnik.errors import ConfigError
from sputnik.tasks.base import Demonstration, Problem, Task, Verdict

SIGNS = MappingProxyType({"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv})
NODES = MappingProxyType({ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"})
Style = Literal["guess", "sloppy", "search", "checked"]
LONGEST = 200  # characters of an expression; bounds the depth of the parse as well


@dataclass(frozen=True)
class Countdown(Task):
    """`count` is the fewest and most numbers given, `largest` bounds them and `largest_target` the target.

    With `use_all` each number must be used exactly once, else at most once. `style_weights` mixes the demonstrations.
    """

    count: tuple[int, int] = (3, 4)
    largest: int = 20
    largest_target: int = 100
    operators: str = "+-*/"
    use_all: bool = True
    style_weights: Mapping[Style, float] = field(
        default_factory=lambda: {"guess": 0.45, "sloppy": 0.15, "search": 0.2, "checked": 0.2}
    )

    name = "countdown"

    def __post_init__(self) -> None:
        if not 2 <= self.count[0] <= self.count[1] <= 8:
            raise ConfigError(f"countdown: count = {self.count}: write [fewest, most] with 2 <= fewest <= most <= 8")
        if not set(self.operators) - {"/"} or set(self.operators) - set("+-*/"):
            raise ConfigError(f"countdown: operators = {self.operators!r}: choose from '+-*/', not / alone")
        if self.largest < 2 or self.largest_target < 2 * self.largest:
            raise ConfigError("countdown: largest must be 2 or more, and largest_target at least twice as large")
        if not self.style_weights or min(self.style_weights.values()) < 0 or sum(self.style_weights.values()) <= 0:
            raise ConfigError("countdown: style_weights must be 0 or more, and one of them above 0")

    def generate(self, rng: random.Random) -> Problem:
        while True:
            numbers = [rng.randint(1, self.largest) for _ in range(rng.randint(*self.count))]
            value, gold = _combine(numbers, self.operators, rng)
            if value.denominator == 1 and 1 <= value <= self.largest_target and value not in numbers:
                break
        given = ", ".join(map(str, numbers))
        rule = "each exactly once" if self.use_all else "each at most once"
        signs = " ".join(self.operators)
        prompt = f"Make {value} from {given} with {signs}, {rule}."
        return Problem(prompt=prompt, gold=gold, meta={"numbers": numbers, "target": int(value)})

    def identity(self, problem: Problem) -> str:
        return f"{sorted(problem.meta['numbers'])} -> {problem.meta['target']}"

    def verify(self, problem: Problem, answer: str) -> Verdict:
        numbers, target = problem.meta["numbers"], problem.meta["target"]
        if not self._solves(problem.gold, numbers, target):
            return Verdict.BAD_GOLD
        if parse_expression(answer) is None:
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if self._solves(answer, numbers, target) else Verdict.WRONG

    def normalise(self, answer: str) -> str:
        """The value and the numbers it is made of, on which alone the verdict depends: 3 * (5 + 2) is (2 + 5) * 3."""
        read = self._read(answer)
        return super().normalise(answer) if read is None else f"{read[0]} from {sorted(read[1].elements())}"

    def _solves(self, text: str, numbers: list[int], target: int) -> bool:
        read, given = self._read(text), Counter(numbers)
        if read is None:
            return False
        value, used = read
        return value == target and (used == given if self.use_all else used <= given)

    def _read(self, text: str) -> tuple[Fraction, Counter[int]] | None:
        """Value and numbers of an expression; None without a value, or with signs that are not offered."""
        expression = parse_expression(text)
        if expression is None:
            return None
        signs = {NODES[type(node)] for node in ast.walk(expression) if isinstance(node, ast.operator)}
        used = Counter(int(str(node.value)) for node in ast.walk(expression) if isinstance(node, ast.Constant))
        try:
            return (compute(expression), used) if signs <= {*self.operators} else None
        except ZeroDivisionError:
            return None

    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        """guess: some expression. sloppy: the last of a few tries, right or not. search: tries until one fits.
        checked: the same, and the steps of that one once more."""
        rng = random.Random(f"demonstrations/{seed}")
        problems = self.stream("train", seed)
        styles = rng.choices(list(self.style_weights), list(self.style_weights.values()), k=n)
        return [self._demonstration(next(problems), style, rng) for style in styles]

    def _demonstration(self, problem: Problem, style: Style, rng: random.Random) -> Demonstration:
        numbers, target = problem.meta["numbers"], problem.meta["target"]
        tries = [_combine(numbers, self.operators, rng) for _ in range(rng.randint(1, 4))]
        if style == "guess":
            value, answer = tries[0]
            return Demonstration(problem.prompt, "A guess.", answer, style, correct=value == target)
        if style == "sloppy":
            lines = ["Quickly.", *(f"{text} = {value}" for value, text in tries[:2])]
            value, answer = tries[:2][-1]
            return Demonstration(problem.prompt, "\n".join(lines), answer, style, correct=value == target)
        lines = [f"{text} = {value}, no" for value, text in tries if value != target]
        lines.append(f"{problem.gold} = {target}, yes")
        if style == "checked":
            lines += ["Check:", *working(problem.gold)]
        return Demonstration(problem.prompt, "\n".join(lines), problem.gold, style)


def _combine(numbers: list[int], operators: str, rng: random.Random) -> tuple[Fraction, str]:
    """A random expression over all of `numbers`, with no more brackets than it needs."""
    parts = [(Fraction(number), str(number), 3) for number in numbers]  # value, text, how tightly it binds
    while len(parts) > 1:
        rng.shuffle(parts)
        (a, left, left_binds), (b, right, right_binds) = parts.pop(), parts.pop()
        sign = rng.choice(operators if b != 0 else operators.replace("/", ""))
        binds = 1 if sign in "+-" else 2
        left = f"({left})" if left_binds < binds else left
        right = f"({right})" if right_binds < binds or (right_binds == binds and sign in "-/") else right
        parts.append((SIGNS[sign](a, b), f"{left} {sign} {right}", binds))
    value, text, _ = parts[0]
    return value, text


def parse_expression(text: str) -> ast.expr | None:
    """The syntax tree of an expression of plain integers, + - * / and brackets; None for anything else."""
    text = text.strip().replace("\N{MULTIPLICATION SIGN}", "*").replace("\N{DIVISION SIGN}", "/")
    text = text.replace("\N{MINUS SIGN}", "-")
    if len(text) > LONGEST or not re.fullmatch(r"[0-9+\-*/() ]+", text) or re.search(r"[0-9)] *\(", text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        return None
    allowed = (ast.BinOp, ast.Constant, *NODES)
    return tree if all(isinstance(node, allowed) for node in ast.walk(tree)) else None


def compute(tree: ast.expr) -> Fraction:
    """The exact value of a tree from `parse_expression`; ZeroDivisionError when it has none."""
    if isinstance(tree, ast.Constant):
        return Fraction(str(tree.value))
    assert isinstance(tree, ast.BinOp)
    value: Fraction = SIGNS[NODES[type(tree.op)]](compute(tree.left), compute(tree.right))
    return value


def working(text: str) -> list[str]:
    """An expression from `parse_expression` computed step by step, innermost first: "5 * 3 = 15", "15 + 7 = 22"."""

    def steps(tree: ast.expr) -> Iterator[str]:
        if isinstance(tree, ast.BinOp):
            yield from (*steps(tree.left), *steps(tree.right))
            sides = [
                f"({value})" if value.denominator > 1 else str(value) for value in map(compute, (tree.left, tree.right))
            ]
            yield f"{sides[0]} {NODES[type(tree.op)]} {sides[1]} = {compute(tree)}"

    tree = parse_expression(text)
    return [] if tree is None else list(steps(tree))
