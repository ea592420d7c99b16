"""The engine's side of the wire with a real engine: whole answers, in order, and memory back whoever goes."""

import asyncio
import threading
from dataclasses import replace

import pytest

from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.engine.thinking import Finish
from sputnik.errors import DataError
from sputnik.serve import wire
from sputnik.serve.desk import Desk
from sputnik.serve.generations import Asked, Job
from sputnik.serve.link import Link
from sputnik.serve.reading import Speech
from sputnik.serve.refusals import Refusal

PARAMS = SamplingParams(max_tokens=12, seed=7, ignore_eos=True)
PROMPT = [5, 270, 271, 272, 9]


class Listener:
    def __init__(self) -> None:
        self.messages: list[wire.Message] = []

    def post(self, message: wire.Message) -> None:
        self.messages.append(message)

    def tokens(self, run: int, sample: int | None = None) -> list[wire.Token]:
        steps = [message for message in self.messages if isinstance(message, wire.Step)]
        found = [token for step in steps for token in step.tokens if token.run == run]
        return [token for token in found if sample is None or token.sample == sample]

    def ids(self, run: int, sample: int = 0) -> list[int | None]:
        return [token.id for token in self.tokens(run, sample)]


@pytest.fixture
def desk(llm: LLM) -> Desk:
    return Desk(llm)


@pytest.fixture
def peer() -> Listener:
    return Listener()


def start(desk: Desk, peer: Listener, run: int, params: SamplingParams = PARAMS, **more: object) -> None:
    message = wire.Start(run, PROMPT, params, False, **more)  # type: ignore[arg-type]
    desk.post(peer, message, desk.prepare(message))


def steps(desk: Desk, count: int) -> None:
    for _ in range(count):
        if desk._engine.busy or not desk._inbox.empty():
            desk._take()
        desk._tell(desk._engine.step())
        desk.steps += 1


def finish(desk: Desk) -> None:
    desk.drain(60)
    desk.run()
    engine = desk.llm.engine
    assert not engine.busy and engine.scheduler.figures.used_blocks == 0 and not desk._numbers


def test_tokens_come_in_order_without_a_gap_and_are_those_of_the_engine(desk: Desk, peer: Listener) -> None:
    start(desk, peer, 4)
    start(desk, peer, 5, replace(PARAMS, n=3, logprobs=2, max_tokens=6))
    finish(desk)
    (alone,) = desk.llm.generate([PROMPT], PARAMS)
    assert peer.ids(4) == alone.outputs[0].ids
    assert [token.seq for token in peer.tokens(4)] == list(range(12))
    assert [token.finish for token in peer.tokens(4)] == [None] * 11 + [alone.finish]
    (three,) = desk.llm.generate([PROMPT], replace(PARAMS, n=3, logprobs=2, max_tokens=6))
    assert [token.seq for token in peer.tokens(5)] == list(range(18))
    for index, output in enumerate(three.outputs):
        tokens = peer.tokens(5, index)
        assert [token.id for token in tokens] == output.ids
        assert [token.logprob for token in tokens] == output.logprobs and [token.top for token in tokens] == output.top


def test_cached_tokens_are_told_with_the_first_token(desk: Desk, peer: Listener) -> None:
    prompt = [5, 6, 7, 8] * 20
    for run in (1, 2):
        message = wire.Start(run, prompt, PARAMS, False, salt=b"cached")
        desk.post(peer, message, desk.prepare(message))
        steps(desk, 13)
    assert [token.cached for token in peer.tokens(2)] == [64] + [0] * 11
    assert peer.tokens(1)[0].cached == 0
    finish(desk)


def test_a_run_that_died_elsewhere_goes_on_to_the_same_end(desk: Desk, peer: Listener) -> None:
    params = replace(PARAMS, n=2)
    start(desk, peer, 1, params)
    steps(desk, 20)
    for sample in (0, 1):
        whole = peer.ids(1, sample)
        start(desk, peer, 10 + sample, params, sample=sample, written=whole[:5])
    finish(desk)
    for sample in (0, 1):
        rest = peer.tokens(10 + sample)
        assert [token.id for token in rest] == peer.ids(1, sample)[5:]
        assert {token.sample for token in rest} == {sample} and rest[-1].finish == peer.tokens(1, sample)[-1].finish


def test_ends_of_all_kinds_give_the_memory_back(desk: Desk, peer: Listener) -> None:
    other = Listener()
    long = replace(PARAMS, max_tokens=500)
    for run in range(4):
        start(desk, peer, run, long)
    start(desk, other, 0, replace(long, n=2))
    steps(desk, 4)
    desk.post(peer, wire.Abort(0))
    desk.post(peer, wire.End(1, 0))
    desk.post(peer, wire.Abort(77))
    desk.post(peer, wire.End(77, 0))
    desk.post(other, wire.End(0, 1))
    before = len(peer.tokens(2))
    steps(desk, 3)
    assert desk.busy == 3 and len(peer.tokens(2)) == before + 3
    assert len(other.tokens(0, 0)) == len(other.tokens(0, 1)) + 3, "one sample ended, the other goes on"
    desk.leave(peer)
    desk.leave(other)
    steps(desk, 1)
    assert desk.busy == 0
    finish(desk)


