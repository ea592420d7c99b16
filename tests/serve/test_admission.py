"""Who comes in and who is next: bounds hold whatever happens, nobody starves, and what is said about waiting is so."""

import contextlib
import random
from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sputnik.serve.admission import Admission, Full, Limits, Ticket
from sputnik.serve.asking import Asking
from sputnik.serve.identity import Identity
from sputnik.serve.measures import Tally
from sputnik.serve.refusals import Refusal
from sputnik.serve.service import Service
from sputnik.serve.settings import GatewaySettings

ALICE, BOB = Identity("alice"), Identity("bob")


def admission(slots: int = 4, spare: int = 0, **limits: Any) -> Admission:
    found = Admission(Limits(**limits))
    found.slots, found.spare = slots, spare
    return found


def ask(
    queue: Admission, identity: Identity = ALICE, prompt: int = 10, answer: int = 100, samples: int = 1,
    now: float = 0.0, deadline: float | None = None,
) -> Ticket:  # fmt: skip
    ticket = queue.knock(identity, 40, now)
    try:
        queue.enter(ticket, prompt, answer, samples, now, deadline)
    except Full:
        queue.leave(ticket, now)
        raise
    return ticket


def counted(keys: Any) -> tuple[int, float]:
    return sum(key.waits for key in keys), sum(key.cost for key in keys)


class Anything(RuleBasedStateMachine):
    """Requests of several keys and classes come, start, end and go in any order."""

    @initialize(slots=st.integers(1, 6), spare=st.integers(0, 2), requests=st.integers(1, 8))
    def begin(self, slots: int, spare: int, requests: int) -> None:
        self.queue = admission(slots, spare, requests=requests, tokens=400, per_key=5)
        self.live: list[Ticket] = []
        self.now = 0.0

    @rule(
        who=st.sampled_from("abcd"), rank=st.sampled_from(["interactive", "paid", "batch"]), size=st.integers(0, 900),
        prompt=st.integers(1, 300), samples=st.integers(1, 3), deadline=st.none() | st.floats(0, 50),
    )  # fmt: skip
    def come(self, who: str, rank: Any, size: int, prompt: int, samples: int, deadline: float | None) -> None:
        try:
            ticket = self.queue.knock(Identity(f"{rank}-{who}", rank), size, self.now)
        except Full:
            return
        try:
            self.queue.enter(ticket, prompt, 50, samples, self.now, deadline and self.now + deadline)
            self.live.append(ticket)
        except Full:
            self.queue.leave(ticket, self.now)

    @rule()
    def start(self) -> None:
        line = self.queue.line()
        first = self.queue.take(self.now)
        assert not first or self.queue.spare or first == line[: len(first)], "the line is the order in which they start"
        assert not self.queue.take(self.now), "nobody who could start is left"
        if self.queue.waiting:
            head = self.queue.line()[0]
            regular = self.queue.running - self.queue._extra
            assert regular and regular + head.samples > self.queue.slots

    @precondition(lambda self: self.live)
    @rule(data=st.data(), produced=st.integers(0, 200), seconds=st.floats(0, 3))
    def end(self, data: Any, produced: int, seconds: float) -> None:
        ticket = data.draw(st.sampled_from(self.live))
        self.live.remove(ticket)
        self.now += seconds
        self.queue.produced(produced, self.now)
        self.queue.leave(ticket, self.now, produced)
        self.queue.leave(ticket, self.now, produced)

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for ticket in self.queue.expire(self.now):
            assert ticket.deadline is not None and ticket.deadline <= self.now
            self.live.remove(ticket)

    @invariant()
    def bounds_hold(self) -> None:
        queue = self.queue
        states = Counter(ticket.state for ticket in self.live)
        assert states["waiting"] == queue.waiting <= queue.limits.requests and queue.door == states["door"] == 0
        assert queue.tokens == sum(ticket.prompt for ticket in self.live if ticket.state == "waiting")
        assert queue.tokens <= max(queue.limits.tokens, 300)
        running = [ticket for ticket in self.live if ticket.state == "running"]
        assert queue.running == sum(ticket.samples for ticket in running)
        assert queue.running - queue._extra <= max(queue.slots, 3) and 0 <= queue._extra <= queue.spare
        assert all(count <= 5 for count in Counter(ticket.identity.id for ticket in self.live).values())
        assert Counter(queue.line()) == Counter(ticket for ticket in self.live if ticket.state == "waiting")
        for circle in queue._circles.values():
            assert (circle.waits, circle.cost) == pytest.approx(counted(circle.keys.values()), abs=1e-6)
            for key in circle.keys.values():
                assert (key.waits, key.cost) == pytest.approx((len(key.waiting), sum(t.cost for t in key.waiting)))

    def teardown(self) -> None:
        for ticket in getattr(self, "live", []):
            self.queue.leave(ticket, self.now)
        if hasattr(self, "queue"):
            assert (self.queue.waiting, self.queue.running, self.queue.tokens) == (0, 0, 0)


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_queue_is_bounded_in_requests_tokens_and_per_key() -> None:
    queue = admission(slots=1, requests=3, tokens=1000, per_key=3)
    ask(queue)
    queue.take(0)
    ask(queue, BOB, prompt=900)
    with pytest.raises(Full, match="tokens"):
        ask(queue, prompt=200)
    ask(queue, prompt=50)
    ask(queue, prompt=1)
    with pytest.raises(Full, match="3 requests open") as refused:
        ask(queue, prompt=1)
    assert refused.value.whose == "key" and refused.value.wait > 0
    with pytest.raises(Full, match="3 requests wait") as refused:
        ask(queue, Identity("carol"), prompt=1)
    assert refused.value.whose == "server"


