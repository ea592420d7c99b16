"""Answers on disk survive kills, grow, and are never taken for those of another model."""

import fcntl
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sputnik.errors import DataError
from sputnik.eval.records import FAILED, Record, open_book
from sputnik.tasks.base import Problem

PROBLEMS = [Problem(prompt=f"Twice {n}?", gold=str(2 * n), id=f"{n:016x}") for n in (5, 3, 9)]


def record(problem: Problem, sample: int, key: str = "k", finish: str = "stop") -> Record:
    return Record(
        key=key, problem_id=problem.id, sample=sample, family="", prompt=problem.prompt, gold=problem.gold,
        completion="é \ud800", thinking="", answer=problem.gold, verdict="correct", detail="", vote=problem.gold,
        finish=finish, length=3, thinking_length=0, well_formed=True, self_check=False,
    )  # fmt: skip


def fill(path: Path, places: Sequence[tuple[int, int]]) -> None:
    with open_book(path, "k") as book:
        for problem, sample in places:
            book.add([record(PROBLEMS[problem], sample)])


def test_what_is_there_is_not_missing_and_more_samples_or_questions_are(tmp_path: Path) -> None:
    path = tmp_path / "new" / "book.jsonl"
    fill(path, [(1, 0), (0, 1), (0, 0)])
    with open_book(path, "k") as book:
        assert [(q.problem.id[-1], q.samples) for q in book.missing(PROBLEMS[:2], 2)] == [("3", (1,))]
        assert [(q.problem.id[-1], q.samples) for q in book.missing(PROBLEMS, 3)] == [
            ("5", (2,)), ("3", (1, 2)), ("9", (0, 1, 2)),
        ]  # fmt: skip
        assert [len(group) for group in book.of(PROBLEMS, 3)] == [2, 1, 0]
        assert book.of(PROBLEMS, 1) == [[record_read(0, 0)], [record_read(1, 0)], []]


def record_read(problem: int, sample: int) -> Record:
    return replace(record(PROBLEMS[problem], sample), completion="é ?")  # no half of a surrogate pair on disk


def test_a_torn_line_is_cut_off_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    fill(path, [(0, 0), (0, 1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with open_book(path, "k") as book:
        assert [q.samples for q in book.missing(PROBLEMS[:1], 2)] == [(1,)]
        book.add([record(PROBLEMS[0], 1)])
    assert path.read_bytes() == whole


def test_failed_requests_are_asked_again_and_the_last_word_counts(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    with open_book(path, "k") as book:
        book.add([record(PROBLEMS[0], 1, finish=FAILED), record(PROBLEMS[0], 0)])
    with open_book(path, "k") as book:
        assert [q.samples for q in book.missing(PROBLEMS[:1], 2)] == [(1,)]
        book.add([record(PROBLEMS[0], 1)])
        book.put_in_order(PROBLEMS)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["sample"], line["finish"]) for line in lines] == [(0, "stop"), (1, "stop")]


def test_a_question_with_another_wording_or_gold_answer_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    fill(path, [(0, 0), (1, 0), (2, 0)])
    mended = [replace(PROBLEMS[0], gold="11"), replace(PROBLEMS[1], prompt="Thrice 3?"), PROBLEMS[2]]
    with open_book(path, "k") as book:
        assert [q.problem for q in book.missing(mended, 1)] == mended[:2]
        book.add([record(problem, 0) for problem in mended[:2]])
    with open_book(path, "k") as book:
        assert book.missing(mended, 1) == [] and [group[0].gold for group in book.of(mended, 1)] == ["11", "6", "18"]


def test_the_end_is_in_the_order_of_the_questions_whatever_came_first(tmp_path: Path) -> None:
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    places = [(problem, sample) for problem in range(3) for sample in range(2)]
    fill(one, places)
    fill(other, places[::-1])
    with open_book(other, "k") as book:
        book.put_in_order(PROBLEMS)
    assert one.read_bytes() == other.read_bytes()


def test_answers_of_other_settings_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    fill(path, [(0, 0)])
    before = path.read_bytes()
    with pytest.raises(DataError, match="line 1 is the answer of another model"), open_book(path, "other"):
        pass
    path.write_text('{"prompt": "mine"}\n')
    with pytest.raises(DataError, match="line 1 is no answer of an evaluation"), open_book(path, "k"):
        pass
    assert path.read_text() == '{"prompt": "mine"}\n' and before


def test_one_process_at_a_time_and_nothing_empty_is_left(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing"), open_book(path, "k"):
            pass
    with open_book(path, "k"):
        pass
    assert not path.exists()
