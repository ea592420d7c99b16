"""The published tables: every cell has its source, the known traps are avoided, and ours never pass for theirs."""

from dataclasses import replace

import pytest

from sputnik.errors import ConfigError
from sputnik.eval.published import beside, table, tables
from sputnik.eval.results import EvalResult
from sputnik.eval.stats import pass_at_1
from sputnik.tasks.base import BestConstant


def value(name: str, benchmark: str, model: str) -> float | None:
    (found,) = [cell.value for cell in table(name).cells if (cell.benchmark, cell.model) == (benchmark, model)]
    return found


def test_every_cell_has_a_source_and_a_possible_value() -> None:
    names = [each.name for each in tables()]
    assert names == ["v3-base", "v3", "zero", "r1", "stages", "contests", "distilled"]
    for each in tables():
        assert each.protocol and len({(cell.benchmark, cell.model) for cell in each.cells}) == len(each.cells)
        assert len(each.cells) == len(each.models) * len(each.benchmarks)
        for cell in each.cells:
            assert cell.source.startswith(("V3 report, table", "R1 report version 1, table", "R1 report version 2"))
            percent = not any(word in cell.benchmark for word in ("rating", "tokens", "bits", "score"))
            assert cell.value is None or (0 < cell.value <= 100 if percent else cell.value > 0), cell


def test_cells_are_those_of_the_reports_where_versions_part() -> None:
    assert value("zero", "AIME 2024", "R1-Zero (v1)") == 71.0
    assert value("zero", "AIME 2024", "R1-Zero (v2)") == value("stages", "AIME 2024", "R1-Zero") == 77.9
    assert (
        value("zero", "AIME 2024 cons@64", "R1-Zero (v1)") == value("zero", "AIME 2024 cons@16", "R1-Zero (v2)") == 86.7
    )
    assert value("zero", "AIME 2024 cons@64", "R1-Zero (v2)") is None
    assert value("distilled", "AIME 2024", "R1-Zero-Qwen-32B") == 47.0
    assert value("distilled", "Codeforces, rating", "R1-Zero-Qwen-32B") is None
    assert value("v3", "LiveCodeBench", "V3") == 40.5 and value("r1", "LiveCodeBench", "V3") == 36.2


def test_tables_that_share_cells_agree() -> None:
    """Table 4 of the first version is in two of ours, and distillation repeats columns of it."""
    for benchmark in table("stages").benchmarks:
        assert value("stages", benchmark, "R1") == value("r1", benchmark, "R1")
    for benchmark in ("AIME 2024", "MATH-500", "GPQA Diamond", "LiveCodeBench", "Codeforces, rating"):
        for model in ("o1-mini", "GPT-4o", "Claude-3.5"):
            assert value("distilled", benchmark, model) == value("r1", benchmark, model)


def ours(suite: str, model: str = "mine", k: int = 64) -> EvalResult:
    score = pass_at_1([[True] * 3 + [False]] * 25)
    return EvalResult(
        task="choice", task_version="1", template="chat", template_hash="t", decoding={"temperature": 0.6, "k": k},
        n=25, k=k, pass_at_1=score, cons_at_k=score, pass_at_k={"1": score}, best_constant=BestConstant("B", 0.3),
        verdicts={}, truncated=0.125, well_formed=1.0, self_check=0.0, length=1.0, length_finished=1.0,
        thinking_length=0.0, seconds=1.0, tokens_per_s=1.0, warnings=(), questions=(), model=model, suite=suite,
    )  # fmt: skip


def test_ours_stand_in_their_own_column_with_how_they_were_measured() -> None:
    grid = beside(table("r1"), [ours("gpqa-diamond-25")])
    assert grid.columns[-2:] == ("R1", "ours: mine")
    rows = {row[0]: row for row in grid.rows}
    assert rows["GPQA Diamond"][-2:] == ("71.5", "75.0 [65.2, 82.8]")
    assert all(row[-1] == "-" for name, row in rows.items() if name != "GPQA Diamond")
    (note,) = [note for note in grid.notes if note.startswith("ours: ")]
    for word in (
        "25 of 198 questions",
        "k 64",
        "temperature 0.6",
        "12.5 % truncated",
        "verifier choice 1",
        "template chat t",
    ):
        assert word in note
    assert any(note.startswith("published protocol: temperature 0.6") for note in grid.notes)


def test_a_benchmark_of_another_year_or_of_ours_gets_a_row_of_its_own() -> None:
    grid = beside(table("stages"), [ours("aime-2025"), ours("arithmetic", "other"), ours("", "third")])
    rows = {row[0]: row for row in grid.rows}
    assert rows["AIME 2024"][-3:] == ("-", "-", "-")
    assert rows["AIME 2025"] == ("AIME 2025", *["-"] * 5, "75.0 [65.2, 82.8]", "-", "-")
    assert rows["arithmetic"][-2] == rows["choice"][-1] == "75.0 [65.2, 82.8]"
    assert beside(table("contests"), [ours("aime-2025")]).rows[0][-1] == "75.0 [65.2, 82.8]"


def test_a_consensus_counts_only_with_as_many_votes() -> None:
    aime = replace(ours("aime-2025"), suite="")
    same = replace(aime, task="AIME 2024")
    rows = {row[0]: row[-1] for row in beside(table("distilled"), [same]).rows}
    assert rows["AIME 2024 cons@64"] == rows["AIME 2024"] == "75.0 [65.2, 82.8]"
    fewer = {row[0]: row[-1] for row in beside(table("distilled"), [replace(same, k=16)]).rows}
    assert fewer["AIME 2024 cons@64"] == "-" and "AIME 2024 cons@16" not in fewer


def test_unknown_tables_are_answered_with_the_known() -> None:
    with pytest.raises(ConfigError, match="no published table 'r2'; choose one of v3-base, v3"):
        table("r2")
