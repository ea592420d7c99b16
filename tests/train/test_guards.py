from typing import Any

import pytest
import torch
from torch import nn

from sputnik.errors import ConfigError
from sputnik.train.guards import Alarm, Guard, GuardConfig, first_non_finite

NAN = float("nan")


def alarms(records: list[dict[str, Any]], config: GuardConfig | None = None) -> list[Alarm]:
    guard = Guard(config or GuardConfig())
    found = [guard.check({"step": step, **record}) for step, record in enumerate(records, 1)]
    return [alarm for alarm in found if alarm is not None]


def steady(count: int, **values: float) -> list[dict[str, Any]]:
    return [{key: value * (1 + 0.01 * (n % 3)) for key, value in values.items()} for n in range(count)]


def test_a_healthy_run_is_quiet() -> None:
    falling = [{"loss": 8.0 / (1 + n / 20) + 1, "grad_norm": 1.0 + (n % 5)} for n in range(200)]
    growing = [
        {"entropy": 2 - n / 400, "length": 50.0 + 5 * n, "reward": n / 200, "truncated": 0.1} for n in range(200)
    ]
    assert alarms(falling) == [] == alarms(growing)


def test_a_loss_spike_is_seen_at_its_step() -> None:
    (alarm,) = alarms([*steady(40, loss=3.0), {"loss": 4.5}, *steady(40, loss=3.0)])
    assert (alarm.rule, alarm.step, alarm.action) == ("loss_spike", 41, "warn")
    assert "4.5" in alarm.message


def test_a_gradient_spike_is_seen() -> None:
    (alarm,) = alarms([*steady(40, grad_norm=0.5), {"grad_norm": 50.0}])
    assert alarm.rule == "grad_norm_spike"


@pytest.mark.parametrize("value", [NAN, float("inf"), None])
@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_one_step_that_is_not_finite_is_a_warning_and_five_in_a_row_a_pause(key: str, value: float | None) -> None:
    """None is how the log writes NaN."""
    healthy = {"loss": 1.0, "grad_norm": 1.0}
    bad = {**healthy, key: value, "non_finite": "gradient of x (1 of 3 values)"}
    (single,) = alarms([healthy, bad, healthy])
    assert (single.action, single.step) == ("warn", 2)
    assert key in single.message and "first in gradient of x" in single.message and "skipped" in single.message
    row = alarms([healthy, *[bad] * 5])
    assert [alarm.action for alarm in row] == ["warn"] * 4 + ["pause"]


def test_entropy_collapse_is_seen_and_a_slow_fall_is_not() -> None:
    collapse = [*steady(30, entropy=2.0), *steady(10, entropy=0.05)]
    assert [alarm.rule for alarm in alarms(collapse)] == ["entropy_collapse"]
    assert alarms([{"entropy": 2.0 - 1.5 * n / 100} for n in range(100)]) == []


def test_length_collapse_and_truncation_are_seen() -> None:
    assert [a.rule for a in alarms([*steady(30, length=100.0), *steady(10, length=5.0)])] == ["length_collapse"]
    assert [a.rule for a in alarms([*steady(30, truncated=0.1), *steady(10, truncated=0.8)])] == ["truncated_high"]
    assert [a.rule for a in alarms(steady(10, clip_share=0.9))] == ["clip_share_high"]


def test_a_constant_reward_is_reported_once_and_again_after_it_moved() -> None:
    stuck = [{"format_reward": 0.0, "reward": n / 100} for n in range(50)]
    assert [(alarm.rule, alarm.step) for alarm in alarms(stuck)] == [("constant_format_reward", 20)]
    moved = [*stuck, {"format_reward": 0.5, "reward": 1.0}, *[{**record, "reward": NAN} for record in stuck]]
    assert [alarm.step for alarm in alarms(moved)] == [20, 71]


def test_a_reward_that_is_always_won_is_no_fault() -> None:
    """The form is learned early; that says nothing against a run whose answers are still getting better."""
    pausing = GuardConfig(constant_reward="pause")
    healthy = [{"format_reward": 1.0, "accuracy_reward": n / 100, "reward": 1 + n / 100} for n in range(60)]
    assert alarms(healthy, pausing) == []
    solved = [{"format_reward": 1.0, "accuracy_reward": 1.0, "reward": 2.0}] * 60
    assert alarms(solved, pausing) == []
    lost = [{"format_reward": 1.0, "accuracy_reward": 0.0, "reward": 1.0}] * 60
    assert [(alarm.rule, alarm.step) for alarm in alarms(lost, pausing)] == [("constant_accuracy_reward", 20)]
    stuck = [{"format_reward": n / 60, "accuracy_reward": 1 - n / 60, "reward": 1.0} for n in range(60)]
    assert [(alarm.rule, alarm.action) for alarm in alarms(stuck, pausing)] == [("constant_reward", "pause")]


