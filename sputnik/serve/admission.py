"""Who may come in, who is next, and how long the others wait. Pure: no clock, no sockets, no text; times are given.

    ticket = admission.knock(identity, size, now)              # from the header alone; raises Full
    admission.enter(ticket, prompt, answer, samples, now)      # what it turned out to be; raises Full
    for each in admission.take(now): ...                       # these start now
    admission.produced(tokens, now)                            # how fast it goes
    admission.leave(ticket, now, produced)                     # done, refused or gone, at any stage

The queue is bounded in requests and in prompt tokens, and nobody is let in who would wait longer than the limit. Order:
classes share by weight, keys within a class equally, by tokens (start-time fair queueing, Goyal 1996), requests of a
key as they came. The last of its room is for keys that have fewer there than another, a few slots beyond the usual ones
for keys that have less than their share running: one with hundreds of calls shuts no other out and makes none wait for
its ends. The wait that is told counts who is there and, as keys have asked lately, who will pass. Left out: money.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sputnik.serve.identity import Class, Identity

WEIGHTS: Mapping[Class, float] = {"interactive": 8.0, "paid": 4.0, "free": 2.0, "batch": 1.0}
PREFILL = 0.1
"""What a token of the prompt costs, in tokens of the answer."""
BYTES_PER_TOKEN = 4
"""Of a request that has not been read yet."""
WINDOW = 2.0
"""Seconds over which the speed is measured."""
LATELY = 5.0
"""Seconds over which it is counted how much a key asks for."""
RESERVE = 8
"""One place in so many, and one token, is for keys with fewer requests in the queue than another."""
ROUNDS = 20
"""Of making a wait longer by those who come in it."""


class Full(Exception):
    """No room. `whose`: the key's share is used up, or the server's; `wait`: seconds after which it may be better."""

    def __init__(self, whose: Literal["key", "server"], reason: str, wait: float) -> None:
        super().__init__(reason)
        self.whose, self.reason, self.wait = whose, reason, wait


@dataclass(frozen=True)
class Limits:
    requests: int = 256
    """That wait."""
    tokens: int = 1 << 20
    """Of the prompts that wait."""
    per_key: int = 64
    """Requests of one key, waiting and running."""
    wait: float = 120.0
    """Seconds; nobody is let in who would wait longer."""


@dataclass(frozen=True)
class Place:
    position: int
    """Requests that start before."""
    wait: float | None
    """Seconds, where the speed is known."""


@dataclass(eq=False)
class Ticket:
    identity: Identity
    prompt: int
    """Tokens; a guess until `enter`."""
    state: Literal["door", "waiting", "running", "gone"] = "door"
    answer: int = 0
    """Tokens at most, over all samples."""
    samples: int = 1
    extra: bool = False
    """Runs in the spare slots."""
    deadline: float | None = None
    cost: float = 0.0
    """What it is taken to cost until it has ended."""
    whole: bool = False
    """All of its answers came to their end."""


@dataclass(eq=False)
class _Share:
    """What a key, or a class of keys, has had, and asks for."""

    weight: float = 1.0
    had: float = 0.0
    """Tokens by weight, on the clock of its circle: the start tag of its next request."""
    waits: int = 0
    cost: float = 0.0
    """Requests that wait, and what those cost."""
    asked: float = 0.0
    at: float = 0.0
    """Tokens a second for which it asked when it asked last, and when that was."""

    def tag(self, clock: float) -> float:
        """Who has nothing waiting saves nothing up."""
        return self.had if self.waits else max(self.had, clock)

    def asks(self, now: float) -> float:
        """Tokens a second for which it asks, lately."""
        return self.asked * math.exp((self.at - now) / LATELY)

    def enter(self, cost: float, clock: float, now: float) -> None:
        self.had = self.tag(clock)
        self.waits += 1
        self.cost += cost
        self.asked, self.at = self.asks(now) + cost / LATELY, now

    def start(self, cost: float) -> None:
        self.leave(cost)
        self.had += cost / self.weight

    def leave(self, cost: float) -> None:
        self.waits -= 1
        self.cost = self.cost - cost if self.waits else 0.0


@dataclass(eq=False)
class _Key(_Share):
    waiting: deque[Ticket] = field(default_factory=deque)
    door: int = 0
    """Tickets that are being read."""
    open: int = 0
    """Tickets that are not gone."""
    running: int = 0
    """Samples."""

    @property
    def queued(self) -> int:
        return self.door + self.waits


@dataclass(eq=False)
class _Circle(_Share):
    keys: dict[str, _Key] = field(default_factory=dict)
    clock: float = 0.0

    @property
    def backlogged(self) -> list[_Key]:
        return [key for key in self.keys.values() if key.waiting]


class Admission:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.slots = self.spare = 0
        """Samples that run at once, and more for keys that have less than their share; 0 while there is no engine."""
        self.closed: str | None = None
        """Why nobody is let in, or None."""
        self.waiting = self.door = self.running = 0
        """Requests that wait, requests that are being read, samples that run."""
        self._extra = 0
        """Samples of those that run in the spare slots."""
        self.tokens = 0
        """Of the prompts at the door and in the queue."""
        self.rate: float | None = None
        """Tokens a second while somebody waits, those of prompts at their cost; None: not measured yet."""
        self._circles = {rank: _Circle(weight) for rank, weight in WEIGHTS.items()}
        self._clock = 0.0
        self._usual = 256.0
        """Tokens of an answer, as they have been lately."""
        self._since: float | None = None
        self._produced = 0.0

    # --- in and out ---

    def knock(self, identity: Identity, size: int, now: float) -> Ticket:
        """Let a request of `size` bytes to the door: it may be read. Raises Full."""
        key, guess = self._key(identity), size // BYTES_PER_TOKEN
        if self.closed is not None:
            raise Full("server", self.closed, 5.0)
        if key.open >= self.limits.per_key:
            raise Full("key", f"this key has {key.open} requests open, its limit", self._turn)
        wait = self._forecast(identity, key.cost, now, self.limits.wait)
        self._check_places(key, wait)
        self._check_room(key, guess)
        if wait is not None and wait > self.limits.wait:
            raise Full("server", f"it would wait {wait:.0f} s, longer than {self.limits.wait:.0f}", wait)
        ticket = Ticket(identity, guess)
        key.open += 1
        key.door += 1
        self.door += 1
        self.tokens += guess
        return ticket

    def enter(
        self, ticket: Ticket, prompt: int, answer: int, samples: int, now: float, deadline: float | None = None
    ) -> None:
        """Into the queue, now that it has been read. Raises Full; it is for the caller to `leave` then."""
        assert ticket.state == "door"
        circle, key = self._circles[ticket.identity.rank], self._key(ticket.identity)
        self._check_room(key, prompt - ticket.prompt)
        self.tokens += prompt - ticket.prompt
        ticket.prompt, ticket.answer, ticket.samples, ticket.deadline = prompt, answer, samples, deadline
        ticket.cost = PREFILL * prompt + min(answer, self._usual * samples)
        circle.enter(ticket.cost, self._clock, now)
        key.enter(ticket.cost, circle.clock, now)
        key.waiting.append(ticket)
        ticket.state = "waiting"
        key.door -= 1
        self.door -= 1
        self.waiting += 1
        wait = None if deadline is None else self.place(ticket, now).wait
        if wait is not None and deadline is not None and now + wait > deadline:
            raise Full("server", f"it would wait {wait:.0f} s, beyond its deadline", wait)

    def take(self, now: float) -> list[Ticket]:
        """Those that start now, in order."""
        found = []
        while (ticket := self._next() or self._wronged()) is not None:
            self._serve(ticket)
            found.append(ticket)
        self._watch(now)
        return found

    def leave(self, ticket: Ticket, now: float, produced: int = 0) -> None:
        """It is done or gone; of one that ran, the tokens it produced."""
        circle, key = self._circles[ticket.identity.rank], self._key(ticket.identity)
        match ticket.state:
            case "door":
                key.door -= 1
                self.door -= 1
                self.tokens -= ticket.prompt
            case "waiting":
                key.waiting.remove(ticket)
                key.leave(ticket.cost)
                circle.leave(ticket.cost)
                self.waiting -= 1
                self.tokens -= ticket.prompt
            case "running":
                key.running -= ticket.samples
                self.running -= ticket.samples
                self._extra -= ticket.samples * ticket.extra
                over = PREFILL * ticket.prompt + produced - ticket.cost
                key.had += over
                circle.had += over / circle.weight
                self._usual += 0.05 * (produced / ticket.samples - self._usual)
            case "gone":
                return
        ticket.state = "gone"
        key.open -= 1
        self._watch(now)

    def expire(self, now: float) -> list[Ticket]:
        """Those in the queue whose deadline has passed; they have left. To be called now and then: it forgets keys."""
        late = list[Ticket]()
        for circle in self._circles.values():
            for id, key in list(circle.keys.items()):
                late += [each for each in key.waiting if each.deadline is not None and each.deadline <= now]
                if not key.open and key.had <= circle.clock and key.asks(now) < 1:  # nothing is lost by forgetting it
                    del circle.keys[id]
        for each in late:
            self.leave(each, now)
        return late

    # --- how long it takes ---

    def produced(self, tokens: int, now: float) -> None:
        """The engine has written so many tokens since the last call."""
        self._produced += tokens
        if self._since is not None and now - self._since >= WINDOW:
            rate = self._produced / (now - self._since)
            self.rate = rate if self.rate is None else 0.5 * (self.rate + rate)
            self._since, self._produced = now, 0

    def line(self) -> list[Ticket]:
        """All that wait, in the order in which they start if nobody comes and all slots are alike."""
        circles = {rank: [circle.had, circle.weight] for rank, circle in self._circles.items()}
        had = {rank: {id: key.had for id, key in self._circles[rank].keys.items()} for rank in circles}
        left = {
            rank: {id: deque(key.waiting) for id, key in circle.keys.items() if key.waiting}
            for rank, circle in self._circles.items()
        }
        order = []
        while ranks := [rank for rank in circles if left[rank]]:
            rank = min(ranks, key=lambda each: circles[each][0])
            id = min(left[rank], key=had[rank].__getitem__)
            ticket = left[rank][id].popleft()
            if not left[rank][id]:
                del left[rank][id]
            had[rank][id] += ticket.cost
            circles[rank][0] += ticket.cost / circles[rank][1]
            order.append(ticket)
        return order

    def place(self, ticket: Ticket, now: float) -> Place:
        """Of one that waits."""
        key = self._key(ticket.identity)
        before = sum(each.cost for each in list(key.waiting)[: key.waiting.index(ticket)])
        return Place(self.line().index(ticket), self._forecast(ticket.identity, before, now))

    @property
    def wait(self) -> float | None:
        """Seconds for one behind all who wait, where the speed is known."""
        return self._wait(sum(circle.cost for circle in self._circles.values()))

    def _wait(self, ahead: float) -> float | None:
        """Seconds until one starts that has so many tokens ahead of it in the queue: those, and one end."""
        if not ahead and self.running < self.slots:
            return 0.0
        return None if not self.rate else (ahead + self._usual) / self.rate

    def _forecast(self, identity: Identity, before: float, now: float, most: float = math.inf) -> float | None:
        """Seconds until one starts that has so many tokens of its own key before it; a bound from below beyond `most`.

        Others pass until they have had as much: with what they have waiting, and what they ask for meanwhile. A refusal
        has to be cheap however many keys wait: hence `most`.
        """
        circle, mine = self._circles[identity.rank], self._key(identity)
        tag, here = mine.tag(circle.clock) + before, circle.tag(self._clock)
        keys = [(key, tag - key.tag(circle.clock)) for key in circle.keys.values() if key is not mine]
        passing = [(key.cost, key.asks(now), least + self._usual / 2) for key, least in keys if least >= 0]
        others = [each for each in self._circles.values() if each is not circle and each.keys]
        circles = [(each.cost, each.asks(now), each.tag(self._clock), each.weight) for each in others]
        wait = 0.0
        for _ in range(ROUNDS):
            ahead = before + sum(min(cost + asks * wait, most) for cost, asks, most in passing)
            there = here + ahead / circle.weight
            ahead += sum(max(0.0, min(cost + asks * wait, (there - at) * weight)) for cost, asks, at, weight in circles)
            longer = self._wait(ahead)
            if longer is None or longer <= 1.01 * wait or longer > most:
                return longer
            wait = longer
        return wait

    @property
    def _turn(self) -> float:
        """Seconds an answer takes."""
        return self._usual * max(1, self.slots) / self.rate if self.rate else 5.0

    def _watch(self, now: float) -> None:
        """The speed counts only while somebody waits: else it is how much was asked for."""
        if not self.waiting:
            self._since = None
        elif self._since is None:
            self._since, self._produced = now, 0

    # --- order ---

    def _next(self) -> Ticket | None:
        if not self.waiting:
            return None
        circle = min((each for each in self._circles.values() if each.backlogged), key=lambda each: each.had)
        head = min(circle.backlogged, key=lambda each: each.had).waiting[0]
        taken = self.running - self._extra
        return head if taken + head.samples <= self.slots or (self.slots and not taken) else None

    def _wronged(self) -> Ticket | None:
        """The first whose key has less than its share, if there is a spare slot for it."""
        free = self.spare - self._extra
        if not self.waiting or free <= 0:
            return None
        keys = [key for circle in self._circles.values() for key in circle.keys.values() if key.waiting or key.running]
        share = self.slots // len(keys)
        found = [key for key in keys if key.waiting and key.running + key.waiting[0].samples <= share]
        heads = [key.waiting[0] for key in found if key.waiting[0].samples <= free]
        first = min(heads, key=lambda head: self._circles[head.identity.rank].had, default=None)
        if first is not None:
            first.extra = True
            self._extra += first.samples
        return first

    def _serve(self, ticket: Ticket) -> None:
        circle, key = self._circles[ticket.identity.rank], self._key(ticket.identity)
        self._clock, circle.clock = circle.had, key.had
        circle.start(ticket.cost)
        key.start(ticket.cost)
        key.waiting.popleft()
        key.running += ticket.samples
        ticket.state = "running"
        self._produced += PREFILL * ticket.prompt
        self.waiting -= 1
        self.tokens -= ticket.prompt
        self.running += ticket.samples

    def _key(self, identity: Identity) -> _Key:
        return self._circles[identity.rank].keys.setdefault(identity.id, _Key())

    @property
    def _most(self) -> int:
        """Requests that one key has in the queue."""
        return max(each.queued for circle in self._circles.values() for each in circle.keys.values())

    def _check_places(self, key: _Key, wait: float | None) -> None:
        taken, places = self.waiting + self.door, self.limits.requests
        if taken < places - places // RESERVE:
            return
        if taken >= places or key.queued == self._most:
            left = "the limit" if taken >= places else "and the places left are for keys with fewer"
            raise Full("server", f"{self.waiting} requests wait already, {left}", wait or 5.0)

    def _check_room(self, key: _Key, more: int) -> None:
        left = self.limits.tokens - self.tokens - more
        scarce = left < 0 or (left < self.limits.tokens // RESERVE and 1 < key.queued == self._most)
        if more > 0 and scarce and self.waiting + self.door > 0:
            raise Full("server", f"no room for {more} tokens: those that wait have {self.tokens}", self.wait or 5.0)
