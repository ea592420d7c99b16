"""Traces of a real (tiny) policy: what is kept is right and readable, the rest has its reason, a kill costs nothing."""

import io
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sputnik.cost import Meter
from sputnik.errors import ConfigError, DataError, TaskError
from sputnik.eval.records import Record
from sputnik.hardware import Hardware
from sputnik.tasks.base import Problem, Verdict, judge, load_task
from sputnik.text.quality import is_readable
from sputnik.train import traces
from sputnik.train.state import read_jsonl
from sputnik.train.traces import Collection, TracesConfig, collect_traces

OPTIONS = {"terms": [2, 3], "largest": 5, "non_negative": True, "style_weights": {"guess": 0.5, "steps": 0.5}}
SMALL: dict[str, Any] = {"task_options": OPTIONS, "questions": 24, "samples": 4, "max_tokens": 40, "precision": "fp32"}
FILES = ("data.jsonl", "rejected.jsonl", "traces.json")
SCRIPT = """
import json, sys, torch
from pathlib import Path
from sputnik.cost import Meter
from sputnik.hardware import Hardware
from sputnik.train import traces
torch.set_num_threads(1)
traces.ROWS = 16
settings, parent, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
meter = Meter(Hardware("test", 1e11, None, 1e10, 1e10, 0.1, "test"))
traces.collect_traces(traces.TracesConfig(**settings), parent, out, meter)
"""


@pytest.fixture(autouse=True)
def small_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "ROWS", 16)


def collect(policy: Any, out: Path, said: io.StringIO | None = None, **changes: Any) -> dict[str, Any]:
    meter = Meter(Hardware("test", 1e11, None, 1e10, 1e10, 0.1, "test"))
    console = Console(file=said or io.StringIO(), width=1000)
    return collect_traces(TracesConfig(**{**SMALL, **changes}), policy.checkpoint, out, meter, console)


