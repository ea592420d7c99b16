"""`mix`: several families with weights as one task, so that RL, evaluation and traces need no special case.

    task = "mix"
    task_options = { families = [{ task = "arithmetic", weight = 2 }, { task = "gym:gcd", options = { max_num = 9 } }] }

`options` beside `families` are options of all of them, which a family's own come before. With `reworded = 0.3` three
questions in ten are asked in other words (`Task.wordings`), which ones and how hangs on the question alone.

Each family keeps its own splits, ids and verifier: a question is in the split, and has the id, that it has without the
mixture. `problem.meta["family"]` says where it comes from, and scores are told by it. Two families of one task
need a `name` each. Families are drawn in steps of the golden ratio, so their counts stay close to the weights however
few questions are drawn; one that holds few questions ends, and the others go on without it.

Left out: mixtures of mixtures, weights that change during a run.
"""

import dataclasses
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from sputnik.config import check_keys, from_dict
from sputnik.errors import ConfigError, TaskError
from sputnik.tasks.base import REJECTIONS, Demonstration, Problem, Split, Task, Verdict, hash_of, load_task
from sputnik.tasks.wordings import wordings_of

GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2: its multiples, modulo 1, lie the most evenly
LABEL = "family"


@dataclass(frozen=True)
class Entry:
    """A row of `families` as it stands in a recipe."""

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    name: str = ""
    """Of the family, in metrics; the task's own unless given."""


@dataclass(frozen=True)
class Family:
    name: str
    task: Task
    weight: float


class Mixture(Task):
    """See the module's text. A `Task` of one family alone differs from that family's task in `meta` only."""

    name = "mix"

    def __init__(self, members: Sequence[Family], reworded: float = 0.0) -> None:
        self.members = {member.name: member for member in members}
        self.reworded = reworded
        self.version = ", ".join(f"{name} {member.task.version}" for name, member in self.members.items())

    @classmethod
    def build(cls, argument: str, options: Mapping[str, Any]) -> Self:
        check_keys(options, ["families", "options", "reworded"], "task 'mix'")
        reworded = options.get("reworded", 0.0)
        if not isinstance(reworded, int | float) or not 0 <= reworded <= 1:
            raise ConfigError(f"task 'mix': reworded = {reworded!r}: a share of the questions, from 0 to 1")
        shared = options.get("options", {})
        if not isinstance(shared, Mapping):
            raise ConfigError("task 'mix': options is a table of options that all families share")
        rows = options.get("families", [])
        if argument or not isinstance(rows, list | tuple) or not rows:
            raise ConfigError("task 'mix' needs options families = [{ task = \"arithmetic\", weight = 1.0 }, ...]")
        members = [_member(row, shared, f"task 'mix': family {number}") for number, row in enumerate(rows, 1)]
        _check_names(members)
        if reworded and all(type(member.task).wordings is Task.wordings for member in members):
            raise ConfigError("task 'mix': reworded: these families know their questions in one wording only")
        return cls(members, reworded)

    def generate(self, rng: random.Random) -> Problem:
        """Of any split; `stream` is what keeps the splits apart."""
        (member,) = rng.choices(list(self.members.values()), [member.weight for member in self.members.values()])
        return _labelled(member.task.generate(rng), member.name)

    def stream(self, split: Split, seed: int) -> Iterator[Problem]:
        streams = {name: _distinct(member.task.stream(split, seed)) for name, member in self.members.items()}
        dry = set(streams)
        place = random.Random(hash_of(f"{self.name}/{split}/{seed}")).random()
        while streams:
            place = (place + GOLDEN) % 1.0
            name = self._at(place, streams)
            problem = next(streams[name], None)
            if problem is not None:
                dry.discard(name)
                problem = _labelled(problem, name)
                others = wordings_of(self, problem) if self.reworded else ()
                yield dataclasses.replace(problem, prompt=self._asked(problem.id, problem.prompt, others))
            elif name in dry and len(self.members) > 1:
                raise TaskError(f"mix: family {name!r} has no {split} problems; leave it out here")
            else:
                del streams[name]

    def verify(self, problem: Problem, answer: str) -> Verdict | bool:
        return self.task_of(problem).verify(problem, answer)

    def identity(self, problem: Problem) -> str:
        return self.task_of(problem).identity(problem)

    def conclude(self, problem: Problem, answer: str) -> str:
        return self.task_of(problem).conclude(problem, answer)

    def wordings(self, problem: Problem) -> Sequence[str]:
        return self.task_of(problem).wordings(problem)

    def self_checks(self, thinking: str) -> bool:
        """By any family's rule; `task_of(problem).self_checks` is that of one."""
        return any(member.task.self_checks(thinking) for member in self.members.values())

    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        """Of all families by their weights, shuffled; a style carries the family's name."""
        total, begun, found = sum(member.weight for member in self.members.values()), 0.0, list[Demonstration]()
        for member in self.members.values():
            ended = begun + n * member.weight / total
            shown = member.task.demonstrations(round(ended) - round(begun), seed)
            for number, each in enumerate(shown):
                prompt = self._asked(f"{seed}/{number}", each.prompt, each.wordings)
                found.append(dataclasses.replace(each, prompt=prompt, style=f"{member.name}: {each.style}"))
            begun = ended
        random.Random(f"mix/{seed}").shuffle(found)
        return found

    def task_of(self, problem: Problem) -> Task:
        member = self.members.get(str(problem.meta.get(LABEL)))
        if member is None:
            raise TaskError(f"mix: problem {problem.id!r} is of no family of this mixture: {', '.join(self.members)}")
        return member.task

    def tasks_within(self) -> Sequence[Task]:
        return [Mixture([member], self.reworded) for member in self.members.values()]

    def _asked(self, key: str, prompt: str, others: Sequence[str]) -> str:
        """`prompt`, or, for a share of all keys, one of the `others`."""
        rng = random.Random(f"mix/wording/{key}")
        return rng.choice(others) if rng.random() < self.reworded and others else prompt

    def _at(self, place: float, names: Iterable[str]) -> str:
        """The family at `place` (0..1) of the weights of `names`, laid end to end."""
        kept = [self.members[name] for name in names]
        left = place * sum(member.weight for member in kept)
        for member in kept:
            left -= member.weight
            if left < 0:
                return member.name
        return kept[-1].name


