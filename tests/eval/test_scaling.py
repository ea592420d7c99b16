"""Test-time scaling: every point is a run of its own on the same questions, forced the way it says."""

import json
from pathlib import Path
from statistics import mode

import pytest

from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.errors import ConfigError
from sputnik.eval.harness import examine
from sputnik.eval.models import Local
from sputnik.eval.results import EvalResult
from sputnik.eval.scaling import Scaling, consensus, derived, scale
from sputnik.eval.stats import cons_at_k
from sputnik.tasks.base import Problem, Task
from sputnik.tasks.verify import VerifierPool


@pytest.fixture(scope="module")
def problems(task: Task) -> list[Problem]:
    return task.problems("test", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scaling")


@pytest.fixture(scope="module")
def params(llm: LLM) -> SamplingParams:
    """Untrained, the model needs a push to end its thoughts and its answers."""
    push = {llm.tok.end_think_id: 2.5, llm.tok.eos_id: 4.0}
    return SamplingParams(temperature=0.9, top_p=0.95, max_tokens=48, seed=1, logit_bias=push)


@pytest.fixture(scope="module")
def scaling(
    llm: LLM, params: SamplingParams, task: Task, judges: VerifierPool, problems: list[Problem], folder: Path
) -> Scaling:
    seen: list[tuple[int, int]] = []
    found = scale(
        Local(llm, params, "tiny"), task, judges, problems, k=4, budgets=(8, 2), extensions=(1, 3),
        samples_to=lambda name: folder / f"{name}.jsonl", on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1][0] == 30 and seen == sorted(seen)
    return found


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_thoughts_are_as_long_as_each_point_says(scaling: Scaling, folder: Path, llm: LLM) -> None:
    assert [(point.budget, point.extend) for point in scaling.points] == [
        (2, 0),
        (8, 0),
        (None, 0),
        (None, 1),
        (None, 3),
    ]
    short, longer, free = (point.thinking_length for point in scaling.points[:3])
    assert 1 < short < longer < free < scaling.points[3].thinking_length < scaling.points[4].thinking_length
    closing = len(llm.tok.encode("\n"))
    for budget in (2, 8):
        lengths = [int(str(line["thinking_length"])) for line in lines(folder / f"budget-{budget}.jsonl")]
        assert mode(lengths) == budget + closing and max(lengths) <= budget + 4 * closing
    assert sorted(path.name for path in folder.iterdir()) == [
        "budget-2.jsonl", "budget-8.jsonl", "extend-1.jsonl", "extend-3.jsonl", "free.jsonl",
    ]  # fmt: skip
    for path in folder.iterdir():
        assert len(lines(path)) == 24
    waits = [sum(str(line["thinking"]).count("Wait") for line in lines(folder / f"{name}.jsonl"))
             for name in ("free", "extend-1", "extend-3")]  # fmt: skip
    assert waits[0] == 0 < waits[1] < waits[2]


def test_a_forced_thought_begins_as_the_free_one(folder: Path) -> None:
    """Up to the end that the model chose itself the two are the same draws."""
    free, forced = (lines(folder / f"{name}.jsonl") for name in ("free", "extend-3"))
    ended = 0
    for one, other in zip(free, forced, strict=True):
        thought, tag, _ = str(one["completion"]).partition("</think>")
        if tag and one["verdict"] != "truncated":
            ended += 1
            assert str(other["completion"]).startswith(thought)
    assert ended > 6


def test_points_say_what_they_gain_on_the_first_and_carry_their_settings(scaling: Scaling) -> None:
    assert scaling.points[0].gain.mean == 0 and scaling.points[0].p == 1
    for point in scaling.points:
        assert point.gain.mean == pytest.approx(point.pass_at_1.mean - scaling.points[0].pass_at_1.mean)
    assert (scaling.n, scaling.k, scaling.model, scaling.task) == (6, 4, "tiny", "arithmetic")
    assert scaling.decoding["max_tokens"] == 48 and list(scaling.pass_at_k) == list(scaling.cons_at_k) == [
        "1",
        "2",
        "4",
    ]
    assert json.loads(json.dumps(scaling.to_dict()))["points"][1]["budget"] == 8


def test_the_free_run_is_not_repeated(
    llm: LLM, params: SamplingParams, task: Task, judges: VerifierPool, problems: list[Problem], scaling: Scaling
) -> None:
    model = Local(llm, params, "tiny")
    free = examine(model, task, judges, problems, k=4)
    found = scale(model, task, judges, problems, k=4, budgets=(8,), extensions=(), free=free)
    assert found.points[1].pass_at_1 == free.pass_at_1
    assert [found.points[0].thinking_length, found.points[1].thinking_length] == [
        scaling.points[1].thinking_length, scaling.points[2].thinking_length,
    ]  # fmt: skip
    assert found.cons_at_k == consensus(free) and found.cons_at_k["4"] == free.cons_at_k


def test_derived_budgets_follow_the_thoughts_of_the_model(
    llm: LLM, params: SamplingParams, task: Task, judges: VerifierPool, problems: list[Problem]
) -> None:
    free = examine(Local(llm, params), task, judges, problems, k=4)
    budgets = derived(free)
    assert budgets == sorted(budgets) and budgets[-1] <= 48 and budgets[-1] // budgets[0] >= 8
    lengths = [sample["thinking_length"] for sample in free.samples]
    assert sum(length <= budgets[-1] for length in lengths) >= 0.95 * len(lengths)


def with_samples(votes: list[tuple[str | None, str]]) -> list[dict[str, object]]:
    return [{"problem_id": "p", "vote": vote, "verdict": verdict} for vote, verdict in votes]


def test_votes_leave_out_what_nobody_could_judge(scaling: Scaling) -> None:
    class Judged:
        questions = (("p", 0.5),)
        pass_at_k = {"1": 0, "3": 0}  # noqa: RUF012
        samples = with_samples([("7", "correct"), (None, "error"), ("8", "wrong"), (None, "truncated")])

    result: EvalResult = Judged()  # type: ignore[assignment]
    votes = [[("7", True), ("8", False), (None, False)]]
    assert consensus(result) == {"1": cons_at_k(votes, 1), "3": cons_at_k(votes, 3)}


def test_a_model_without_thoughts_cannot_be_scaled(
    llm: LLM,
    params: SamplingParams,
    task: Task,
    judges: VerifierPool,
    problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llm, "thought", None)
    with pytest.raises(ConfigError, match="a model with thoughts"):
        scale(Local(llm, params, "plain"), task, judges, problems, k=2)