def test_a_request_is_counted_while_it_is_read() -> None:
    queue = admission(requests=1)
    ticket = queue.knock(ALICE, 4000, 0)
    assert queue.tokens == 1000
    with pytest.raises(Full):
        queue.knock(BOB, 4, 0)
    queue.leave(ticket, 0)
    assert queue.tokens == queue.door == 0 and queue.knock(BOB, 4, 0)


def test_nothing_starts_without_an_engine_and_nobody_comes_in_when_closed() -> None:
    queue = admission(slots=0)
    ask(queue)
    assert queue.take(0) == []
    queue.closed = "the server is shutting down"
    with pytest.raises(Full, match="shutting down"):
        ask(queue)


def test_a_key_with_hundreds_of_requests_does_not_hold_up_another() -> None:
    queue = admission(slots=2, per_key=300, requests=300)
    many = [ask(queue) for _ in range(200)]
    queue.take(0)
    one = ask(queue, BOB)
    assert queue.place(one, 0).position == 0
    queue.leave(many[0], 1, 50)
    assert queue.take(1) == [one]


def test_the_last_places_are_for_keys_with_fewer_requests_there() -> None:
    queue = admission(slots=1, requests=16, per_key=99)
    for _ in range(14):
        ask(queue)
    with pytest.raises(Full, match="14 requests wait already, and the places left are for keys with fewer") as refused:
        ask(queue)
    assert refused.value.whose == "server" and refused.value.wait > 0
    ask(queue, BOB)
    ask(queue, BOB)
    with pytest.raises(Full, match="16 requests wait already, the limit"):
        ask(queue, Identity("carol"))


def test_a_key_that_fills_the_door_with_large_bodies_leaves_room_for_others() -> None:
    queue = admission(slots=1, per_key=99)
    for _ in range(3):
        queue.knock(ALICE, 1 << 20, 0)
    with pytest.raises(Full, match="no room for 262144 tokens: those that wait have 786432"):
        queue.knock(ALICE, 1 << 20, 0)
    ask(queue, BOB, prompt=100_000)
    ask(queue, BOB, prompt=100_000)


def test_a_spare_slot_is_for_a_key_that_has_less_than_its_share() -> None:
    queue = admission(slots=4, spare=1)
    for _ in range(9):
        ask(queue)
    assert len(queue.take(0)) == 4
    one, two = ask(queue, BOB), ask(queue, BOB)
    assert queue.take(0) == [one], "at once, and only as many as are spare"
    assert two.state == "waiting"


def test_keys_share_by_tokens_and_classes_by_weight() -> None:
    queue = admission(slots=1, requests=1000, per_key=1000)
    keys = {
        "long": Identity("long"), "short": Identity("short"), "batch": Identity("batch", "batch"),
        "ui": Identity("ui", "interactive"),
    }  # fmt: skip
    sizes = {"long": 200, "short": 50, "batch": 100, "ui": 100}
    for name, key in keys.items():
        for _ in range(200):
            ask(queue, key, prompt=1, answer=sizes[name])
    had: Counter[str] = Counter()
    for now in range(150):
        (ticket,) = queue.take(now)
        had[ticket.identity.id] += sizes[ticket.identity.id]
        queue.leave(ticket, now, sizes[ticket.identity.id])
    assert abs(had["long"] - had["short"]) <= 2 * 200
    assert had["ui"] / had["batch"] == pytest.approx(8, rel=0.3)
    assert had["ui"] / (had["long"] + had["short"]) == pytest.approx(2, rel=0.2)


def test_the_wait_that_is_told_is_the_wait_there_is() -> None:
    """Four slots of 10 tokens a second each, answers of 20 to 180 tokens, twice the load."""
    dice = random.Random(1)
    queue, now, told, true = admission(slots=4, requests=99, per_key=100, wait=1e9), 0.0, {}, {}
    left: dict[Ticket, float] = {}
    for tick in range(20_000):
        now = tick * 0.05
        if dice.random() < 0.04 and queue.waiting < 40:
            ticket = ask(queue, Identity(dice.choice("abc")), answer=180, now=now)
            told[ticket] = now, queue.place(ticket, now).wait
        for ticket in queue.take(now):
            left[ticket], true[ticket] = dice.randint(20, 180), now
        queue.produced(0, now)
        for ticket in list(left):
            left[ticket] -= 0.5
            queue._produced += 0.5  # type: ignore[assignment]
            if left[ticket] <= 0:
                del left[ticket]
                queue.leave(ticket, now, 100)
    pairs = [(told[t][1], true[t] - told[t][0]) for t in true if told[t][1] is not None and told[t][0] > 200]
    assert len(pairs) > 200
    mean_told, mean_true = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))  # type: ignore[misc]
    assert mean_told == pytest.approx(mean_true, rel=0.25) and mean_true > 5


