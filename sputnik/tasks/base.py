"""What a task is: random problems with a gold answer, and a verifier that says why an answer earns nothing.

A task needs `name`, `generate(rng)` for one random problem and `verify(problem, answer)`. Splits, seeding and
distinctness come from here: a problem belongs to the split its question hashes to, so no question of train is ever met
in validation or test, whatever the seed. `load_task` finds a task by name or in a file; `self_check` tries it out.

Left out: models, prompts' chat template, rewards. `verify` sees only the final answer, never the thought.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import random
import re
import sys
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from sputnik.config import check_keys, from_dict
from sputnik.errors import SputnikError, TaskError
from sputnik.tasks.final import final_answer as final_answer

Split = Literal["train", "validation", "test"]

SHIPPED = (
    ("arithmetic", "sputnik.tasks.arithmetic:Arithmetic"),
    ("countdown", "sputnik.tasks.countdown:Countdown"),
    ("gym", "sputnik.tasks.gym:Gym"),
    ("ladder", "sputnik.tasks.ladder:Rung"),
    ("math", "sputnik.tasks.math:MathFile"),
    ("mix", "sputnik.tasks.mixture:Mixture"),
    ("choice", "sputnik.tasks.choice:ChoiceFile"),
    ("code", "sputnik.tasks.code:Code"),
)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # what no answer needs and some parsers step over
REJECTIONS = 2000  # draws in a row that bring nothing new before a family counts as dry


class Verdict(StrEnum):
    """Why an answer earned its reward. Only CORRECT pays; BAD_GOLD and ERROR are our fault and leave the group."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"
    BAD_GOLD = "bad_gold"
    ERROR = "error"


