"""Whether a replica is trusted with requests: pure, times are given.

    breaker = Breaker();  breaker.worked("probe", now);  breaker.failed("answer", now);  breaker.up, breaker.suspect

A probe asks for the list of models, a token is a real one that we asked for, an answer is a client's. Failed answers
make a replica suspect, no more, for a client may send what breaks any server: then a token of ours decides. What comes
back and falls again soon has to prove itself for longer each time, so that it does not flap.
"""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["probe", "answer", "token"]


@dataclass(frozen=True)
class Rules:
    probes: int = 2
    """Failures in a row after which it is down."""
    answers: int = 3
    """Failures in a row after which it is suspect."""
    rises: int = 2
    """Tokens in a row after which it is up again."""
    most: int = 32
    """The same of one that falls again and again."""
    calm: float = 60.0
    """Seconds up after which earlier falls are forgotten."""


class Breaker:
    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self.up = False
        """Not before the first good probe."""
        self.suspect = False
        """A token is to be asked for."""
        self.falls = 0
        self._bad: dict[Kind, int] = {"probe": 0, "answer": 0, "token": 0}
        self._good, self._needed, self._rose = 0, self.rules.rises, -math.inf

    @property
    def doubted(self) -> bool:
        """It answers probes, and a token has to show whether it can write."""
        return not self._bad["probe"] and (self.suspect or (self.falls > 0 and not self.up))

    def worked(self, kind: Kind, now: float) -> None:
        self._bad[kind] = 0
        if kind == "token":
            self._bad["answer"], self.suspect = 0, False
            self._good += 1
        if not self.up and (self._good >= self._needed or (kind == "probe" and not self.falls)):
            self.up, self._rose = True, now

    def failed(self, kind: Kind, now: float) -> None:
        self._bad[kind] += 1
        if kind == "answer":
            self.suspect = self._bad[kind] >= self.rules.answers
            return
        self._good = 0
        if self.up and (kind == "token" or self._bad[kind] >= self.rules.probes):
            self.up = False
            self.falls += 1
            again = now - self._rose < self.rules.calm and self.falls > 1
            self._needed = min(self.rules.most, self._needed * 2) if again else self.rules.rises