def _distinct(problems: Iterator[Problem]) -> Iterator[Problem]:
    """Without repetitions, which would cost a small family its share; ends when nothing new comes."""
    seen, repeats = set[str](), 0
    for problem in problems:
        repeats = repeats + 1 if problem.id in seen else 0
        if repeats == 0:
            seen.add(problem.id)
            yield problem
        elif repeats > REJECTIONS:
            return


def _labelled(problem: Problem, name: str) -> Problem:
    if LABEL in problem.meta:
        raise TaskError(f"mix: the problems of family {name!r} have a {LABEL!r} in their meta already; rename it there")
    return dataclasses.replace(problem, meta={**problem.meta, LABEL: name})


def _member(row: Any, shared: Mapping[str, Any], where: str) -> Family:
    if not isinstance(row, Mapping):
        raise ConfigError(f'{where}: write a table with a task, as {{ task = "arithmetic" }}')
    entry = from_dict(Entry, row, where)
    if not (math.isfinite(entry.weight) and entry.weight > 0):
        raise ConfigError(f"{where}: weight = {entry.weight}: set it above 0, or leave the family out")
    task = load_task(entry.task, {**shared, **entry.options})
    if isinstance(task, Mixture):
        raise ConfigError(f"{where}: a mixture cannot hold a mixture; name its families here")
    return Family(entry.name or task.name, task, entry.weight)


def _check_names(members: Sequence[Family]) -> None:
    """Names tell families apart in metrics; the name of a task is part of the ids of its questions."""
    kinds: dict[str, tuple[str, str]] = {}
    for place, member in enumerate(members):
        if member.name in (other.name for other in members[:place]):
            raise ConfigError(f"task 'mix': two families are called {member.name!r}; give them a name = \"...\" each")
        kind = (type(member.task).__module__, type(member.task).__qualname__)
        if kinds.setdefault(member.task.name, kind) != kind:
            raise ConfigError(f"task 'mix': two different tasks call themselves {member.task.name!r}; rename one")
