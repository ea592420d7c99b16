"""The gateway's books: what it knows of keys and budgets in memory, and what it has under way to the disk.

    books = Books(url, pepper, prices)
    task = asyncio.create_task(books.run(revoked))        # `revoked(account)`: its requests end
    books.check(identity)                                 # by the header alone; Refusal 402, 503, 507
    tab = books.open(identity, model, prompt, answer, work, booked)
    books.close(tab)                                      # always, at the end: settled by the work's tally
    await books.finish(seconds)

Nothing here waits for the disk. A request is reserved while the engine begins on it; it is for the caller to let no
token out before `booked` is called: then the reservation outlives this process, but a loss of power only from the next
settlement on. If the reservation cannot be written, the work fails with a reason. Budgets are
looked at in memory first and decided in the transaction, so that several gateways together stay within them.
"""

import asyncio
import functools
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection

from sputnik.serve.books import access, ledger
from sputnik.serve.books.access import Issued
from sputnik.serve.books.alive import Alive
from sputnik.serve.books.clerk import Clerk
from sputnik.serve.books.database import Down, open_database
from sputnik.serve.books.ledger import Purse, Reservation
from sputnik.serve.books.prices import Tokens, load_prices, money
from sputnik.serve.identity import Identity
from sputnik.serve.measures import Tally
from sputnik.serve.refusals import Refusal

LOOK = 0.4
"""Seconds between looks at what other processes have changed: keys, above all."""
NOTE = 5.0
"""Seconds between notes of how far open requests are, and of when keys were last used."""
SWEEP = 30.0
"""Seconds between looks for gateways that died."""
SURE = 5.0
"""Seconds after which one without PostgreSQL's lock is looked at again: it may have lost a connection alone."""
T = TypeVar("T")


class Work(Protocol):
    def fail(self, error: Refusal) -> None: ...

    def tally(self) -> Tally: ...


@dataclass(eq=False)
class Tab:
    """A request that is open in the books."""

    id: str
    account: str
    amount: int
    """Reserved."""
    work: Work
    booked: Callable[[], None]
    opened: float


