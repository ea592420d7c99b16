"""When a process is sick, and when it is started again: pure, times are given.

    watch = Watch(Rules());  watch.started(now)
    watch.heard(beat, now);  reason = watch.sick(now)      # a reason to kill it, or None
    delay = watch.ended(code, now)                         # seconds until it is started again, None: give up

A process that does not beat is stopped or dead; one that beats with requests under way and takes no step stands still
in one. A gateway takes steps with and without requests: its loop looks at the clock. What comes up and dies is started
again for ever, ever more slowly; what never comes up is given up.
"""

from dataclasses import dataclass

from sputnik.serve.beats import Beat

WRONG = 2
"""The exit code of a process whose settings or model are wrong: trying again would not mend them."""


@dataclass(frozen=True)
class Rules:
    silence: float = 8.0
    """Seconds without a beat, once it is ready."""
    loading: float = 120.0
    """The same before: imports and reading let nothing else run at times."""
    stall: float = 180.0
    """Seconds in one step."""
    always: bool = False
    """It takes steps without requests too."""
    failures: int = 5
    """Starts in a row that did not come up."""
    first: float = 0.1
    slowest: float = 10.0
    """Seconds before it is started again."""
    well: float = 60.0
    """Seconds after which earlier deaths are forgotten."""


WORKER = Rules()
GATEWAY = Rules(stall=30.0, always=True)


class Watch:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.ready = False
        self.last: Beat | None = None
        self._heard = self._moved = self._began = 0.0
        self._deaths = self._failures = 0

    def started(self, now: float) -> None:
        self._heard = self._moved = self._began = now
        self.ready, self.last = False, None

    def heard(self, beat: Beat, now: float) -> None:
        idle = not beat.busy and not self.rules.always
        if self.last is None or idle or beat.steps != self.last.steps or beat.state != self.last.state:
            self._moved = now
        self._heard, self.last = now, beat
        if beat.state == "ready":
            self.ready, self._failures = True, 0

    def slept(self, seconds: float) -> None:
        """Nobody listened for so long: the supervisor was stopped itself, with its children or without."""
        self._heard += seconds
        self._moved += seconds

    def sick(self, now: float) -> str | None:
        if now - self._heard > (self.rules.silence if self.ready else self.rules.loading):
            return f"no sign of life for {now - self._heard:.0f} s"
        if now - self._moved > self.rules.stall and self.last is not None and self.last.state != "loading":
            return f"no step for {now - self._moved:.0f} s"
        return None

    def ended(self, code: int, now: float) -> float | None:
        if code == WRONG and not self.ready:
            return None
        self._failures = 0 if self.ready else self._failures + 1
        self._deaths = self._deaths + 1 if now - self._began < self.rules.well else 1
        if self._failures >= self.rules.failures:
            return None
        return min(self.rules.slowest, self.rules.first * 2 ** (self._deaths - 1))
