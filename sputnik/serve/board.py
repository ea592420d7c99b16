"""What probes have found over the last day, in a few kilobytes: pure, times are given (seconds since 1970).

    board = Board(now)
    board.note("engine", True, "", now);  board.report(now)["components"]["engine"]["uptime"]
    board.go_on(board.past(), now)                 # what another process has kept

Results are counted in buckets of five minutes. What was not probed is unknown, never up: while the gateway is dead
nobody probes, and that time has no figures. Left out: more than a day, which needs a database.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

BUCKET = 300
DAY = 86_400
INCIDENTS = 50


@dataclass
class Incident:
    component: str
    began: float
    reason: str
    ended: float | None = None


@dataclass
class _Component:
    buckets: dict[int, list[int]] = field(default_factory=dict)
    """Number of the bucket -> probes that failed, probes."""
    up: bool | None = None
    """None: not probed yet."""
    last: float | None = None
    reason: str = ""


@dataclass
class Past:
    """What outlives the process."""

    since: float
    buckets: dict[str, dict[int, list[int]]]
    incidents: list[Incident]


class Board:
    def __init__(self, now: float) -> None:
        self.since = now
        self._components = {"API": _Component(), "engine": _Component()}
        self._incidents: deque[Incident] = deque(maxlen=INCIDENTS)

    def note(self, name: str, up: bool, reason: str, now: float) -> None:
        """A probe's result; `reason`: why not."""
        found = self._components[name]
        counts = found.buckets.setdefault(int(now // BUCKET), [0, 0])
        counts[0] += not up
        counts[1] += 1
        if up and found.up is False:
            self._open(name).ended = now
        elif not up and found.up is not False:
            self._incidents.append(Incident(name, now, reason))
        found.up, found.last, found.reason = up, now, "" if up else reason
        for old in [bucket for bucket in found.buckets if bucket < (now - DAY) // BUCKET]:
            del found.buckets[old]

    def past(self) -> Past:
        buckets = {name: found.buckets for name, found in self._components.items()}
        return Past(self.since, buckets, list(self._incidents))

    def go_on(self, past: Past, now: float) -> None:
        """From what was kept, before the first probe. What was down then is, until a probe is good."""
        self.since = max(past.since, now - DAY)
        first = (now - DAY) // BUCKET
        for name, found in self._components.items():
            kept = past.buckets.get(name, {})
            found.buckets = {bucket: counts for bucket, counts in kept.items() if first <= bucket <= now // BUCKET}
        self._incidents.extend(each for each in past.incidents if each.component in self._components)
        for each in self._incidents:
            if each.ended is None:
                self._components[each.component].up = False

    def _open(self, name: str) -> Incident:
        return next(each for each in reversed(self._incidents) if each.component == name and each.ended is None)

    def report(self, now: float, stale: float = 120.0) -> dict[str, Any]:
        """`stale`: seconds after which a result says nothing of now."""
        return {
            "since": self.since,
            "components": {name: self._state(found, now, stale) for name, found in self._components.items()},
            "incidents": [
                {"component": each.component, "began": each.began, "ended": each.ended, "reason": each.reason}
                for each in reversed(self._incidents)
                if each.ended is None or each.ended > now - DAY
            ],
        }

    def _state(self, found: _Component, now: float, stale: float) -> dict[str, Any]:
        known = found.last is not None and now - found.last <= stale
        first = int((now - DAY) // BUCKET) + 1
        day = [found.buckets.get(bucket, [0, 0]) for bucket in range(first, first + DAY // BUCKET)]
        failed, probes = sum(bad for bad, _ in day), sum(count for _, count in day)
        return {
            "state": "unknown" if not known else "up" if found.up else "down",
            "reason": found.reason if known else "",
            "probed": found.last,
            "probes": probes,
            "uptime": None if not probes else 1 - failed / probes,
            "day": [None if not count else 1 - bad / count for bad, count in day],
        }
