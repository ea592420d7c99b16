"""The loop with a stage of one number, so that every promise is checked in milliseconds."""

import errno
import math
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sputnik.cost import Meter
from sputnik.errors import DataError
from sputnik.hardware import Hardware
from sputnik.train.guards import Guard, GuardConfig
from sputnik.train.loop import Loop, Paused, Stopped
from sputnik.train.state import read_jsonl

TIMES = {"tokens_per_s", "flops_per_s", "peak_share", "seconds", "usd"}


class Walk:
    """Adds a number drawn from the data step to its one weight; `hooks` do something at a step."""

    def __init__(
        self, losses: Mapping[int, float] | None = None, entropy: Callable[[int], float] = lambda data: 1.0
    ) -> None:
        self.weight = torch.zeros(1, dtype=torch.float64)
        self.losses = losses or {}
        self.entropy = entropy
        self.seen: list[int] = []
        self.befores = 0
        self.hooks: dict[int, Callable[[], None]] = {}

    def before(self) -> dict[str, Any]:
        self.befores += 1
        return {"weight": float(self.weight)}

    def step(self, step: int, loop: Loop) -> dict[str, Any]:
        data = loop.data_step(step)
        self.seen.append(data)
        self.hooks.get(step, lambda: None)()
        self.weight += torch.rand(1, generator=torch.Generator().manual_seed(data), dtype=torch.float64)
        loop.log("rollouts", {"step": step, "data": data})
        loop.meter.add(tokens=10)
        return {"loss": self.losses.get(data, 1.0), "weight": float(self.weight), "entropy": self.entropy(data)}

    def batch(self) -> dict[str, Tensor]:
        return {"data": torch.tensor(self.seen[-1:])}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        return {"model": {"weight": self.weight}}, {"note": "plain"}

    def load(self, read: Callable[[str], dict[str, Tensor]], plain: Mapping[str, Any]) -> None:
        assert plain == {"note": "plain"}
        self.weight = read("model")["weight"]


def make_loop(out: Path, steps: int = 40, guards: GuardConfig | None = None, **more: Any) -> Loop:
    meter = Meter(Hardware("test", 1e11, None, 1e10, 1e10, 0.1, "test"))
    config = guards or GuardConfig()
    identity = more.pop("identity", {"lr": 1})
    return Loop(
        out, steps=steps, identity=identity, meter=meter, guard=lambda: Guard(config), logs=("rollouts",), **more
    )


def curve(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_jsonl(out / "metrics.jsonl")]


class Crash(RuntimeError):
    pass


def crash() -> None:
    raise Crash


@pytest.mark.parametrize("save_steps", [0, 1, 7])
def test_a_crashed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, save_steps: int) -> None:
    straight = Walk()
    make_loop(tmp_path / "straight").run(straight)
    for crashing in (3, 11, 30):
        stage = Walk()
        stage.hooks = {crashing: crash}
        with pytest.raises(Crash):
            make_loop(tmp_path / "broken", save_steps=save_steps).run(stage)
    last = Walk()
    make_loop(tmp_path / "broken", save_steps=save_steps).run(last)
    assert last.weight.equal(straight.weight)
    assert curve(tmp_path / "broken") == curve(tmp_path / "straight")
    assert read_jsonl(tmp_path / "broken/rollouts.jsonl") == read_jsonl(tmp_path / "straight/rollouts.jsonl")


def test_step_0_is_told_once_whatever_happens_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop(tmp_path)
    monkeypatch.setattr(loop.store, "save", lambda *_: crash())
    with pytest.raises(Crash):
        loop.run(Walk())  # dies behind the line and before the save that holds its position
    stage = Walk()
    stage.hooks = {1: crash}
    with pytest.raises(Crash):
        make_loop(tmp_path).run(stage)
    last = Walk()
    make_loop(tmp_path).run(last)
    assert (stage.befores, last.befores) == (1, 0)
    assert curve(tmp_path)[0] == {"step": 0, "weight": 0.0}
    assert [line["step"] for line in curve(tmp_path)] == list(range(41))


def test_a_finished_run_does_no_step_again(tmp_path: Path) -> None:
    make_loop(tmp_path).run(Walk())
    again = Walk()
    make_loop(tmp_path).run(again)
    assert again.seen == [] and float(again.weight) == curve(tmp_path)[-1]["weight"]


def test_what_a_process_killed_while_pruning_left_is_swept_after_the_last_save(tmp_path: Path) -> None:
    make_loop(tmp_path, save_steps=1).run(Walk())
    saves = sorted((tmp_path / "resume").iterdir())
    shutil.copytree(saves[0], tmp_path / "resume/step-00000001")
    shutil.copytree(saves[0], tmp_path / "resume/.step-00000002.removed")
    make_loop(tmp_path, save_steps=1).run(Walk())
    assert sorted((tmp_path / "resume").iterdir()) == saves


