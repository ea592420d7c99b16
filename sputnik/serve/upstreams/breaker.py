"""Whether a replica is trusted with requests: pure, times are given.

    breaker = Breaker();  breaker.worked("probe", now);  breaker.failed("answer", now);  breaker.up

Probes and answers are counted apart: one whose model list works while every answer fails is down all the same. What
comes back and falls again soon has to prove itself for longer each time, so that it does not flap.
"""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["probe", "answer"]


@dataclass(frozen=True)
class Rules:
    probes: int = 2
    answers: int = 3
    """Failures in a row after which it is down."""
    rises: int = 2
    """Good probes in a row after which it is up again."""
    most: int = 32
    """The same of one that falls again and again."""
    calm: float = 60.0
    """Seconds up after which earlier falls are forgotten."""


class Breaker:
    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self.up = False
        """Not before the first good probe."""
        self.falls = 0
        self._bad: dict[Kind, int] = {"probe": 0, "answer": 0}
        self._good, self._needed, self._rose = 0, 1, -math.inf

    def worked(self, kind: Kind, now: float) -> None:
        self._bad[kind] = 0
        if self.up or kind == "answer":
            return
        self._good += 1
        if self._good >= self._needed:
            self.up, self._rose = True, now
            self._bad = {"probe": 0, "answer": 0}

    def failed(self, kind: Kind, now: float) -> None:
        self._bad[kind] += 1
        self._good = 0
        if self.up and self._bad[kind] >= (self.rules.probes if kind == "probe" else self.rules.answers):
            self.up = False
            self.falls += 1
            again = now - self._rose < self.rules.calm and self.falls > 1
            self._needed = min(self.rules.most, self._needed * 2) if again else self.rules.rises