@dataclass(frozen=True)
class Judgement:
    """A verdict and what lies behind it, e.g. the exception of a broken verifier; `detail` is mostly empty."""

    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question. `gold` is an answer that `verify` accepts; `meta` is JSON and travels to the verifier.

    `id` is filled in by `Task.problems`; it names the question, so it is the same in every run and every split seed.
    """

    prompt: str
    gold: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class Demonstration:
    """A worked example for base training; deliberately not always right, as the web is not. `style` is its quality."""

    prompt: str
    thinking: str | None
    answer: str
    style: str
    correct: bool = True
    wordings: Sequence[str] = ()  # other prompts that ask the same


Verify = Callable[[Sequence[tuple[Problem, str]]], list[Judgement]]


class Task(ABC):
    """A family of problems. Subclass it in one file and name that file in a recipe; see docs/tasks.md.

    Options of a recipe become the fields of the class when it is a dataclass. `tolerates` names the attacks of
    `attacks` that this task pays on purpose, e.g. ("sentence",) when the answer may stand in a sentence.
    """

    name: str = ""
    version: str = "1"
    tolerates: tuple[str, ...] = ()
    longest_answer: int = 10_000  # characters; more is UNPARSEABLE before `verify` sees it

    @abstractmethod
    def generate(self, rng: random.Random) -> Problem:
        """One random problem, drawn from `rng` alone."""

    @abstractmethod
    def verify(self, problem: Problem, answer: str) -> Verdict | bool:
        """Judge the final answer. Pure, and must not raise whatever the text: what it cannot read is UNPARSEABLE."""

    def identity(self, problem: Problem) -> str:
        """What makes two problems the same question; the split is a hash of it."""
        return problem.prompt

    def damage(self, gold: str) -> str:
        """A wrong answer that looks like the gold: last digit or letter changed. For the self-check."""
        for place in range(len(gold) - 1, -1, -1):
            if gold[place].isalnum():
                other = {"9": "8", "z": "y", "Z": "Y"}.get(gold[place], chr(ord(gold[place]) + 1))
                return gold[:place] + other + gold[place + 1 :]
        return gold + "?"

    def normalise(self, answer: str) -> str:
        """The form in which answers are compared by majority vote (cons@k): what is equal must become the same text.
        Asked about answers that `verify` could read, in the evaluating process: quick, and without raising."""
        return answer.strip()

    def conclude(self, problem: Problem, answer: str) -> str:
        """A plain sentence with a bare answer, for models to learn to say; judged as the answer itself would be."""
        sentence = f"The answer is {answer}."
        return sentence if final_answer(sentence) == answer else answer

    def wordings(self, problem: Problem) -> Sequence[str]:
        """Other prompts that ask the same, for examples (train/traces.py); the family's own way is not among them."""
        return ()

    def self_checks(self, thinking: str) -> bool:
        """Does this thought look back at itself? Counted, never rewarded."""
        return re.search(r"\b(re-?check|double-check|check|wait|verify)", thinking, re.IGNORECASE) is not None

    def task_of(self, problem: Problem) -> "Task":
        """The task that judges `problem`: this one, unless it is a mixture of several (mixture.py)."""
        return self

    def tasks_within(self) -> "Sequence[Task]":
        """What the self-check tries one by one."""
        return (self,)

    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        """Worked examples from the train split; problems may repeat when the family is small."""
        raise TaskError(f"task {self.name!r} has no demonstrations; choose another task for base training")

    def stream(self, split: Split, seed: int) -> Iterator[Problem]:
        """Random problems of one split, perhaps repeating, each with its id; ends only if the split seems empty."""
        rng = random.Random(hash_of(f"{self.name}/{split}/{seed}"))
        misses = 0
        while misses < REJECTIONS:
            try:
                problem = self.generate(rng)
            except SputnikError:
                raise
            except Exception as error:
                raise broken_task(error, f"{type(self).__name__}.generate", type(self)) from error
            if not isinstance(problem, Problem):
                raise TaskError(f"task {self.name!r}: generate must return a Problem, not {type(problem).__name__}")
            number = hash_of(f"{self.name}/{self.identity(problem)}")
            if split_of(number) == split:
                misses = 0
                yield dataclasses.replace(problem, id=f"{number:016x}")
            else:
                misses += 1

    def problems(self, split: Split, n: int, seed: int = 0) -> list[Problem]:
        """`n` distinct problems of `split`; the same call gives the same list. TaskError if the family runs dry."""
        found: dict[str, Problem] = {}
        repeats = 0
        for problem in self.stream(split, seed) if n > 0 else ():
            if problem.id not in found:
                found[problem.id] = problem
                repeats = 0
            repeats += 1
            if len(found) == n or repeats > REJECTIONS:
                break
        if len(found) < n:
            raise TaskError(f"task {self.name!r} has only {len(found)} distinct {split} problems; {n} were asked for")
        return list(found.values())

    @classmethod
    def build(cls, argument: str, options: Mapping[str, Any]) -> Self:
        """Make the task from what stands after the colon of its spec, and its options; override where these differ."""
        if argument:
            raise TaskError(f"task {cls.name!r} takes no argument, but was given {argument!r}")
        if dataclasses.is_dataclass(cls):
            return from_dict(cls, options, f"task {cls.name!r}")
        check_keys(options, [], f"task {cls.name!r}")
        return cls()