class Books:
    def __init__(self, url: str, pepper: str, prices: Path | None = None) -> None:
        self.database = open_database(url)
        self.prices = load_prices(prices)
        self.clerk = Clerk(self.database)
        self.issued = Issued(pepper)
        self.id = secrets.token_hex(16)
        self._alive = Alive(self.database, self.id)
        self._watch = threading.Lock()
        """Of the thread that looks at the database, or ends that."""
        self._joined = self._listed = self._ending = False
        self._tabs: dict[str, Tab] = {}
        self._purses: dict[str, Purse] = {}
        """Of accounts with a budget, as the last transaction left them."""
        self._under_way: Counter[str] = Counter()
        """Amounts that are not yet reserved in the database, by account."""
        self._poor: set[str] = set()
        """Accounts that were refused: another process may have freed something."""
        self._used: dict[str, int] = {}
        self._swept = -SWEEP
        self._suspects: set[str] = set()
        """Without a lock at the last look."""

    # --- the clock ---

    async def run(self, revoked: Callable[[str], None]) -> None:
        """For ever."""
        noted = time.monotonic()
        while self.clerk.alive and not self._ending:
            try:
                rows, purses = await asyncio.to_thread(self._look)
            except Down as down:
                if not self._joined:
                    print(f"gateway: the database cannot be read: {down.reason}", file=sys.stderr, flush=True)
            else:
                self._joined = True
                budgets = [row for row in rows if row.budget is not None]
                self._purses |= {row.id: Purse(row.budget, row.spent, row.held) for row in budgets} | purses
                for account in self.issued.learn(rows):
                    revoked(account)
            if time.monotonic() - noted >= NOTE:
                noted = time.monotonic()
                self._note(noted - NOTE)
            await asyncio.sleep(LOOK)
        if not self._ending:
            raise RuntimeError("the clerk has ended")

    def _look(self) -> tuple[list[Any], dict[str, Purse]]:
        """Keys that have changed, and the purses of who was refused."""
        with self._watch:
            return self._looked() if not self._ending else ([], {})

    def _looked(self) -> tuple[list[Any], dict[str, Purse]]:
        if self._alive.hold():
            self._listed = False  # who saw us without it may have taken us for dead
        if not self._listed:
            with self.database.writing() as connection:
                ledger.join(connection, self.id)
            self._listed = True
            if self._joined:  # others have lost theirs, too, and need a moment
                self._swept = time.monotonic()
        if time.monotonic() - self._swept >= SWEEP:
            self._swept = time.monotonic()
            self._sweep()
        poor = list(self._poor)
        with self.database.reading() as connection:
            found = ledger.purses(connection, poor) if poor else {}
            changed = access.changes(connection, self.issued.seen or 0)
        self._poor.difference_update(poor)
        return changed, found

    def _sweep(self) -> None:
        """Settle what dead gateways left, and forget answers of more than a day ago."""
        with self.database.writing() as connection:
            ledger.forget_repeats(connection, int(time.time()) - ledger.DAY)
            others = ledger.gateways(connection)
        dead = set(self._alive.dead(others))
        sure = dead & self._suspects if self.database.path is None else dead
        self._suspects = dead - sure
        if self._suspects:
            self._swept += SURE - SWEEP
        for gateway in sure:
            with self.database.writing() as connection:
                ledger.recover(connection, gateway)

    def _note(self, before: float) -> None:
        """Of requests that were opened before."""
        used, self._used = self._used, {}
        notes = [(tab.id, tokens_of(tab.work.tally())) for tab in self._tabs.values() if tab.opened < before]
        if used or notes:
            self.clerk.write(functools.partial(_write_notes, used=used, notes=notes), light=True)

    # --- requests ---

    @property
    def ready(self) -> bool:
        """The database has been read, and can be written to."""
        return self._joined and self.clerk.down is None

    def check(self, identity: Identity, repeats: bool = False) -> None:
        """Whether anything billable may begin. `repeats`: it may be answered from what is kept, which costs nothing."""
        if self.clerk.down is not None:
            raise refusal(self.clerk.down)
        if not self._joined:
            raise refusal(Down("it has not been read yet"))
        left = self._left(identity.id)
        if left is not None and left <= 0 and not repeats:
            raise self._spent(identity.id, left, 0)

    def open(
        self, identity: Identity, model: str, prompt: int, answer: int, work: Work, booked: Callable[[], None]
    ) -> Tab:
        """Reserve what so many tokens of prompt and at most of answer may cost. Refusal 402: more than is left; 401:
        the key was revoked while the request was read."""
        now, account = time.time(), identity.id
        self.issued.check(account)
        price = self.prices.price(model, now)
        amount, left = price.most(prompt, answer), self._left(account)
        if left is not None and amount > left:
            raise self._spent(account, left, amount)
        tab = Tab(secrets.token_hex(16), account, amount, work, booked, time.monotonic())
        asked = Reservation(tab.id, account, model, self.id, int(now), price, amount)
        self._tabs[tab.id] = tab
        self._under_way[account] += amount
        self._used[account] = int(now)
        reserve = functools.partial(ledger.reserve, asked=asked)
        self._write(reserve, lambda future: self._reserved(tab, future), light=True)
        return tab

    def close(self, tab: Tab) -> None:
        del self._tabs[tab.id]
        tally = tab.work.tally()
        ended = "aborted" if "aborted" in tally.ends else "finished"
        settle = functools.partial(ledger.settle, id=tab.id, tokens=tokens_of(tally), ended=ended)
        self._write(settle, self._settled, keep=True)

    def _reserved(self, tab: Tab, future: "Future[Purse | None]") -> None:
        self._under_way[tab.account] -= tab.amount
        error = future.exception()
        if error is not None:  # what is no fault of the database's is one of ours, and the clerk has told of it
            ours = Refusal(500, "an error of ours; it is in the log", retry=False)
            tab.work.fail(refusal(error) if isinstance(error, Down) else ours)
            return
        purse = future.result()
        if purse is None:
            tab.work.fail(self._spent(tab.account, 0, tab.amount))
            return
        self._learn(tab.account, purse)
        tab.booked()

    def _settled(self, future: "Future[tuple[str, Purse] | None]") -> None:
        found = future.result()
        if found is not None:
            self._learn(*found)

    def _learn(self, account: str, purse: Purse) -> None:
        if purse.budget is not None:
            self._purses[account] = purse

    def _left(self, account: str) -> int | None:
        purse = self._purses.get(account)
        return None if purse is None or purse.left is None else purse.left - self._under_way[account]

    def _spent(self, account: str, left: int, amount: int) -> Refusal:
        self._poor.add(account)
        currency, more = self.prices.currency, ""
        if left > 0:
            more = f"; this request may cost {money(amount)}: a lower max_tokens makes it less"
        text = f"the budget of this key is spent: {money(max(0, left))} {currency} are left{more}"
        return Refusal(402, text, code="insufficient_balance", retry=False)

    # --- beside requests ---

    async def balance(self, identity: Identity) -> dict[str, Any]:
        """As DeepSeek's `GET /user/balance` has it; without a budget there is no balance to tell."""
        try:
            purse = (await asyncio.to_thread(self._read, identity.id)).get(identity.id)
        except Down as down:
            raise refusal(down) from None
        if purse is None or purse.budget is None:
            return {"is_available": True, "balance_infos": []}
        total = money(max(0, purse.budget - purse.spent))
        info = {"currency": self.prices.currency, "total_balance": total}
        info |= {"granted_balance": total, "topped_up_balance": money(0)}
        return {"is_available": purse.budget > purse.spent, "balance_infos": [info]}

    def _read(self, account: str) -> dict[str, Purse]:
        with self.database.reading() as connection:
            return ledger.purses(connection, [account])

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Its result once it is on the disk; Refusal if that cannot be."""
        try:
            return await asyncio.wrap_future(self.clerk.write(work))
        except Down as down:
            raise refusal(down) from None

    def _write(self, work: Callable[[Connection], T], done: "Callable[[Future[T]], None]", **how: bool) -> None:
        loop = asyncio.get_running_loop()
        self.clerk.write(work, **how).add_done_callback(lambda future: loop.call_soon_threadsafe(done, future))

    async def finish(self, seconds: float) -> bool:
        """Write what is left; False if that was not possible."""
        self._ending = True
        self._note(time.monotonic())
        self.clerk.write(functools.partial(ledger.recover, gateway=self.id))
        written = await asyncio.to_thread(self.clerk.finish, seconds)
        await asyncio.to_thread(self._leave)
        return written

    def _leave(self) -> None:
        with self._watch:  # a look that has begun would else take the lock again, and keep its connection
            self._alive.let_go()
            self.database.close()


def tokens_of(tally: Tally) -> Tokens:
    """What is paid for: nothing before the first token has come."""
    if tally.first is None and not tally.written:  # of an answer that came whole nobody knows when it began
        return Tokens()
    hit = tally.cached or 0
    return Tokens(hit, tally.prompt - hit, tally.written, tally.thought)


def refusal(down: Down) -> Refusal:
    if down.full:
        return Refusal(507, "usage cannot be written down: the disk is full", code="disk_full", retry_after=10)
    text = f"usage cannot be written down: {down.reason}"
    return Refusal(503, text, code="books_unavailable", retry_after=2)


def _write_notes(connection: Connection, used: dict[str, int], notes: list[tuple[str, Tokens]]) -> None:
    access.touch(connection, used)
    for id, tokens in notes:
        ledger.note(connection, id, tokens)
