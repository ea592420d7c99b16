import json
from importlib.metadata import version
from pathlib import Path

import pytest

from sputnik.errors import DataError, TaskError
from sputnik.tasks.base import Verdict, load_task, self_check
from sputnik.tasks.final import boxes
from sputnik.tasks.verify import VerifierPool

pytest.importorskip("math_verify")

GOLDS = [
    "5",
    "\\frac{1}{2}",
    "x^2+1",
    "\\boxed{7}",
    "6 times 3 #### 18",
    "1,000",
    "(1,2)",
    "\\sqrt{2}",
    "\\{1,2,3\\}",
    "C",
    12,
]


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"problem": f"Question {number}?", "answer": gold} for number, gold in enumerate(GOLDS * 8)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("\\frac{1}{2}", "0.5", Verdict.CORRECT),
        ("\\frac{1}{2}", "So the result is \\boxed{1/2}.", Verdict.CORRECT),
        ("x^2+1", "$1+x^2$", Verdict.CORRECT),
        ("5", "\\boxed{5}, again \\boxed{5}", Verdict.CORRECT),
        ("11", "5 6", Verdict.UNPARSEABLE),
        ("5", "\\boxed{6} \\boxed{5}", Verdict.UNPARSEABLE),
        ("5", "5 or 6", Verdict.WRONG),
        ("\\frac{1}{2}", "The answer is \\frac{1}{2}", Verdict.UNPARSEABLE),
        ("5", "", Verdict.UNPARSEABLE),
        ("5", "\\boxed{5", Verdict.UNPARSEABLE),
        ("5", "__import__('os').getcwd()", Verdict.UNPARSEABLE),
        ("see the figure", "see the figure", Verdict.BAD_GOLD),
    ],
)
def test_equal_values_are_paid_and_hedges_are_not(gold: str, answer: str, verdict: Verdict, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "?", "gold": gold}))
    task = load_task(f"math:{path}", {"benchmark": True})
    assert task.verify(task.problems("test", 1)[0], answer) == verdict


@pytest.mark.parametrize(
    ("question", "gold", "answer", "verdict"),
    [
        (r"Compute $17 \cdot 24$.", "408", r"17 \cdot 24", Verdict.WRONG),
        (r"Compute $17 \cdot 24$.", "408", r"It is \boxed{17\cdot24}.", Verdict.WRONG),
        (r"Compute $17 \cdot 24$.", "408", "408", Verdict.CORRECT),
        ("Factor $x^2 - 1$.", "(x-1)(x+1)", "$x^2-1$", Verdict.WRONG),
        (r"Evaluate $\int_0^1 x dx$.", "1/2", r"\int_0^1 x dx", Verdict.WRONG),
        (r"Which is larger, $\frac{2}{3}$ or $0.6$?", "2/3", r"\dfrac{2}{3}", Verdict.CORRECT),
        ("Of $2x+1$ and $x-1$, which is 3 for x = 1?", "2x+1", "2x + 1", Verdict.CORRECT),
        ("Which is smaller, $-3$ or 2?", "-3.0", "-3", Verdict.CORRECT),
    ],
)
def test_a_formula_copied_from_the_question_is_no_answer(
    question: str, gold: str, answer: str, verdict: Verdict, tmp_path: Path
) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": question, "gold": gold}))
    task = load_task(f"math:{path}", {"benchmark": True})
    assert task.verify(task.problems("test", 1)[0], answer) == verdict


def test_the_file_passes_the_self_check_and_splits_by_question(file: Path) -> None:
    task = load_task(f"math:{file}")
    self_check(task, n=len(GOLDS) * 8)
    found = {split: {problem.prompt for problem in task.stream(split, 0)} for split in ("train", "validation", "test")}
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == len(GOLDS) * 8
    with pytest.raises(TaskError, match=f"only {len(found['test'])} distinct test problems; 999 were asked for"):
        task.problems("test", 999)


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    path, prompt = tmp_path / "one.jsonl", "What is\u2028 1\x85+ 1?"
    path.write_text(json.dumps({"prompt": prompt, "answer": 2}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert [p.prompt for p in load_task(f"math:{path}", {"benchmark": True}).problems("test", 1)] == [prompt]


def test_a_benchmark_is_all_test(file: Path) -> None:
    task = load_task(f"math:{file}", {"benchmark": True})
    assert len(task.problems("test", len(GOLDS) * 8)) == len(GOLDS) * 8
    with pytest.raises(TaskError, match="only 0 distinct train"):
        task.problems("train", 1)


def test_pathological_expressions_time_out_and_the_rest_is_judged(file: Path) -> None:
    options = {"benchmark": True}
    problem = load_task(f"math:{file}", options).problems("test", 1)[0]
    answers = [problem.gold, "\\boxed{9^{9^{9^9}}}", problem.gold]
    with VerifierPool(f"math:{file}", options, deadline_s=1.0) as pool:
        found = [judgement.verdict for judgement in pool.verify([(problem, answer) for answer in answers])]
    assert found == [Verdict.CORRECT, Verdict.TIMEOUT, Verdict.CORRECT]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "answer": ', r"jsonl:2: not a JSON object: "),
        ("[1, 2]", r"jsonl:2: not a JSON object: Expected `object`, got `array`"),
        ('{"prompt": "a"}', r"jsonl:2: needs an answer under one of answer, gold"),
        ('{"prompt": "a", "answer": " "}', r"jsonl:2: needs an answer"),
        ('{"text": "a", "answer": "1"}', r"jsonl:2: needs a text under one of prompt, problem, question"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        load_task(f"math:{path}").problems("train", 1)


def test_a_missing_or_empty_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_task(f"math:{tmp_path}/none.jsonl").problems("train", 1)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no problems"):
        load_task(f"math:{tmp_path}/empty.jsonl").problems("train", 1)


def test_the_version_is_the_one_installed(file: Path) -> None:
    assert load_task(f"math:{file}").version == f"math-verify {version('math-verify')}"


def test_boxes_balance_their_braces() -> None:
    assert boxes(r"\boxed{\frac{1}{2}} and \boxed{3} \boxed{4") == [r"\frac{1}{2}", "3"]
    assert boxes(r"} { \boxed{1 \boxed{2}} \boxed{\{3\}} } \boxed{{4}") == [r"1 \boxed{2}", "2", r"\{3\}"]