def overloaded(shares: dict[str, float], seconds: int = 90) -> tuple[list[tuple[float, float]], Counter[str]]:
    """28 requests a second, of keys by their shares, where 8 can be done and 32 may wait.

    The waits of those let in, as told and as they were, and who was turned away."""
    dice, queue, refused = random.Random(3), admission(slots=8, spare=2, requests=32, per_key=99), Counter[str]()
    told: dict[Ticket, tuple[float, float]] = {}
    left: dict[Ticket, int] = {}
    waits = []
    for now in (step / 20 for step in range(20 * seconds)):
        for _ in range(sum(dice.random() < 0.14 for _ in range(10))):
            who = dice.choices(list(shares), list(shares.values()))[0]
            try:
                ticket = ask(queue, Identity(who), answer=20, now=now)
            except Full:
                refused[who] += 1
            else:
                told[ticket] = now, queue.place(ticket, now).wait or 0.0
        for ticket in queue.take(now):
            left[ticket] = 20
            waits.append((told[ticket][1], now - told[ticket][0]))
        queue.produced(len(left), now)
        for ticket in list(left):
            left[ticket] -= 1
            if not left[ticket]:
                del left[ticket]
                queue.leave(ticket, now, 20)
        queue.expire(now)
    return waits[80:], refused


@pytest.mark.parametrize(
    "shares", [{"a": 1}, {"a": 1, "b": 1}, {"a": 3, "b": 1}, {"a": 9, "b": 1}, dict.fromkeys("abcde", 1)]
)
def test_the_wait_that_is_told_holds_whoever_else_comes(shares: dict[str, float]) -> None:
    """Those who have had less and will pass are counted in; and they are not shut out by who comes in numbers."""
    waits, refused = overloaded(shares)
    told, true = (sorted(each[i] for each in waits) for i in (0, 1))
    late = int(0.99 * len(waits))
    assert 0.8 < true[late] / told[late] < 1.2, "the slowest"
    assert sum(true) == pytest.approx(sum(told), rel=0.15), "all together"
    assert shares != {"a": 9, "b": 1} or refused["b"] == 0, "it asks for less than its share"


def test_who_would_wait_too_long_is_told_so_at_the_door() -> None:
    queue = admission(slots=1, wait=30)
    for _ in range(3):
        ask(queue, answer=100)
    queue.take(0)
    for second in range(10):
        queue.produced(10, second)
    assert queue.rate == pytest.approx(10, rel=0.2)
    with pytest.raises(Full, match="it would wait") as refused:
        for _ in range(50):
            ask(queue, BOB, answer=100, now=10)
    assert 30 < refused.value.wait < 60
    queue = admission(slots=1, wait=1e9)
    ask(queue)
    queue.take(0)
    ask(queue)
    queue.rate = 10.0
    with pytest.raises(Full, match="deadline"):
        ask(queue, BOB, now=10, deadline=10.5)
    assert queue.waiting == 1


def test_who_is_refused_for_its_deadline_is_not_started_by_the_next_end() -> None:
    """Between its refusal and the last byte of that, others end and the queue moves on."""
    service = Service(GatewaySettings("socket", "127.0.0.1", 1, 2, "m", None))
    service.asking = cast(Asking, "there")
    service.admission.slots, service.admission.rate = 1, 10.0

    class Nothing:
        produced = 0
        started = False

        def start(self) -> None:
            self.started = True

        def close(self) -> None: ...

        def tally(self) -> Tally:
            return Tally(0.0, None, 1, 0, 0, 0, ("stop",))

    works = [Nothing() for _ in range(3)]

    def enter(place: int, seconds: float | None) -> None:
        service.enter(("a", str(place)), service.knock(ALICE, 4), cast(Any, works[place]), 1, 100, 1, seconds)

    enter(0, None)
    with pytest.raises(Refusal, match="beyond its deadline"):
        enter(1, 0.5)
    enter(2, None)
    service.close(("a", "0"))
    assert (works[1].started, works[2].started) == (False, True)
    service.close(("a", "2"))
    assert (service.admission.waiting, service.admission.running, service.admission.door) == (0, 0, 0)


def test_texts_are_counted_a_few_at_a_time_and_of_one_key_no_more_than_half() -> None:
    service = Service(GatewaySettings("socket", "127.0.0.1", 1, 2, "m", None))
    refused: list[int] = []
    with contextlib.ExitStack() as under_way:
        for identity in (ALICE, ALICE, ALICE, BOB, Identity("carol"), Identity("dora")):
            try:
                under_way.enter_context(service.counting(identity))
            except Refusal as refusal:
                refused.append(refusal.status)
                assert refusal.retry_after == 1.0
    assert refused == [429, 503] and service.measures.refused == {"rate_limit_exceeded": 1, "overloaded": 1}
    with service.counting(ALICE):
        assert service._texts == {"alice": 1}