def hash_of(text: str) -> int:
    """64 bits that are the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big")


def split_of(number: int) -> Split:
    """70 % of the questions are for training, 15 % for validation, 15 % for the final test."""
    share = number % 100
    return "train" if share < 70 else "validation" if share < 85 else "test"


def judge(task: Task, problem: Problem, answer: str) -> Judgement:
    """Run the verifier once, in this process; whatever it raises becomes an ERROR that names file and line.

    The verifier sees the bare answer, also where it stands in a sentence or a box; a gold answer it sees as it is."""
    task = task.task_of(problem)
    cls = type(task)
    if len(answer) > task.longest_answer:
        return Judgement(Verdict.UNPARSEABLE, f"longer than {task.longest_answer} characters")
    if CONTROL.search(answer):
        return Judgement(Verdict.UNPARSEABLE, "control characters")
    try:
        verdict = task.verify(problem, answer if answer == problem.gold else final_answer(answer))
    except Exception as error:  # noqa: BLE001 - the verifier may be a user's; what it raises becomes a counted verdict
        return Judgement(Verdict.ERROR, str(broken_task(error, f"{cls.__name__}.verify", cls)))
    if isinstance(verdict, Verdict):
        return Judgement(verdict)
    if isinstance(verdict, bool):
        return Judgement(Verdict.CORRECT if verdict else Verdict.WRONG)
    return Judgement(Verdict.ERROR, f"{cls.__name__}.verify must return a Verdict or a bool, not {verdict!r:.80}")


def normalised(task: Task, problem: Problem, answer: str) -> str:
    """The answer to `problem` as its task's `normalise` writes it, taken out of a sentence or a box; an exception, or
    what is no text, becomes a TaskError that names the place."""
    task = task.task_of(problem)
    what = f"{type(task).__name__}.normalise"
    try:
        text = task.normalise(final_answer(answer))
    except Exception as error:
        raise broken_task(error, what, type(task)) from error
    if not isinstance(text, str):
        raise TaskError(f"task {task.name!r}: {what} must return a text, not {type(text).__name__}")
    return text


def load_task(spec: str, options: Mapping[str, Any] | None = None) -> Task:
    """Find a task: "arithmetic", "gym:chain_sum", "math:FILE.jsonl", "path/my_task.py" or "path/my_task.py:Class"."""
    name, _, argument = spec.partition(":")
    if name.endswith(".py"):
        cls, argument = _class_from_file(Path(name), argument), ""
    else:
        homes = dict(SHIPPED)
        if name not in homes:
            raise TaskError(f"unknown task {name!r}; known: {', '.join(homes)}, or the path of a .py file of your own")
        module, _, class_name = homes[name].partition(":")
        cls = getattr(importlib.import_module(module), class_name)
    try:
        return cls.build(argument, options or {})
    except SputnikError:
        raise
    except Exception as error:
        raise broken_task(error, cls.__name__, cls) from error


def _class_from_file(path: Path, class_name: str) -> type[Task]:
    if not path.is_file():
        raise TaskError(f"{path}: no such task file")
    module_name = f"sputnik_user_task_{hash_of(str(path.resolve())):016x}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec and module_spec.loader  # the name ends in .py
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses look their own module up by name
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise broken_task(error, "import", home=str(path)) from error
    own = {
        value.__name__: value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module_name
    }
    if class_name and class_name not in own:
        raise TaskError(f"{path}: no Task subclass {class_name!r}; found: {', '.join(own) or 'none'}")
    if not class_name and len(own) != 1:
        raise TaskError(f"{path}: name one of its Task subclasses as {path}:Class; found: {', '.join(own) or 'none'}")
    cls = own[class_name] if class_name else next(iter(own.values()))
    if not cls.name:
        raise TaskError(f"{path}: give class {cls.__name__} a `name`")
    return cls


def broken_task(error: Exception, what: str, cls: type[Task] | None = None, home: str | None = None) -> TaskError:
    """One line for an exception out of a task's own code: file and line, what was called, what it raised.

    Of the frames one in `home`, or the file of `cls`, is named: a user wants their line, not the library's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    home = sys.modules[cls.__module__].__file__ if cls else home
    frames = [frame for frame in frames if frame.filename == home] or frames
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else home or "?"
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}:{error.lineno}"
    reason = " ".join(str(error).split())[:300]
    return TaskError(f"{place}: {what} raised {type(error).__name__}: {reason}")


def _some_problems(task: Task, n: int) -> list[Problem]:
    """Up to `n` problems from whatever splits the task has, as a worker would receive them (meta through JSON)."""
    streams = [[task.stream(split, seed=0) for split in ("train", "validation", "test")] for _ in range(2)]
    found, again = (list(islice(chain.from_iterable(s), count)) for s, count in zip(streams, (n, 8)))
    if not found:
        raise TaskError(f"task {task.name!r} has no problems at all")
    if any(one.id != other.id for one, other in zip(found, again)):
        raise TaskError(f"task {task.name!r}: generate must draw from rng alone: a seed gave other problems")
    try:
        return msgspec.json.decode(msgspec.json.encode(found), type=list[Problem])
    except (TypeError, UnicodeEncodeError, msgspec.MsgspecError) as error:
        raise TaskError(f"task {task.name!r}: prompt and gold must be texts, meta must be JSON: {error}") from None


