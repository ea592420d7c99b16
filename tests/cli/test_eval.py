"""`sputnik eval` on a real (untrained) model: files that go on, comparison, curves; nothing asked for is ignored."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from sputnik.__main__ import main
from sputnik.cli.eval import EvalModelConfig, comparison_table
from sputnik.eval.compare import compare
from sputnik.eval.published import tables
from sputnik.eval.results import load_result

SMALL = ("--questions", "4", "--samples", "2", "--max-tokens", "12", "--precision", "fp32")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as on a wide screen, so that words stay whole."""
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture(scope="module")
def saved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("saved") / "saved.json"
    assert main(["eval", str(checkpoint), "--suite", "arithmetic", *SMALL, "--out", str(out)]) == 0
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_score_has_its_evidence_and_a_second_run_asks_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    arguments = ["eval", str(checkpoint), "--task", "arithmetic", "--option", "largest=5", *SMALL, "--out", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for words in ("pass@1", "cons@2", "(n=4, k=2)", "best constant answer", "truncated", "temperature 0.6, top_p 0.95",
                  "max_tokens 12", "arithmetic, version", "chat ", "verdicts"):  # fmt: skip
        assert words in shown, words
    found = read(out)
    assert (found["n"], found["k"], found["model"], "samples" in found) == (4, 2, str(checkpoint), False)
    answers = (tmp_path / "scores.samples.jsonl").read_bytes()
    assert len(answers.splitlines()) == 8
    assert main(arguments) == 0
    again = read(out)
    assert again.pop("tokens_per_s") == 0 and again.pop("seconds") != found.pop("seconds") and found.pop("tokens_per_s")
    assert again == found and (tmp_path / "scores.samples.jsonl").read_bytes() == answers
    assert main([*arguments, "--seed", "1"]) == 2
    assert "another model, to another task or with other settings" in capsys.readouterr().err


def test_two_models_and_two_saved_results_are_compared_pair_by_pair(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    pair = ["eval", str(checkpoint), "--against", str(checkpoint), "--suite", "arithmetic", *SMALL, "--out", str(out)]
    assert main(pair) == 0
    shown = capsys.readouterr().out
    assert "difference of pass@1" in shown and "p = 1 over 4 common questions" in shown
    first, second = load_result(out), load_result(tmp_path / "a.against.json")
    assert first.suite == "arithmetic" and first.questions == second.questions
    assert read(tmp_path / "a.comparison.json") == json.loads(json.dumps(compare(first, second).to_dict()))
    assert main(["eval", str(out), "--against", str(tmp_path / "a.against.json")]) == 0
    saved = capsys.readouterr().out
    table = re.compile(r"difference of pass@1 .*")
    assert table.findall(saved) == table.findall(shown)
    assert "second better on 0, first better on 0" in saved and "not alike" not in saved


def test_what_was_not_alike_stands_in_the_comparison(saved: Path) -> None:
    one = load_result(saved)
    table = comparison_table(compare(one, replace(one, decoding={**one.decoding, "temperature": 0.9})))
    assert ("not alike", "temperature 0.6 and 0.9") in list(zip(*(column.cells for column in table.columns)))


def test_scaling_writes_its_curves_beside_the_score(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.json"
    flags = ("--scaling", "--budgets", "2", "4", "--out", str(out))
    assert main(["eval", str(checkpoint), "--task", "arithmetic", *SMALL, *flags]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("at most 2", "at most 4", "free", "Wait x 4", "the vote right (cons@k)"))
    points = read(tmp_path / "s.scaling.json")["points"]
    assert [point["budget"] for point in points] == [2, 4, None, None, None, None]
    assert points[2]["pass_at_1"] == read(out)["pass_at_1"]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"s.samples.jsonl", "s.budget-2.jsonl", "s.budget-4.jsonl", "s.extend-1.jsonl", "s.extend-4.jsonl"} < names


def test_published_tables_show_every_source_and_ours_beside_them(
    checkpoint: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--published", "all"]) == 0
    shown = capsys.readouterr().out
    for each in tables():
        assert each.title in shown and all(source in shown for source in each.sources)
    assert "…" not in shown, "no name is cut, however narrow the terminal is"
    assert main(["eval", str(saved), "--published", "stages"]) == 0
    shown = capsys.readouterr().out
    assert f"ours: {checkpoint}" in shown and "ours: arithmetic, 4 questions, k 2" in shown
    assert "temperature 0.6, top-p 0.95, at most 32,768 tokens" in shown


def test_the_help_names_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"({', '.join(each.name for each in tables())}, all)" in shown
    assert "--endpoint.key-env" in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "name a model to evaluate"),
        (["--against", "a"], "name that one, too"),
        (["MODEL"], "needs a task or a suite, and not both"),
        (["MODEL", "--task", "arithmetic", "--suite", "countdown"], "needs a task or a suite, and not both"),
        (["MODEL", "--suite", "sums"], "no suite 'sums'; choose one of arithmetic, countdown"),
        (["MODEL", "--task", "arithmetic", "--budgets", "3"], "budgets are those of scaling"),
        (["MODEL", "--task", "arithmetic", "--scaling", "--thinking-budget", "3"], "leave out thinking_budget"),
        (["MODEL", "--task", "arithmetic", "--endpoint.concurrency", "3"], "--endpoint settings are those of a URL"),
        (["http://127.0.0.1:9/v1", "--task", "arithmetic", "--scaling"], "needs models on our own engine, not a URL"),
        (["http://127.0.0.1:9/v1", "--task", "arithmetic"], "cannot be reached"),
        (["SAVED", "--task", "arithmetic"], "a saved result is not evaluated again"),
        (["SAVED", "--out", "x.json"], "there is nothing new to write"),
        (["SAVED", "--samples", "3"], "--samples is for asking models, and there is none to ask"),
        (["MODEL", "--task", "arithmetic", "--out", "."], "--out .: name a file, not a directory"),
        (["MODEL", "--task", "arithmetic", "--published", "r2"], "no published table 'r2'"),  # before it is asked
        (["nowhere", "--task", "arithmetic"], "neither a checkpoint directory nor a run"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused_in_one_line(
    checkpoint: Path, saved: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    places = {"MODEL": str(checkpoint), "SAVED": str(saved)}
    assert main(["eval", *(places.get(flag, flag) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_settings_of_the_command_are_all_handed_on() -> None:
    given = EvalModelConfig(
        model="m", suite="countdown", option=("largest=7",), split="validation", questions=3, samples=5, top_p=0.2,
        temperature=0.1, max_tokens=9, template="zero", precision="bf16", seed=4, scaling=True, budgets=(1, 2),
    )  # fmt: skip
    settings = given.settings()
    shared = {field.name for field in fields(given)} & {field.name for field in fields(settings)}
    assert {name: getattr(settings, name) for name in shared} == {name: getattr(given, name) for name in shared}
    assert len(shared) == 14 and settings.task_options == {"largest": 7}
