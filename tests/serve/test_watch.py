"""When a process is taken for sick and when it is started again, on a clock of our own."""

import pytest

from sputnik.serve.beats import Beat
from sputnik.serve.watch import GATEWAY, WRONG, Rules, Watch

RULES = Rules(silence=8, loading=60, stall=100, failures=3, first=0.1, slowest=5, well=30)


def ready(now: float = 0.0) -> Watch:
    watch = Watch(RULES)
    watch.started(now)
    watch.heard(Beat("loading"), now)
    watch.heard(Beat("ready"), now)
    return watch


def test_silence_is_noticed_and_beats_are_enough() -> None:
    watch = ready()
    for second in range(100):
        watch.heard(Beat("ready", steps=0, busy=0), second)
        assert watch.sick(second + 7) is None
    assert "no sign of life" in (watch.sick(99 + 9) or "")


def test_a_silence_that_nobody_listened_to_is_none() -> None:
    watch = ready()
    watch.heard(Beat("ready", steps=1, busy=1), 10)
    watch.slept(500)
    assert watch.sick(515) is None and "no sign of life" in (watch.sick(520) or "")


def test_loading_may_be_silent_for_longer() -> None:
    watch = Watch(RULES)
    watch.started(0)
    assert watch.sick(59) is None and watch.sick(61)
    for second in range(0, 500, 50):
        watch.heard(Beat("loading"), second)
    assert watch.sick(505) is None, "a large model takes its time"


def test_a_busy_process_that_takes_no_step_stands_still() -> None:
    watch = ready()
    for second in range(150):
        watch.heard(Beat("ready", steps=7, busy=3), second)
        assert (watch.sick(second) is None) == (second <= 100)
    watch.heard(Beat("ready", steps=8, busy=3), 150)
    assert watch.sick(150) is None
    watch.heard(Beat("ready", steps=8, busy=0), 400)
    assert watch.sick(400) is None, "who has nothing to do takes no steps"


def test_a_gateway_lives_while_its_loop_turns_however_long_an_answer_is() -> None:
    watch = Watch(GATEWAY)
    watch.started(0)
    for second in range(600):
        watch.heard(Beat("ready", steps=second * 4, busy=1), second)
        assert watch.sick(second) is None
    for second in range(600, 640):
        watch.heard(Beat("ready", steps=2400, busy=0), second)
    assert "no step" in (watch.sick(640) or ""), "its loop stands still, though a thread of it beats"


def test_what_was_ready_is_started_again_for_ever_and_ever_more_slowly() -> None:
    watch, now, delays = Watch(RULES), 0.0, []
    for _ in range(20):
        watch.started(now)
        watch.heard(Beat("ready"), now)
        delay = watch.ended(-9, now + 1)
        assert delay is not None
        delays.append(delay)
        now += 1 + delay
    assert delays[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8]) and delays[-1] == 5
    watch.started(now)
    watch.heard(Beat("ready"), now)
    assert watch.ended(-9, now + 31) == pytest.approx(0.1), "after a good while its earlier deaths are forgotten"


def test_what_never_comes_up_is_given_up() -> None:
    watch = Watch(RULES)
    found = []
    for now in range(3):
        watch.started(now)
        watch.heard(Beat("loading"), now)
        found.append(watch.ended(1, now))
    assert found[-1] is None and None not in found[:-1]


def test_wrong_settings_are_not_tried_again() -> None:
    watch = Watch(RULES)
    watch.started(0)
    assert watch.ended(WRONG, 1) is None
    assert ready().ended(WRONG, 1) is not None, "what has been ready was not wrong"
