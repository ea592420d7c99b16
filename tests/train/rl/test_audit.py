"""The verifier's error rates: on a set written down with its answers, on the sets that ship, on broken files."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sputnik.errors import DataError
from sputnik.tasks.base import SHIPPED, load_task
from sputnik.tasks.verify import VerifierPool
from sputnik.train.audit import audit, audit_file, audit_table, labelled_set, read_labelled
from sputnik.train.rl import RLConfig, train_rl

LENIENT = """
from sputnik.tasks.base import Problem, Task

class Lenient(Task):
    name = "lenient"

    def generate(self, rng):
        number = rng.randint(1, 10**6)
        return Problem(prompt=f"Say {number}", gold=str(number))

    def verify(self, problem, answer):
        if answer == "raise":
            raise RuntimeError("broken on purpose")
        return problem.gold in answer
"""


def line(prompt: str, answer: str, correct: bool) -> str:
    return json.dumps({"prompt": prompt, "gold": "7", "answer": answer, "correct": correct})


def test_rates_are_the_shares_of_wrong_answers_paid_and_of_right_ones_not(tmp_path: Path) -> None:
    task = tmp_path / "lenient.py"
    task.write_text(LENIENT)
    own = tmp_path / "lenient.labelled.jsonl"
    lines = [line("a", "7", True), line("a", "seven", True), line("b", "not 7", False), line("b", "8", False)]
    lines += [line("c", "7 or 8", False), line("c", "9", False), line("d", "raise", True), line("d", "7", True)]
    own.write_text("\n".join(lines) + "\n")
    loaded = load_task(str(task))
    assert labelled_set(str(task), loaded) == labelled_set(f"{task}:Lenient", loaded) == own
    report = audit_file(str(task), {}, None)
    assert report.false_positive is not None and report.false_negative is not None
    assert (report.false_positive.mean, report.false_positive.n) == (0.5, 2)
    assert (report.false_negative.mean, report.false_negative.n) == (0.25, 2), "of two questions: a half and none"
    assert report.verdicts == {"correct": 4, "wrong": 3, "error": 1}
    assert [(each["answer"], each["correct"]) for each in report.mistakes] == [
        ("seven", True), ("not 7", False), ("7 or 8", False),
    ]  # fmt: skip
    console = Console(width=100, file=io.StringIO())
    console.print(audit_table(report))
    assert re.search("wrong answers paid .* 50.0 %", console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["arithmetic", "countdown"])
def test_shipped_verifiers_pay_no_labelled_wrong_answer(name: str) -> None:
    task = load_task(name)
    file = labelled_set(name, task)
    assert file is not None
    labelled = read_labelled(file)
    assert len(labelled) >= 50 and 10 <= sum(each.correct for each in labelled) <= len(labelled) - 10
    with VerifierPool(name) as pool:
        report = audit(task, pool, file)
    assert report.false_positive is not None and report.false_positive.mean == 0.0
    assert report.false_negative is not None and report.false_negative.mean < 0.3, "words for numbers are not read"
    assert set(report.verdicts) <= {"correct", "wrong", "unparseable"}


def test_every_shipped_set_belongs_to_a_task() -> None:
    folder = Path(str(labelled_set("arithmetic", load_task("arithmetic")))).parent
    assert {path.stem for path in folder.glob("*.jsonl")} <= {name for name, _ in SHIPPED}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "set.jsonl:2: not JSON"),
        ('{"prompt": "a", "gold": "7", "answer": "7"}', 'set.jsonl:2: "correct" is missing or no bool; a line is'),
        ('{"prompt": "a", "gold": 7, "answer": "7", "correct": true}', 'set.jsonl:2: "gold" is missing or no str'),
        ('{"prompt": "a", "gold": "7", "answer": "7", "correct": true, "meta": 1}', '"meta" must be an object'),
    ],
)
def test_a_line_that_is_none_is_an_error_with_its_number(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(f"{line('a', '7', True)}\n{text}\n")
    with pytest.raises(DataError, match=message):
        read_labelled(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="they are empty"):
        read_labelled(file)


def test_a_task_without_a_set_says_how_to_give_one(tmp_path: Path) -> None:
    task = tmp_path / "bare.py"
    task.write_text(LENIENT)
    with pytest.raises(DataError, match="comes without a labelled set; give one with --audit"):
        audit_file(str(task), {}, None)


def test_a_run_tells_the_rates_before_it_begins(policy: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "task_options": {"terms": [2, 3], "largest": 5, "non_negative": True}, "steps": 1, "prompts_per_step": 2,
        "samples_per_prompt": 2, "optimizer_steps": 1, "max_tokens": 40, "eval_questions": 2, "eval_samples": 1,
        "precision": "fp32",
    }  # fmt: skip
    console = Console(width=120, file=io.StringIO())
    train_rl(RLConfig(**settings), policy.checkpoint, tmp_path / "rl", policy.meter(), console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "verifier of arithmetic, on answers labelled by people" in told
    assert json.loads((tmp_path / "rl" / "audit.json").read_text())["false_positive"]["mean"] == 0.0