def attacks(problem: Problem, wrong: str, golds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Answers that know nothing, or hedge, and so must earn nothing: (name, text)."""
    gold = problem.gold
    yield from (("empty", ""), ("whitespace", " \n\t "), ("prompt", problem.prompt), ("inf", "inf"), ("nan", "nan"))
    if len(set(golds)) > 1:
        yield "options", ", ".join(sorted(set(golds)))
    yield from (("several", f"{gold} {wrong}"), ("several", f"{wrong}\n{gold}"), ("several", f"{wrong} or {gold}"))
    yield from (("tags", f"<answer>{gold}</answer>" * 2), ("boxes", f"\\boxed{{{wrong}}} \\boxed{{{gold}}}"))
    yield from (("boxes", f"\\boxed{{{wrong} \\boxed{{{gold}}}}}"), ("boxes", f"\\boxed{{\\boxed{{{gold}}}}}"))
    yield from (("long", f"{gold} " * (1_000_000 // (len(gold) + 1))), ("long", gold + "1" * 1_000_000))
    yield from (("control", f"\x00{gold}"), ("control", f"{gold}\x08\x1b[2J"))
    yield "unicode_digits", gold.translate({ord("0") + digit: chr(0x660 + digit) for digit in range(10)})
    yield "sentence", f"The answer is {gold}, I think."
    for claim in (f"{gold}. The answer is {wrong}", f"{wrong}. The answer is {gold}", f"{gold}. Or {wrong}"):
        yield "sentences", f"The answer is {claim}."
    yield from (("hedge", f"The answer is {gold} or {wrong}."), ("hedge", f"The answer is not {gold}."))


def self_check(task: Task, n: int = 32, verify: Verify | None = None) -> None:
    """Refuse a task whose verifier pays the wrong thing, before a run learns from it.

    On `n` problems the gold must be CORRECT, the damaged gold must not, and no gold may be right for all of them; on
    four every attack must earn nothing, and nothing may raise. A pool's `verify` keeps one that hangs from hanging you.
    """
    verify = verify or (lambda items: [judge(task, problem, answer) for problem, answer in items])
    for part in task.tasks_within():
        _check_one(part, _some_problems(part, n), verify)


def _check_one(task: Task, problems: Sequence[Problem], verify: Verify) -> None:
    task = task.task_of(problems[0])
    golds, damaged = zip(*((problem.gold, task.damage(problem.gold)) for problem in problems))
    for problem, judgement in zip(problems, verify(list(zip(problems, golds)))):
        if judgement.verdict != Verdict.CORRECT:
            raise _refused(task, problem, "the gold answer", problem.gold, judgement)
        normalised(task, problem, problem.gold)
    tries = [(problem, "the damaged gold answer", wrong) for problem, wrong in zip(problems, damaged)]
    for problem, wrong in zip(problems[:4], damaged):
        for name, text in attacks(problem, wrong, golds):
            if name not in task.tolerates and text.strip().lower() != problem.gold.strip().lower():
                tries.append((problem, f"attack {name!r}", text))
    for (problem, what, text), judgement in zip(tries, verify([(problem, text) for problem, _, text in tries])):
        if judgement.verdict not in (Verdict.WRONG, Verdict.UNPARSEABLE):
            raise _refused(task, problem, what, text, judgement)
    for constant in golds[:2]:
        others = [(problem, constant) for problem in problems if problem.gold != constant][:8]
        if len(others) > 3 and all(judgement.verdict is Verdict.CORRECT for judgement in verify(others)):
            raise _refused(task, others[0][0], "an answer to every question,", constant, Judgement(Verdict.CORRECT))


def _refused(task: Task, problem: Problem, what: str, text: str, judgement: Judgement) -> TaskError:
    detail = f" ({judgement.detail})" if judgement.detail else ""
    return TaskError(
        f"task {task.name!r}: verify gives {judgement.verdict.upper()} to {what} {text[:60]!r} of problem "
        f"{problem.prompt[:80]!r}{detail}; mend verify, or see docs/tasks.md on self-checks"
    )


@dataclass(frozen=True)
class BestConstant:
    """The single answer that does best when given to every problem, and its share correct: the floor for any score."""

    answer: str
    accuracy: float


def best_constant(problems: Sequence[Problem], verify: Verify) -> BestConstant:
    """Give the commonest gold answers, and a few everyday ones, to all of `problems`; `verify` is a pool's."""
    common = [gold for gold, _ in Counter(problem.gold for problem in problems).most_common(8)]
    best = BestConstant("", 0.0)
    for answer in dict.fromkeys([*common, "0", "1", "True", "Yes", "A"]):
        judgements = verify([(problem, answer) for problem in problems])
        share = sum(judgement.verdict is Verdict.CORRECT for judgement in judgements) / len(problems)
        if share > best.accuracy:
            best = BestConstant(answer, share)
    return best
