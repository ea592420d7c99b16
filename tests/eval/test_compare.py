"""Two results compared: pairs by question, both sides counted, and not a word less about what was not alike."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sputnik.errors import DataError
from sputnik.eval.compare import compare
from sputnik.eval.results import EvalResult, load_result
from sputnik.eval.stats import paired, pass_at_1, sign_flip
from sputnik.tasks.base import BestConstant


def result(model: str, scores: dict[str, float], k: int = 4) -> EvalResult:
    score = pass_at_1([[True]])
    return EvalResult(
        task="sums", task_version="1", template="chat", template_hash="t", decoding={"temperature": 0.6, "k": k},
        n=len(scores), k=k, pass_at_1=score, cons_at_k=score, pass_at_k={"1": score},
        best_constant=BestConstant("8", 0.1), verdicts={}, truncated=0.0, well_formed=1.0, self_check=0.0, length=1.0,
        length_finished=1.0, thinking_length=0.0, seconds=1.0, tokens_per_s=1.0, warnings=(),
        questions=tuple(scores.items()), model=model,
    )  # fmt: skip


FIRST = result("a", {"p": 0.25, "q": 1.0, "r": 0.0, "s": 0.5, "t": 0.5, "gone": 1.0})
SECOND = result("b", {"t": 1.0, "q": 1.0, "r": 0.0, "s": 0.5, "p": 0.0, "new": 0.0})


def test_pairs_are_those_of_the_questions_both_have_whatever_their_order() -> None:
    found = compare(FIRST, SECOND)
    a, b = [0.25, 1.0, 0.0, 0.5, 0.5], [0.0, 1.0, 0.0, 0.5, 1.0]
    assert found.difference == paired(a, b, 4) and found.difference.mean == pytest.approx(0.05)
    assert found.p == sign_flip(a, b)
    assert (found.second_better, found.first_better, found.both_all, found.both_none, found.same) == (1, 1, 1, 1, 1)
    assert (found.left_out, found.first, found.second, found.unlike) == (2, "a", "b", ())
    assert compare(SECOND, FIRST).difference.mean == pytest.approx(-0.05)


def test_what_was_not_measured_alike_is_listed() -> None:
    other = replace(SECOND, decoding={"temperature": 1.0, "seed": 0, "context": 64, "k": 4}, template_hash="u")
    assert compare(FIRST, other).unlike == (
        "temperature 0.6 and 1.0",
        "template chat t and chat u",
        "seed not given and 0",
    )


def test_other_verifiers_or_questions_are_not_compared() -> None:
    with pytest.raises(DataError, match="not the same task: sums version 1 and sums version 2"):
        compare(FIRST, replace(SECOND, task_version="2"))
    with pytest.raises(DataError, match="no question in common"):
        compare(FIRST, result("c", {"x": 1.0}))


def test_a_saved_result_is_the_result(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(FIRST.to_dict()))
    assert load_result(path) == FIRST
    path.write_text('{"task": 3}')
    with pytest.raises(DataError, match=r"a.json: no saved result"):
        load_result(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_result(tmp_path / "none.json")
