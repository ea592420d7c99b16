"""`sputnik reward-model` as a user runs it: on their pairs and labels, then on a file of answers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sputnik.__main__ import main
from sputnik.recipe.checkpoints import find_checkpoint

DOCS = Path(__file__).parent.parent.parent / "docs" / "reward-models.md"


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"What is {n} + 1?", "chosen": f"It is {n + 1}.", "rejected": f"No, {n}!", "defect": "rude"}
        for n in range(count)
    ] + [{"prompt": f"What is {n} + 2?", "chosen": f"{n + 2}", "rejected": f"Go away {n}!!"} for n in range(count)]


FAST = ("--precision", "fp32", "--batch", "16", "--lr", "3e-3")


def test_a_file_of_pairs_becomes_a_judge_that_scores_a_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "pairs.jsonl", pairs(60)), tmp_path / "judge"
    assert main(["reward-model", str(checkpoint), "--pairs", str(file), "--out", str(out), *FAST]) == 0
    said = capsys.readouterr().out
    assert "held-out accuracy" in said and "the longer one wins" in said and "rude" in said
    assert json.loads((out / "scores.json").read_text())["accuracy"]["mean"] > 0.9
    answers = [
        {"prompt": "What is 3 + 1?", "chosen": "It is 4.", "rejected": "No, 3!", "id": 7},
        {"messages": [{"role": "user", "content": "What is 3 + 1?"}], "response": "It is 4."},
    ]
    scored = tmp_path / "scored.jsonl"
    arguments = ["--score", str(write(tmp_path / "answers.jsonl", answers)), "--out", str(scored)]
    assert main(["reward-model", str(out), *arguments, "--precision", "fp32"]) == 0
    first, second = (json.loads(line) for line in scored.read_text().splitlines())
    assert first["id"] == 7 and first["scores"]["chosen"] > first["scores"]["rejected"]
    assert second["scores"]["response"] == pytest.approx(first["scores"]["chosen"], abs=1e-4)
    assert second["standard_scores"]["response"] > first["standard_scores"]["rejected"]


def test_labels_become_a_judge_of_safety_with_a_chance(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"prompt": f"What is {n} + 1?", "response": "It is nice." if n % 2 else "Hit them all!", "safe": bool(n % 2)}
        for n in range(120)
    ]
    file, out = write(tmp_path / "labels.jsonl", lines), tmp_path / "judge"
    test = write(tmp_path / "test.jsonl", lines[-20:])
    arguments = ["--labels", str(file), "--test", str(test), "--out", str(out), *FAST]
    assert main(["reward-model", str(checkpoint), *arguments]) == 0
    assert "unsafe caught, safe passed" in capsys.readouterr().out
    counts = json.loads((out / "scores.json").read_text())["counts"]
    assert counts["held_out"] == counts["also_held_out"] == 20
    scored = tmp_path / "scored.jsonl"
    assert main(["reward-model", str(out), "--score", str(test), "--out", str(scored), "--precision", "fp32"]) == 0
    for line in map(json.loads, scored.read_text().splitlines()):
        assert (line["safe_chances"]["response"] > 0.5) == line["safe"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "x"], "give one of --pairs FILE, --labels FILE and --score FILE"),
        (["--pairs", "a", "--score", "b", "--out", "x"], "give one of"),
        (["--score", "b", "--bad-lines", "drop", "--out", "x"], "--bad-lines is for training"),
        (["--pairs", "missing.jsonl", "--out", "x"], "missing.jsonl: no such file"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["reward-model", str(checkpoint), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_bad_line_of_answers_is_named_and_no_file_is_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "judge"
    main(
        [
            "reward-model",
            str(checkpoint),
            "--pairs",
            str(write(tmp_path / "p.jsonl", pairs(12))),
            "--out",
            str(out),
            *FAST,
        ]
    )
    for bad, reason in (
        ('{"prompt": "q"}', "no text .response. to score"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
    ):
        answers = tmp_path / "answers.jsonl"
        answers.write_text(f'{{"prompt": "q", "response": "a"}}\n{bad}\n')
        capsys.readouterr()
        assert main(["reward-model", str(out), "--score", str(answers), "--out", str(tmp_path / "scored.jsonl")]) == 2
        assert re.search(rf"answers.jsonl:2: .*{reason}", capsys.readouterr().err)
        assert not (tmp_path / "scored.jsonl").exists()


def test_the_example_of_the_page_runs(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files and its Python, with our checkpoint in place of the user's run."""
    page = DOCS.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", pairs(12))
    for line in re.findall(r"^\{.*\}$", page, re.MULTILINE):
        record = json.loads(line)
        name = "labels" if "safe" in record else "pairs"
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(line + "\n")
    (command,) = re.findall(r"^sputnik (reward-model .*--pairs .*)$", page, re.MULTILINE)
    words = [str(checkpoint) if word == "runs/mine" else word for word in command.split()]
    assert main(words) == 0
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names["scores"]) == 2


def test_a_judge_is_not_taken_for_a_model_to_talk_to(checkpoint: Path, tmp_path: Path) -> None:
    """Its head for words is the parent's and no longer fits its backbone."""
    out = tmp_path / "judge"
    main(
        [
            "reward-model",
            str(checkpoint),
            "--pairs",
            str(write(tmp_path / "p.jsonl", pairs(12))),
            "--out",
            str(out),
            *FAST,
        ]
    )
    with pytest.raises(ValueError, match="reward model"):
        find_checkpoint(str(out))