def test_an_alarm_knows_the_last_step_that_was_well() -> None:
    sudden = [*steady(30, entropy=2.0), *steady(10, entropy=0.05)]
    assert [(alarm.step, alarm.since) for alarm in alarms(sudden)] == [(34, 30)]
    slow = [{"entropy": 2.0 - 1.9 * min(1, n / 60)} for n in range(100)]
    (first, *_) = alarms(slow, GuardConfig(window=30))
    half = sum(record["entropy"] for record in slow[:30]) / 30 / 2
    assert slow[first.since - 1]["entropy"] >= half > slow[first.since]["entropy"]
    (first, *_) = alarms(slow)
    assert first.since == first.step - 1 - 20, "nothing within the window was well"
    (high, *_) = alarms([*steady(30, truncated=0.1), *steady(10, truncated=0.8)])
    assert high.since == 30
    (stuck,) = alarms([{"reward": 0.5 + n} for n in range(10)] + [{"reward": 3.0}] * 20)
    assert (stuck.step, stuck.since) == (30, 10)
    *_, broken = alarms([{"loss": 1.0}, {"loss": 1.0}, *[{"loss": NAN}] * 5])
    assert (broken.action, broken.since) == ("pause", 1), "step 2 may have spoilt what step 3 could not use"


def test_a_window_too_short_to_see_a_collapse_is_refused() -> None:
    with pytest.raises(ConfigError, match="window = 4: a guard looks at 5 steps at least"):
        GuardConfig(window=4)


def test_a_lasting_fault_speaks_once_per_window() -> None:
    records = [*steady(30, entropy=2.0), *steady(45, entropy=0.01)]
    assert len(alarms(records)) == 3


def test_the_gravest_action_wins_and_off_is_off() -> None:
    config = GuardConfig(spike="rollback", entropy="pause", clipped="off")
    records = [*steady(30, loss=1.0, entropy=2.0, clip_share=0.9)]
    records += [{"loss": 1.0, "entropy": 0.0, "clip_share": 0.9}] * 4 + [{"loss": 9.0, "entropy": 0.0}]
    found = alarms(records, config)
    assert {alarm.action for alarm in found} == {"rollback", "pause"}
    assert found[-1].rule == "loss_spike"
    assert alarms(records, GuardConfig(spike="off", entropy="off", clipped="off")) == []


def test_a_guard_rebuilt_from_the_log_decides_the_same() -> None:
    records = [*steady(30, loss=2.0), {"loss": 5.0}, {"loss": NAN}, *steady(25, loss=2.0), {"loss": 5.0}]
    logged = [{**r, "loss": None if r["loss"] != r["loss"] else r["loss"]} for r in records]
    straight = Guard(GuardConfig())
    expected = [straight.check({"step": step, **record}) for step, record in enumerate(records, 1)]
    for cut in (10, 31, 40):
        guard = Guard(GuardConfig())
        for step, record in enumerate(logged[:cut], 1):
            guard.check({"step": step, **record})
        rest = [guard.check({"step": step, **record}) for step, record in enumerate(records[cut:], cut + 1)]
        assert rest == expected[cut:]


def test_the_first_bad_tensor_is_named_in_order_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    losses = {"loss": torch.tensor(1.0)}
    assert first_non_finite(model, losses) is None
    assert model[1].weight.grad is not None and model[0].bias.grad is not None
    model[1].weight.grad[0, 0] = NAN
    model[0].bias.grad[:] = float("inf")
    assert first_non_finite(model, losses) == "gradient of 0.bias (2 of 2 values)"
    with torch.no_grad():
        model[1].bias[0] = NAN
    assert first_non_finite(model, losses) == "weight 1.bias (1 of 2 values)"
    assert first_non_finite(model, {"loss": torch.tensor(NAN)}) == "loss (1 of 1 values)"


def test_a_loss_that_always_swings_raises_no_alarm() -> None:
    guard = Guard(GuardConfig(window=8))
    losses = [1.0, 2.6, 1.2, 3.0, 0.9, 2.8, 1.1, 3.1, 1.0, 3.2, 0.9, 3.4]
    assert [guard.check({"step": n, "loss": loss}) for n, loss in enumerate(losses, 1)] == [None] * len(losses)
    spike = guard.check({"step": 13, "loss": 9.0})
    assert spike is not None and spike.rule == "loss_spike"