def lines(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return read_jsonl(out / "data.jsonl"), read_jsonl(out / "rejected.jsonl")


@pytest.fixture(scope="module")
def whole(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run with the settings of `SMALL`, and two of a question."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "ROWS", 16)
        out = tmp_path_factory.mktemp("traces") / "whole"
        collect(policy, out, keep=2)
    return out


def test_what_is_kept_is_right_readable_and_says_its_answer_in_a_sentence(whole: Path, policy: Any) -> None:
    kept, _ = lines(whole)
    problems = {problem.id: problem for problem in policy.task.problems("train", 24)}
    assert len(kept) > 5
    for line in kept:
        problem = problems[line["id"]]
        assert line["prompt"] == problem.prompt and line["task"] == "arithmetic" and line["verdict"] == "correct"
        assert line["answer"] == f"The answer is {problem.gold}."
        assert judge(policy.task, problem, line["answer"]).verdict is Verdict.CORRECT
        assert is_readable(line["thinking"]) is None and 0 < line["length"] < 40
    assert max(Counter(line["id"] for line in kept).values()) <= 2
    assert len({(line["id"], line["thinking"]) for line in kept}) == len(kept)


def test_every_sample_is_kept_or_rejected_for_a_reason_and_counted(whole: Path) -> None:
    kept, rejected = lines(whole)
    found = json.loads((whole / "traces.json").read_text())
    assert len(kept) + len(rejected) == found["samples"] == 24 * 4 and found["questions"] == 24
    assert found["reasons"] == {"kept": len(kept)} | Counter(line["reason"] for line in rejected)
    right = len(kept) + sum(line["verdict"] == "correct" for line in rejected)
    assert found["correct"] == right > len(kept) == found["kept"]
    assert {"wrong", "duplicate"} <= set(found["reasons"])
    for line in rejected:
        assert (line["verdict"] == "wrong") == (line["reason"] == "wrong")
    assert found["families"]["arithmetic"]["kept"] == len(kept)
    assert found["length"] == pytest.approx(sum(line["length"] for line in kept) / len(kept))


def test_same_seed_same_bytes_other_seed_other_traces(whole: Path, policy: Any, tmp_path: Path) -> None:
    collect(policy, tmp_path / "again", keep=2)
    assert all((tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes() for name in FILES)
    collect(policy, tmp_path / "other", keep=2, seed=1)
    assert (tmp_path / "other" / "data.jsonl").read_bytes() != (whole / "data.jsonl").read_bytes()


def test_examples_may_have_their_question_in_other_words(whole: Path, policy: Any, tmp_path: Path) -> None:
    collect(policy, tmp_path, keep=2, reworded=0.5)
    problems = {problem.id: problem for problem in policy.task.problems("train", 24)}
    other = 0
    for line, plain in zip(lines(tmp_path)[0], lines(whole)[0], strict=True):
        reworded = line["prompt"] in policy.task.wordings(problems[line["id"]])
        assert line | {"prompt": ""} == plain | {"prompt": ""} and (reworded or line["prompt"] == plain["prompt"])
        other += reworded
    assert 0 < other < len(lines(whole)[0])
    with pytest.raises(ConfigError, match="one wording only"):
        collect(policy, tmp_path / "none", task="countdown", task_options={}, reworded=0.5)


class Crash(RuntimeError):
    pass


def test_a_run_that_dies_anywhere_goes_on_to_the_same_bytes(
    whole: Path, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, method in enumerate(("_ask", "_count", "state")):
        original, calls = getattr(Collection, method), iter(range(100))

        def dies(self: Collection, *args: Any, original: Any = original, calls: Any = calls, at: int = place) -> Any:
            found = original(self, *args)
            if next(calls) == at + 1:
                raise Crash
            return found

        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Collection, method, dies)
            collect(policy, tmp_path / method, keep=2)
        with (tmp_path / method / "data.jsonl").open("a") as file:
            file.write('{"prompt": "half a li')
        collect(policy, tmp_path / method, keep=2)
        for name in FILES:
            assert (tmp_path / method / name).read_bytes() == (whole / name).read_bytes(), (method, name)


def test_kill_9_and_the_same_command_again(
    whole: Path, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed"
    settings = json.dumps({**SMALL, "keep": 2})
    command = [sys.executable, "-c", SCRIPT, settings, str(policy.checkpoint), str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (out / "traces.json").exists()
    collect(policy, out, keep=2)
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in FILES)
    monkeypatch.setattr(traces.Local, "ask", None)
    assert collect(policy, out, keep=2)["kept"] == len(lines(whole)[0]), "and once more: nobody is asked"
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in FILES)
    with pytest.raises(DataError, match="keep was 2, is 1"):
        collect(policy, out, keep=1)


def test_a_full_family_is_asked_no_further(policy: Any, tmp_path: Path) -> None:
    families = [
        {"task": "arithmetic", "name": "sums", "options": {**OPTIONS, "operators": "+"}},
        {"task": "arithmetic", "name": "both", "options": OPTIONS},
    ]
    mixed = {"task": "mix", "task_options": {"families": families}, "questions": 48}
    found = collect(policy, tmp_path, **mixed, per_family=3)
    kept, rejected = lines(tmp_path)
    assert Counter(line["task"] for line in kept) == {"sums": 3, "both": 3}
    assert found["families"]["sums"]["questions"] < 24 > found["families"]["both"]["questions"]
    assert found["questions"] * 4 == found["samples"] == len(kept) + len(rejected)


def test_thoughts_with_a_check_come_first_until_there_are_enough(policy: Any, tmp_path: Path) -> None:
    def checked(share: float) -> int:
        """Of 24 questions with a long checked answer and two shorter unchecked ones, how often is the first kept?"""
        stage = Collection(TracesConfig(**{**SMALL, "checks": share}), policy.task, None, None, tmp_path)  # type: ignore[arg-type]
        kept = []
        for problem in stage.questions:
            group = [traces.Sample(problem, record(problem, place), problem.prompt) for place in range(3)]
            stage._select(group)
            kept += [sample.record.self_check for sample in group if sample.reason is None]
        assert len(kept) == 24
        return sum(kept)

    def record(problem: Problem, place: int) -> Record:
        return Record(
            key="", problem_id=problem.id, sample=place, family="", prompt=problem.prompt, gold=problem.gold,
            completion="", thinking=f"{place} and so", answer=problem.gold, verdict="correct", detail="", vote=None,
            finish="stop", length=9 - place, thinking_length=1, well_formed=True, self_check=place == 0,
        )  # fmt: skip

    assert checked(0.0) == 0 and checked(1.0) == 23, "the first question comes before anything is counted"
    assert 11 <= checked(0.5) <= 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_tokens": 3}, r"of 96 samples \(truncated 9\d.*\): raise max_tokens; .*rejected.jsonl has them all"),
        ({"readable": {"shortest": 500}}, r"too short \d+.*"),
        ({"readable": {"paragraph": 2}, "template": "zero"}, r"no trace was kept"),
    ],
)
def test_nothing_kept_is_an_error_that_says_why_each_time(
    policy: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match=words) as caught:
            collect(policy, tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert len(lines(tmp_path)[1]) == 96 and not lines(tmp_path)[0]


TASK = '''
from sputnik.tasks.arithmetic import Arithmetic, parse_integer

class Odd(Arithmetic):
    """Sums whose verifier breaks on some answers, and who has a way of its own to say them."""
    name = "odd"

    def verify(self, problem, answer):
        given = parse_integer(answer)
        if given is not None and abs(given - int(problem.gold)) == 2:
            raise RuntimeError("two off")
        return super().verify(problem, answer)

    def conclude(self, problem, answer):
        CONCLUDE
'''


def odd(folder: Path, conclude: str) -> str:
    path = folder / "odd.py"
    path.write_text(TASK.replace("CONCLUDE", conclude))
    return str(path)


def test_a_sentence_that_would_not_be_paid_is_not_taught(policy: Any, tmp_path: Path) -> None:
    task = odd(tmp_path, "return answer if int(answer) < 6 else f'It is {answer}, no less'")
    said = io.StringIO()
    collect(policy, tmp_path / "out", said, task=task)
    kept, rejected = lines(tmp_path / "out")
    assert kept and all(int(line["answer"]) < 6 for line in kept)
    concluded = [line for line in rejected if line["reason"] == "conclusion"]
    assert concluded and all(line["verdict"] == "correct" and int(line["answer"]) >= 6 for line in concluded)
    errors = [line for line in rejected if line["reason"] == "error"]
    assert errors and f"warning: {len(errors)} samples error, first: " in said.getvalue()
    assert "Odd.verify raised RuntimeError: two off" in said.getvalue()
    with pytest.raises(TaskError, match=r"odd.py:\d+: Odd.conclude raised ZeroDivisionError"):
        collect(policy, tmp_path / "broken", task=odd(tmp_path, "return 1 / 0"))


def test_the_instruction_is_asked_and_not_learned(policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = traces.Local.ask

    def listens(self: Any, questions: Any, k: int) -> Any:
        asked.extend(question.problem.prompt for question in questions)
        return ask(self, questions, k)

    monkeypatch.setattr(traces.Local, "ask", listens)
    with pytest.raises(DataError):
        collect(policy, tmp_path, instruction="Be brief.", max_tokens=3, questions=4)
    assert len(asked) == 4 and all(prompt.endswith("?\nBe brief.") for prompt in asked)
    assert {line["prompt"] for line in lines(tmp_path)[1]} == {prompt.removesuffix("\nBe brief.") for prompt in asked}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples = 0: set it to 1 or more"),
        ({"keep": 0}, "keep = 0"),
        ({"reworded": 1.5}, "a share, from 0 to 1"),
        ({"checks": 2}, "checks = 2: a share, from 0 to 1"),
        ({"per_family": 0}, "per_family = 0"),
        ({"temperature": 0}, "temperature 0 gives the same answer"),
        ({"readable": {"langage": "en"}}, "readable: unknown key 'langage'; did you mean 'language'"),
        ({"readable": {"language": "xx"}}, "no language 'xx'"),
        ({"endpoint": {"model": "x"}}, "set url"),
        ({"url": "http://x", "endpoint": {"modle": "x"}}, "did you mean 'model'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TracesConfig(**changes)


def test_a_model_or_a_teacher_is_needed_and_questions_must_be_there(policy: Any, tmp_path: Path) -> None:
    meter = Meter(Hardware("test", 1e11, None, 1e10, 1e10, 0.1, "test"))
    with pytest.raises(ConfigError, match="traces need a model"):
        collect_traces(TracesConfig(**SMALL), None, tmp_path / "none", meter)
    with pytest.raises(TaskError, match="distinct train problems; 10000 were asked for"):
        collect(policy, tmp_path / "many", questions=10_000)
    assert not (tmp_path / "many" / "data.jsonl").exists()


def test_no_question_that_is_held_out_is_asked(whole: Path) -> None:
    task = load_task("arithmetic", OPTIONS)
    held_out = {problem.prompt for problem in [*task.problems("validation", 40), *task.problems("test", 40)]}
    assert not held_out & {line["prompt"] for part in lines(whole) for line in part}
