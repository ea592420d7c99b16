"""The one thread that writes to the database: what has come in meanwhile goes into one transaction (group commit).

    clerk = Clerk(database)
    future = clerk.write(work)                    # work(connection) -> result; the future has it once it is on the disk
    clerk.write(work, keep=True)                  # tried until it succeeds, whatever the database does
    clerk.write(work, light=True)                 # without waiting for the disk: `Database.light`
    clerk.down                                    # why nothing can be written now, or None
    clerk.finish(seconds)

A failed transaction fails all that was in it with `Down`, but for what is to be kept; the database is tried twice a
second then, with a write, and `down` is None again as soon as one succeeds: nobody need start anything again. Errors
that are no fault of the database's (a bug of ours) hit the one job that made them; of a batch that stood in the way of
another gateway's each job is done by itself, for one alone never waits with something in its hands.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection, delete, insert

from sputnik.serve.books.database import OURS, Clash, Database, Down
from sputnik.serve.books.tables import Fact

AGAIN = 0.5
"""Seconds between attempts while the database is down."""
BATCH = 256
LATER = 0.05
"""Seconds that a write which is kept anyway may wait for others, to share their commit."""
T = TypeVar("T")


@dataclass
class _Job:
    work: Callable[[Connection], Any]
    keep: bool
    light: bool
    since: float = field(default_factory=time.monotonic)
    future: "Future[Any]" = field(default_factory=Future)


class Clerk:
    def __init__(self, database: Database) -> None:
        self._database = database
        self.down: Down | None = None
        self.commits = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._kept: list[_Job] = []
        """Failed once, to be tried again before all others."""
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="clerk", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def write(self, work: Callable[[Connection], T], keep: bool = False, light: bool = False) -> "Future[T]":
        job = _Job(work, keep, light)
        job.future.set_running_or_notify_cancel()  # who waits for it may be cancelled, it may not
        self._jobs.put(job)
        return job.future

    def finish(self, seconds: float) -> bool:
        """Write what is left and end; False: that took too long, and it is lost."""
        self._jobs.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive() and not self._kept

    def _run(self) -> None:
        while not self._ending or (self._kept and self.down is None):
            batch = self._batch()
            light, rest = [job for job in batch if job.light], [job for job in batch if not job.light]
            if light:
                self._write(light, light=True)
            if rest and not self._is_due(rest):
                self._kept = rest + self._kept
            elif rest or (self.down is not None and not light):
                self._write(rest)

    def _is_due(self, batch: list[_Job]) -> bool:
        """What nobody waits for is put off a little, so that the disk does not hold up reservations all the time."""
        now = time.monotonic()
        if self._ending or self.down is not None or len(batch) >= BATCH or not all(job.keep for job in batch):
            return True
        return now - min(job.since for job in batch) >= LATER

    def _batch(self) -> list[_Job]:
        """What is there, after waiting for something; while the database is down, after half a second."""
        if self.down is not None:
            time.sleep(AGAIN)
        batch, self._kept = self._kept, []
        wait, seconds = self.down is None, LATER if batch else None
        try:
            while len(batch) < 2 * BATCH:
                job = self._jobs.get(block=wait, timeout=seconds)
                wait = False
                if job is None:
                    self._ending = True
                    break
                batch.append(job)
        except queue.Empty:
            return batch
        return batch

    def _write(self, batch: list[_Job], light: bool = False) -> None:
        try:
            with self._database.writing(light) as connection:
                results = [job.work(connection) for job in batch]
                if self.down is not None:
                    _try(connection)
        except (Clash, *OURS):
            self._one_by_one(batch)
        except Down as down:
            self._failed(batch, down)
        else:
            self.commits += 1
            if self.down is not None:
                self._say("the database can be written to again")
                self.down = None
            for job, result in zip(batch, results):
                job.future.set_result(result)

    def _one_by_one(self, batch: list[_Job]) -> None:
        for place, job in enumerate(batch):
            try:
                with self._database.writing() as connection:
                    result = job.work(connection)
            except Down as down:
                self._failed(batch[place:], down)
                return
            except OURS as error:
                self._say(f"a write of ours is wrong: {type(error.orig).__name__}")
                job.future.set_exception(error)
            else:
                job.future.set_result(result)

    def _failed(self, batch: list[_Job], down: Down) -> None:
        if self.down is None:
            self._say(f"the database cannot be written to: {down.reason}")
        self.down = down
        for job in batch:
            if job.keep:
                self._kept.append(job)
            else:
                job.future.set_exception(down)

    def _say(self, text: str) -> None:
        print(f"gateway: {text}", file=sys.stderr, flush=True)


def _try(connection: Connection) -> None:
    """A write that needs room on the disk."""
    connection.execute(delete(Fact).where(Fact.name == "tried"))
    connection.execute(insert(Fact).values(name="tried", value=str(int(time.time()))))
