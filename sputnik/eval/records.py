"""Answers on disk: one line of JSON for each, appended as they come, taken up again after a kill.

    with open_book(Path("scores.samples.jsonl"), key) as book:      # or path None: in memory
        book.missing(problems, k)               # what is still to be asked
        book.add(records)

`key` is a hash of all that an answer depends on beside its question; a file with another key is refused. More samples
and more questions are no other key, so a file can grow. A request that failed is written, too, and asked again by the
next run; so is a question whose wording or gold answer is not what it was. At the end the lines stand in the order of
questions and samples.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from sputnik.errors import DataError
from sputnik.files import write_whole
from sputnik.tasks.base import Problem, Verdict

FAILED = "failed"
"""`finish` of an answer that never came: the fault of a connection, a server or our engine."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer and what was decided about it. Lengths are in tokens."""

    key: str
    problem_id: str
    sample: int
    family: str
    prompt: str
    gold: str
    completion: str
    thinking: str
    answer: str
    verdict: str
    detail: str
    vote: str | None
    """What it says in a majority vote; None: it could not be read."""
    finish: str
    length: int
    thinking_length: int
    well_formed: bool
    self_check: bool

    @property
    def correct(self) -> bool:
        return self.verdict == Verdict.CORRECT


@dataclass(frozen=True)
class Question:
    """A problem, and the numbers of its samples that nobody has drawn yet."""

    problem: Problem
    samples: tuple[int, ...]


class Book:
    """The answers there are, by question and sample."""

    def __init__(self, key: str, path: Path | None = None, file: BinaryIO | None = None) -> None:
        self.key = key
        self._path, self._file = path, file
        self._found: dict[tuple[str, int], Record] = {}
        if path is not None and file is not None:
            self._read(path, file)

    def missing(self, problems: Sequence[Problem], k: int) -> list[Question]:
        asked = []
        for problem in problems:
            open_ones = tuple(sample for sample in range(k) if self._open(problem, sample))
            if open_ones:
                asked.append(Question(problem, open_ones))
        return asked

    def of(self, problems: Sequence[Problem], k: int) -> list[list[Record]]:
        """The answers to each problem, in order."""
        return [
            [self._found[problem.id, sample] for sample in range(k) if (problem.id, sample) in self._found]
            for problem in problems
        ]

    def add(self, records: Iterable[Record]) -> None:
        for record in records:
            self._found[record.problem_id, record.sample] = record
            if self._file is not None:
                self._file.write(_line(record))
        if self._file is not None:
            self._file.flush()

    def put_in_order(self, problems: Sequence[Problem]) -> None:
        """One line an answer, as if nothing had ever failed; answers to other questions stay at the end."""
        if self._path is None:
            return
        places = {problem.id: place for place, problem in enumerate(problems)}
        last = len(places)
        ordered = sorted(self._found.values(), key=lambda r: (places.get(r.problem_id, last), r.problem_id, r.sample))
        content = b"".join(map(_line, ordered))
        if content != self._path.read_bytes():
            write_whole(self._path, content)

    def _open(self, problem: Problem, sample: int) -> bool:
        record = self._found.get((problem.id, sample))
        if record is None or record.finish == FAILED:
            return True
        return (record.prompt, record.gold) != (problem.prompt, problem.gold)

    def _read(self, path: Path, file: BinaryIO) -> None:
        """A line that was being written when a run was killed is cut off."""
        end = 0
        with path.open("rb") as old:
            for number, raw in enumerate(old, 1):
                if not raw.endswith(b"\n"):
                    file.truncate(end)
                    break
                end += len(raw)
                try:
                    record = msgspec.convert(json.loads(raw), Record)
                except (ValueError, msgspec.ValidationError):
                    raise DataError(f"{path}: line {number} is no answer of an evaluation; give another file") from None
                if record.key != self.key:
                    raise DataError(
                        f"{path}: line {number} is the answer of another model, to another task or with other "
                        "settings; delete the file or give another"
                    )
                self._found[record.problem_id, record.sample] = record
        file.seek(0, os.SEEK_END)


@contextmanager
def open_book(path: Path | None, key: str) -> Iterator[Book]:
    """For one process at a time; a file that stays empty is not left behind."""
    if path is None:
        yield Book(key)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{path}: another process is writing it") from None
        try:
            yield Book(key, path, file)
        finally:
            if path.stat().st_size == 0:
                path.unlink()


def _line(record: Record) -> bytes:
    return json.dumps(asdict(record), ensure_ascii=False).encode(errors="replace") + b"\n"