def test_what_cannot_be_answered_is_refused_and_disturbs_nobody(desk: Desk, peer: Listener) -> None:
    start(desk, peer, 1)
    start(desk, peer, 2, replace(PARAMS, max_tokens=10**6))
    start(desk, peer, 1)
    with pytest.raises(DataError, match="schema"):
        start(desk, peer, 3, SamplingParams(schema="{"))
    finish(desk)
    refused = [message for message in peer.messages if isinstance(message, wire.Refused)]
    assert [each.run for each in refused] == [2, 1] and "context" in refused[0].reason
    assert len(peer.tokens(1)) == 12


def test_a_deadline_ends_all_samples_also_those_that_never_began(desk: Desk, peer: Listener) -> None:
    start(desk, peer, 1, replace(PARAMS, n=3), seconds=-1.0)
    finish(desk)
    assert [(token.seq, token.sample, token.finish) for token in peer.tokens(1)] == [
        (0, 0, "deadline"), (1, 1, "deadline"), (2, 2, "deadline"),
    ]  # fmt: skip


def test_a_thought_is_closed_on_request(desk: Desk, peer: Listener) -> None:
    tok = desk.llm.tok
    params = SamplingParams(max_tokens=40, seed=1, logit_bias={tok.end_think_id: -100, tok.eos_id: -100})
    prompt = desk.llm.render([{"role": "user", "content": "What?"}])
    message = wire.Start(1, list(prompt.ids), params, prompt.in_thought)
    desk.post(peer, message, desk.prepare(message))
    steps(desk, 5)
    desk.post(peer, wire.AnswerNow(1))
    finish(desk)
    assert tok.end_think_id in peer.ids(1)[4:9]
    assert peer.tokens(1)[-1].closed_by == "request" and peer.tokens(1)[-1].finish == "length"


def test_a_probe_is_answered_while_every_slot_is_taken(desk: Desk, peer: Listener) -> None:
    for run in range(12):
        start(desk, peer, run, replace(PARAMS, max_tokens=60))
    steps(desk, 5)
    desk.post(peer, wire.Probe(3))
    desk.post(peer, wire.Ask(4))
    steps(desk, 3)
    (probed,) = [message for message in peer.messages if isinstance(message, wire.Probed)]
    (figures,) = [message for message in peer.messages if isinstance(message, wire.Figures)]
    assert probed.number == 3 and 0 < probed.seconds < 60
    assert figures.values["runs"] == 12 and figures.values["cache_use"] > 0
    finish(desk)


def test_draining_refuses_the_new_and_finishes_the_old(desk: Desk, peer: Listener) -> None:
    start(desk, peer, 1)
    steps(desk, 2)
    desk.drain(60)
    start(desk, peer, 2)
    desk.run()
    assert len(peer.tokens(1)) == 12
    assert [message.draining for message in peer.messages if isinstance(message, wire.Refused)] == [True]
    finish(desk)


def test_a_drain_has_an_end(desk: Desk, peer: Listener) -> None:
    start(desk, peer, 1, replace(PARAMS, max_tokens=1500))
    desk.drain(0)
    desk.run()
    assert len(peer.tokens(1)) < 5
    desk.leave(peer)
    steps(desk, 1)


def test_it_waits_without_work_and_wakes_for_a_message(desk: Desk, peer: Listener) -> None:
    thread = threading.Thread(target=desk.run)
    thread.start()
    start(desk, peer, 1)
    asyncio.run(asyncio.sleep(0))
    desk.post(peer, wire.Probe(1))
    desk.drain(60)
    thread.join(60)
    assert not thread.is_alive() and len(peer.tokens(1)) == 12


LATE = [("stop", False, False), ("stop", True, True), ("failed", False, True)]


@pytest.mark.parametrize(("finish", "held", "fails"), LATE)
def test_what_comes_too_late_spoils_no_whole_answer(llm: LLM, finish: Finish, held: bool, fails: bool) -> None:
    """Unless nothing of it may leave yet."""
    link = Link("none", lambda hello: None, lambda tokens: None)
    job = Job(link, Speech(llm.tok, llm.template, llm.context), [Asked((1,), SamplingParams(max_tokens=1), None)])
    job.answers[0].finish, job.held = finish, held
    job.fail(Refusal(400, "the request was cancelled"))
    assert (job.error is not None) == fails