@pytest.mark.parametrize(("share", "expected"), [(math.inf, [0, 1, 2, 3, 4, 5]), (1e-9, [0, 5])])
def test_saves_follow_the_clock_and_yield_to_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, expected: list[int]
) -> None:
    monkeypatch.setattr("sputnik.train.loop.SAVE_SHARE", share)
    loop = make_loop(tmp_path, steps=5, save_seconds=0.0)
    saved: list[int] = []
    save = loop.store.save
    loop.store.save = lambda step, *rest: (saved.append(step), save(step, *rest))[1]  # type: ignore[method-assign]
    loop.run(Walk())
    assert saved == expected


def test_time_and_money_go_on_after_a_resume(tmp_path: Path) -> None:
    stage = Walk()
    stage.hooks = {20: crash}
    with pytest.raises(Crash):
        make_loop(tmp_path, save_steps=10).run(stage)
    loop = make_loop(tmp_path, save_steps=10)
    loop.run(Walk())
    assert loop.meter.total.tokens == 400
    seconds = [line["seconds"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_ctrl_c_finishes_the_step_saves_and_goes_on_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = Walk()
    make_loop(tmp_path / "straight").run(straight)
    stage = Walk()
    stage.hooks = {17: lambda: os.kill(os.getpid(), signal.SIGINT)}
    with pytest.raises(Stopped):
        make_loop(tmp_path / "run").run(stage)
    assert "stopped after step 17 of 40, saved; run the same command again" in capsys.readouterr().out
    again = Walk()
    make_loop(tmp_path / "run").run(again)
    assert again.seen[0] == 18 and again.weight.equal(straight.weight)
    assert curve(tmp_path / "run") == curve(tmp_path / "straight")


def test_a_second_ctrl_c_aborts_in_the_middle_of_a_step(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stage = Walk()
    stage.hooks = {17: twice}
    with pytest.raises(KeyboardInterrupt) as error:
        make_loop(tmp_path).run(stage)
    assert not isinstance(error.value, Stopped) and stage.seen[-1] == 17


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    make_loop(tmp_path, steps=1).run(Walk())
    with pytest.raises(DataError, match=r"begun with other settings \(lr was 1, is 2\)"):
        make_loop(tmp_path, steps=1, identity={"lr": 2}).run(Walk())


# --- guards ---


def test_a_warning_is_written_down_with_the_batch_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Walk({30: 5.0})
    make_loop(tmp_path).run(stage)
    assert stage.seen == list(range(1, 41))
    assert "alarm at step 30: loss 5, median" in capsys.readouterr().err
    record = (tmp_path / "alarms/step-30.json").read_text()
    assert '"rule": "loss_spike"' in record and '"loss": 5.0' in record
    assert (tmp_path / "alarms/step-30.safetensors").stat().st_size > 0


def test_a_pause_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    losses, guards = {30: math.nan}, GuardConfig(non_finite="pause", window=5)
    with pytest.raises(Paused, match=r"paused at step 30: loss not finite.*run the same command again") as error:
        make_loop(tmp_path, guards=guards).run(Walk(losses))
    assert "\n" not in str(error.value)
    again = Walk(losses)
    make_loop(tmp_path, guards=guards).run(again)
    assert again.seen[0] == 31
    straight = Walk(losses)
    make_loop(tmp_path / "straight", guards=GuardConfig(non_finite="warn")).run(straight)
    assert again.weight.equal(straight.weight)


def test_a_rollback_returns_to_the_save_and_skips_the_data(tmp_path: Path) -> None:
    stage = Walk({27: 9.0})
    make_loop(tmp_path, guards=GuardConfig(spike="rollback"), save_steps=10).run(stage)
    assert stage.seen == [*range(1, 28), *range(28, 48)]  # steps 21.. again, with data that is new
    assert [line["step"] for line in curve(tmp_path)] == list(range(41))
    assert [line["data"] for line in read_jsonl(tmp_path / "rollouts.jsonl")] == [*range(1, 21), *range(28, 48)]


@pytest.mark.parametrize("crashing", [5, 24, 33])
def test_a_rollback_is_kept_over_a_crash(tmp_path: Path, crashing: int) -> None:
    guards = GuardConfig(spike="rollback")
    straight = Walk({27: 9.0})
    make_loop(tmp_path / "straight", guards=guards, save_steps=10).run(straight)
    stage = Walk({27: 9.0})

    def at_second_visit() -> None:
        if crashing != 24 or stage.seen[-1] > 27:
            crash()

    stage.hooks = {crashing: at_second_visit}
    with pytest.raises(Crash):
        make_loop(tmp_path / "broken", guards=guards, save_steps=10).run(stage)
    last = Walk({27: 9.0})
    make_loop(tmp_path / "broken", guards=guards, save_steps=10).run(last)
    assert last.weight.equal(straight.weight)
    assert curve(tmp_path / "broken") == curve(tmp_path / "straight")


def fading(data: int) -> float:
    """An entropy that collapses over the data of steps 20 to 26 and stays down; data from 28 on is good again."""
    return 2.0 if data < 20 or data > 27 else max(0.01, 2.0 - 0.4 * (data - 19))


@pytest.mark.parametrize("dies", ["never", "after the saves are dropped", "after the note is written"])
def test_a_rollback_goes_behind_saves_that_have_collapsed_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    guards = GuardConfig(entropy="rollback", window=10)
    straight = Walk(entropy=fading)
    make_loop(tmp_path / "straight", guards=guards, save_steps=1).run(straight)
    (note,) = read_jsonl(tmp_path / "straight/alarms/rollbacks.jsonl")
    assert note["to"] < note["at"] - 5 and fading(note["to"]) >= 1.0
    entropies = [line["entropy"] for line in curve(tmp_path / "straight")[1:]]
    assert len(entropies) == 40 and min(entropies[note["to"] :]) == 2.0
    if dies != "never":
        loop = make_loop(tmp_path / "broken", guards=guards, save_steps=1)
        with monkeypatch.context() as patch, pytest.raises(Crash):
            if dies == "after the note is written":
                patch.setattr(loop, "_restore", lambda *_: crash())
            else:
                drop = loop.store.drop_after
                patch.setattr(loop.store, "drop_after", lambda step: (drop(step), crash()))
            loop.run(Walk(entropy=fading))
        last = Walk(entropy=fading)
        make_loop(tmp_path / "broken", guards=guards, save_steps=1).run(last)
        assert last.weight.equal(straight.weight)
        assert curve(tmp_path / "broken") == curve(tmp_path / "straight")


def test_rollbacks_without_end_become_a_pause(tmp_path: Path) -> None:
    losses = dict.fromkeys(range(27, 1000), 9.0)
    with pytest.raises(Paused):
        make_loop(tmp_path, guards=GuardConfig(spike="rollback"), save_steps=10).run(Walk(losses))
    assert len(read_jsonl(tmp_path / "alarms/rollbacks.jsonl")) == 3


# --- the disk ---


def test_a_disk_that_fills_up_while_logging_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = Walk()
    make_loop(tmp_path / "straight").run(straight)
    loop = make_loop(tmp_path / "run", save_steps=10)
    stage = Walk()

    def full(name: str, record: Mapping[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stage.hooks = {26: lambda: monkeypatch.setattr(loop, "log", full)}
    with pytest.raises(DataError, match="disk full in .*run: make room and run the same command again"):
        loop.run(stage)
    last = Walk()
    make_loop(tmp_path / "run", save_steps=10).run(last)
    assert last.seen[0] == 21 and last.weight.equal(straight.weight)
    assert curve(tmp_path / "run") == curve(tmp_path / "straight")


def test_no_room_for_a_save_is_known_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    stage = Walk()
    with pytest.raises(DataError, match="nothing is saved yet"):
        make_loop(tmp_path).run(stage)
    assert stage.seen == []


def test_deterministic_algorithms_are_on_inside_and_restored(tmp_path: Path) -> None:
    found: list[bool] = []
    stage = Walk()
    stage.hooks = {1: lambda: found.append(torch.are_deterministic_algorithms_enabled())}
    make_loop(tmp_path, steps=1).run(stage)
    assert found == [True] and not torch.are_deterministic_algorithms_enabled()


def test_rows_added_by_index_sum_in_order_also_with_two_threads(tmp_path: Path) -> None:
    """Without the deterministic algorithms each such call gives other last bits than the plain loop."""
    rows = torch.randint(0, 50, (4096,), generator=torch.Generator().manual_seed(0))
    values = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(50, 64)
    for row, value in zip(rows.tolist(), values, strict=True):
        expected[row] += value
    found: list[Tensor] = []
    stage = Walk()
    stage.hooks = {1: lambda: found.append(torch.zeros(50, 64).index_put((rows,), values, accumulate=True))}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make_loop(tmp_path, steps=1).run(stage)
    finally:
        torch.set_num_threads(threads)
    assert found[0].equal(expected)
