"""The serving benchmark times nothing whose outputs differ."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.service import finite, row
from benchmarks.serving.files import Files
from benchmarks.serving.measure import Bench, Case, summary
from benchmarks.serving.side import Absent, Side
from sputnik.hardware import CpuSpeed
from sputnik.model.checkpoint import load_model, save_model

CASE = Case("decode", "tiny", "fp32", 2, 8, 6, 1.0, 1.0, ("twin",))
BENCH = Bench(CpuSpeed("a machine", 1, 2**30, 1e10, 1e10, 1e10), 1, random.Random(0), lambda _: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPUTNIK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Files(Path("no such folder"), threads=1)


@pytest.fixture(scope="module")
def twin(files: Files) -> Iterator[Side]:
    with files.open("twin", "tiny", "fp32") as side:
        yield side


def test_equal_models_pass_the_check_and_are_timed(twin: Side) -> None:
    assert BENCH.check(CASE, twin, twin).startswith("100.0%")
    row = BENCH.compare(CASE, twin, twin)
    assert row["ours"] > 0 and row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]


def test_a_model_with_one_changed_layer_is_not_timed(files: Files, twin: Side, tmp_path: Path) -> None:
    changed = load_model(files.cache / "tiny")
    changed.state_dict()["model.layers.1.mlp.experts.down_proj"].mul_(3)
    save_model(changed, tmp_path)
    with files.open("twin", str(tmp_path), "fp32") as other, pytest.raises(Absent, match="outputs differ"):
        BENCH.check(CASE, twin, other)


def test_a_peer_that_is_not_installed_names_the_script(files: Files) -> None:
    with pytest.raises(Absent, match=r"scripts/peers\.sh llama"):
        files.open("llama", "tiny", "bf16")


def test_a_side_that_dies_tells_its_last_words() -> None:
    with pytest.raises(Absent, match="ended with 3: no such model"):
        Side([sys.executable, "-c", "import sys; print('no such model', file=sys.stderr); sys.exit(3)"], {})


def test_a_side_that_died_is_closed_whatever_it_was_still_asked() -> None:
    child = """print('{"seconds": 0, "value": 0}', flush=True); input(); exit(3)"""
    with Side([sys.executable, "-c", child], {}) as side:
        for _ in range(2):
            with pytest.raises(Absent, match="ended with 3"):
                side.ask("generate")


def test_a_row_with_a_time_that_never_came_is_json() -> None:
    shown = finite(row("F4", float("inf"), 2.0, "<= 5", False, range=[float("nan"), 1.0]))
    assert (shown["ours"], shown["idle"], shown["ratio"], shown["range"]) == (None, 2.0, None, [None, 1.0])


def test_the_ratio_is_that_of_rounds_side_by_side() -> None:
    assert summary([10, 30, 20], [10, 10, 20])["ratio"] == 1
    assert summary([10, 30, 20], [10, 10, 20])["ratio_range"] == [1, 3]
    assert summary([], [5.0])["ratio"] is None
