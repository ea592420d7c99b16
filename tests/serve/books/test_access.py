"""Keys at work: scopes, budgets, expiry, revocation on every gateway; the same request sent twice."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from sqlalchemy import Connection, select

from sputnik.errors import DataError
from sputnik.serve.books import access, ledger
from sputnik.serve.books.clerk import Clerk
from sputnik.serve.books.database import Database, Down
from sputnik.serve.books.repeats import seal, unseal
from sputnik.serve.books.tables import Key, Repeat
from sputnik.serve.fields import ChatMessage, ChatRequest
from sputnik.serve.identity import PATHS
from sputnik.serve.refusals import Refusal

CHAT = {"model": "babbler", "messages": [{"role": "user", "content": "What is 1 + 2?"}], "max_tokens": 8}


def test_a_key_does_what_its_scopes_say_and_no_more(
    make_front: Callable[..., Any], make_key: Callable[..., str]
) -> None:
    chat, models = make_key("chat", scopes={"chat"}), make_key("models", scopes={"models"})

    async def run() -> None:
        async with make_front(keys=["sk-given"]) as front:
            assert (await front.ask(chat)).status == (await front.ask("sk-given")).status == 200
            for path in ("/v1/chat/completions", "/chat/completions", "/beta/completions", "/v1/messages"):
                refused = await front.post(path, CHAT, models)
                assert refused.status == 403 and b"its scopes are models" in refused.body
            assert (await front.post("/v1/completions", {}, chat)).status == 403
            assert (await front.post("/v1/models", {}, models, method="GET")).status == 200
            assert (await front.post("/v1/models", {}, chat, method="GET")).json["error"]["type"] == "permission_error"
            wrong = chat[:-7] + ("a" if chat[-7] != "a" else "b") + chat[-6:]
            for key in (wrong, "sk-nobody", chat[:23]):
                assert (await front.ask(key)).status == 401
            served = front.app._app._app.openapi()["paths"]
            plain = {path.removeprefix("/v1") for path in served} - {"/health", "/ready", "/version"}
            for path in plain:
                assert any(path == start or path.startswith(f"{start}/") for start in PATHS), f"{path} needs a scope"

    asyncio.run(run())


def test_a_budget_is_kept_and_told(make_front: Callable[..., Any], make_key: Callable[..., str]) -> None:
    key, rich = make_key("poor", budget=120), make_key("rich")

    async def run() -> None:
        async with make_front() as front, make_front() as other:
            balance = await front.post("/user/balance", {}, key, method="GET")
            info = {"currency": "USD", "total_balance": "0.00012", "granted_balance": "0.00012"}
            told = {"is_available": True, "balance_infos": [info | {"topped_up_balance": "0.00"}]}
            assert balance.json == told
            none = await front.post("/user/balance", {}, rich, method="GET")
            assert none.json == {"is_available": True, "balance_infos": []}
            large = await front.ask(key, max_tokens=1000)
            assert large.status == 402 and "a lower max_tokens makes it less" in large.json["error"]["message"]
            assert large.json["error"]["code"] == "insufficient_balance" and large.headers["x-should-retry"] == "false"
            answers = list[int]()
            while len(answers) < 80 and answers[-2:] != [402, 402]:  # one of each: what one spends the other knows
                answers.append((await (front, other)[len(answers) % 2].ask(key)).status)
            assert answers.count(200) >= 2 and answers[-2:] == [402, 402] and set(answers) == {200, 402}
            assert (await front.ask(rich)).status == 200

    asyncio.run(run())


def test_many_at_once_through_two_gateways_stay_within_a_budget(
    make_front: Callable[..., Any], make_key: Callable[..., str], database: Database
) -> None:
    key = make_key("poor", budget=100)  # 40 answers cost twice that in the cheap hours, and four times in the others

    async def run() -> list[int]:
        async with make_front() as front, make_front() as other:
            calls = [each.ask(key) for each in (front, other) for _ in range(20)]
            return [answer.status for answer in await asyncio.gather(*calls)]

    found = asyncio.run(run())
    assert set(found) == {200, 402}
    with database.reading() as connection:
        (used,) = ledger.usage(connection)
        print("SPENT", used.spent, used.requests)
        assert used.requests == found.count(200)
        assert 0 < used.spent <= 100 and ledger.audit(connection) == []


def test_a_revoked_key_is_refused_within_a_second_by_every_gateway_and_what_ran_for_it_ends(
    make_front: Callable[..., Any], make_key: Callable[..., str], database: Database
) -> None:
    key, brief = make_key("lost"), make_key("brief", expires=int(time.time()) + 4)

    async def run() -> None:
        async with make_front() as front, make_front() as other:
            assert [(await each.ask(name)).status for each in (front, other) for name in (key, brief)] == [200] * 4
            front.engine.paused = True
            whole = asyncio.create_task(front.ask(key))
            await front.until(lambda: bool(front.service.requests))
            with database.writing() as connection:
                assert access.revoke(connection, "lost") == "lost"
            begun = time.monotonic()
            answer = await whole
            assert answer.status == 401 and "has been revoked" in answer.json["error"]["message"]
            assert time.monotonic() - begun < 1 + SLACK
            front.engine.paused = False
            while (await other.ask(key)).status != 401:
                assert time.monotonic() - begun < 1 + SLACK
            assert (await front.ask(key)).status == 401
            made = make_key("late")
            begun = time.monotonic()
            while (await other.ask(made)).status != 200:
                assert time.monotonic() - begun < 1 + SLACK, "a new key is known as fast"
                await asyncio.sleep(0.02)
            await front.until(lambda: time.time() > front.books.issued._known[brief[3:23]].expires)
            expired = await front.ask(brief)
            assert expired.status == 401 and "has expired" in expired.json["error"]["message"]

    asyncio.run(run())
    with database.reading() as connection:
        assert connection.execute(select(Key.used).where(Key.name == "late")).scalar(), "when it was last used"


def test_who_is_refused_with_the_whole_request_known_is_in_nobodys_way(
    make_front: Callable[..., Any], make_key: Callable[..., str], database: Database
) -> None:
    """Neither of them may still stand in the queue when the next request starts whoever is first there."""
    poor, lost = make_key("poor", budget=120), make_key("lost")

    async def run() -> None:
        async with make_front() as front:
            service = front.service
            said = ChatRequest(model="babbler", messages=[ChatMessage("user", "What is 1 + 2?")], max_tokens=1000)
            identities = {name: front.books.issued.find(key) for name, key in (("poor", poor), ("lost", lost))}
            tickets = {name: service.knock(identity, 100) for name, identity in identities.items()}
            with database.writing() as connection:
                access.revoke(connection, "lost")
            await front.until(lambda: front.books.issued._known[lost[3:23]].revoked)
            for name, identity in identities.items():
                asked, _ = service.asking.chat(said, identity)
                with pytest.raises(Refusal, match="the budget of this key" if name == "poor" else "been revoked"):
                    service.open((name, "1"), tickets[name], [asked])
                service.pump()
                assert tickets[name].state == "gone" and not service.requests
            assert service.admission.waiting == service.admission.running == service.admission.tokens == 0

    asyncio.run(run())


def test_an_answer_waits_for_another_engine_no_longer_than_its_client_does(
    make_front: Callable[..., Any], make_key: Callable[..., str]
) -> None:
    key = make_key("one")

    async def run() -> None:
        async with make_front() as front:
            front.engine.paused = True
            asked = asyncio.create_task(front.ask(key, headers={"x-request-timeout": "0.2"}))
            await front.until(lambda: bool(front.engine._runs))
            front.engine.hello = None
            front.engine.back.clear()
            front.engine.die()
            answer = await asked
            assert answer.status == 503 and answer.json["error"]["code"] == "engine_lost"

    asyncio.run(run())


def test_a_key_is_revoked_by_its_whole_name_or_by_what_is_shown_of_it(
    make_key: Callable[..., str], database: Database
) -> None:
    key = make_key("only")
    with database.writing() as connection:
        for which in ("", "sk-", "...", "onl", key[3:8], key[:8]):
            with pytest.raises(DataError, match="no valid key"):
                access.revoke(connection, which)
        namesake = make_key_of(connection, key[3:9])
        assert access.revoke(connection, key[3:9]) == namesake, "a name before an id"
        assert access.revoke(connection, f"{key[:9]}...") == "only"


def make_key_of(connection: Connection, name: str) -> str:
    access.create(connection, "5a" * 32, access.Grant(name))
    return name


SLACK = 2.0
"""Of a machine that does other things too."""


def test_the_same_request_again_is_answered_from_what_is_kept(
    make_front: Callable[..., Any], make_key: Callable[..., str], database: Database
) -> None:
    key, other_key = make_key("one"), make_key("other")
    once = {"headers": {"idempotency-key": "order-17"}}

    async def run() -> None:
        async with make_front() as front, make_front() as other:
            front.engine.paused = True
            first = asyncio.create_task(front.ask(key, **once))
            await front.until(lambda: bool(front.service.requests))
            busy = await other.ask(key, **once)
            assert busy.status == 409 and busy.headers["retry-after"] == "1"
            front.engine.paused = False
            whole = await first
            again = await other.ask(key, **once)
            assert whole.status == again.status == 200 and whole.body == again.body
            assert again.headers == whole.headers | {"idempotent-replayed": "true"}
            assert (await front.ask(key, max_tokens=7, **once)).status == 422
            assert (await front.post("/chat/completions", CHAT, key, once["headers"])).status == 422, "another route"
            theirs = await front.ask(other_key, **once)
            assert theirs.status == 200 and "idempotent-replayed" not in theirs.headers, "each key has its own"
            bare = await front.ask(key, headers={"authorization": key} | once["headers"])
            assert bare.body == whole.body, "the same key, sent in another way"
            bad = await front.ask(key, headers={"idempotency-key": "x" * 256})
            assert bad.status == 400 and bad.json["error"]["param"] == "idempotency-key"

    asyncio.run(run())
    with database.reading() as connection:
        assert [(used.name, used.requests) for used in ledger.usage(connection)] == [("one", 1), ("other", 1)]
        assert all(b"choices" not in kept for kept in connection.execute(select(Repeat.answer)).scalars())


def test_whole_streams_are_kept_and_broken_ones_are_not(
    make_front: Callable[..., Any], make_key: Callable[..., str]
) -> None:
    key = make_key("one")

    async def run() -> None:
        async with make_front() as front:
            stream = {"stream": True, "headers": {"idempotency-key": "whole"}}
            first, again = await front.ask(key, **stream), await front.ask(key, **stream)
            assert first.body == again.body and first.body.endswith(b"data: [DONE]\n\n")
            assert again.headers["content-type"].startswith("text/event-stream")
            front.engine.rest = 0.002
            cut = {"stream": True, "max_tokens": 100, "headers": {"idempotency-key": "cut"}}
            for more in ({"leaves_after": 1}, {"seed": 666}):
                await front.ask(key, **cut | more)
                await front.until(lambda: not front.service.requests)
                while (answer := await front.ask(key, **cut)).status == 409:
                    await asyncio.sleep(0.01)
                assert answer.status == 200 and "idempotent-replayed" not in answer.headers
                cut["headers"] = {"idempotency-key": "failed"}
            body = {"model": "babbler", "input": "What is 1 + 2?", "max_output_tokens": 50, "background": True}
            sent = [await front.post("/v1/responses", body, key, {"idempotency-key": "background"}) for _ in range(2)]
            assert sent[0].body == sent[1].body and sent[0].json["status"] == "queued", "it runs, and runs once"
            refused = await front.ask(key, max_tokens=99_999, headers={"idempotency-key": "refused"})
            assert refused.status == 400
            assert (await front.ask(key, headers={"idempotency-key": "refused"})).status == 200

    asyncio.run(run())


def test_a_claim_whose_commit_ended_uncertain_is_taken_back(
    make_front: Callable[..., Any], make_key: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, once = make_key("one"), {"headers": {"idempotency-key": "order-17"}}
    whole, lost = Database.writing, list[bool]()

    @contextmanager
    def writing(database: Database, light: bool = False) -> Iterator[Connection]:
        with whole(database, light) as connection:
            yield connection
            claimed = connection.execute(select(Repeat.name)).first() is not None
        if claimed and not lost:
            lost.append(True)
            raise Down("the connection broke at the commit")

    async def run() -> None:
        async with make_front() as front:
            await front.until(lambda: front.books.ready)
            monkeypatch.setattr(Database, "writing", writing)
            assert (await front.ask(key, **once)).status == 503 and lost
            await front.until(lambda: front.books.ready)
            assert (await front.ask(key, **once)).status == 200

    asyncio.run(run())


def test_who_waits_for_a_write_may_be_cancelled(database: Database) -> None:
    clerk = Clerk(database)

    async def run() -> None:
        under_way = asyncio.ensure_future(asyncio.wrap_future(clerk.write(lambda connection: time.sleep(0.05))))
        await asyncio.sleep(0)
        under_way.cancel()
        assert await asyncio.wrap_future(clerk.write(lambda connection: 7)) == 7

    asyncio.run(asyncio.wait_for(run(), 60))
    assert clerk.finish(60)


def test_what_is_sealed_opens_with_its_secret_alone() -> None:
    text = b"an answer " * 1000
    own, other = b"s" * 32, b"o" * 32
    sealed = seal(text, own)
    assert unseal(sealed, own) == text and b"answer" not in sealed and seal(text, own) != sealed
    for damaged, secret in ((sealed, other), (sealed[:-1] + bytes([sealed[-1] ^ 1]), own)):
        with pytest.raises(InvalidTag):
            unseal(damaged, secret)
