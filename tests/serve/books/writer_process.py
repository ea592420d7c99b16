"""A process to be killed: for each line on stdin it forks a writer, which says on stdout what has been committed.

python writer_process.py URL            ->  "pid 123", then "reserved ID", "settled ID", "key ID", ... without an end
"""

import functools
import itertools
import os
import secrets
import sys
import threading
from concurrent.futures import Future
from typing import Any

from sputnik.serve.books import ledger
from sputnik.serve.books.access import Grant, create
from sputnik.serve.books.clerk import Clerk
from sputnik.serve.books.database import open_database
from sputnik.serve.books.key import id_of
from sputnik.serve.books.prices import Price, Tokens

PRICE = Price(140_000, 550_000, 2_190_000)
PEPPER = "5a" * 32


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def write_for_ever(url: str) -> None:
    clerk, room = Clerk(open_database(url)), threading.Semaphore(40)
    gateway = secrets.token_hex(16)
    clerk.write(functools.partial(ledger.join, gateway=gateway)).result()

    def done(text: str, future: "Future[Any]") -> None:
        say(f"{text} {id_of(future.result())}" if text == "key" else text)
        room.release()

    for number in itertools.count():
        id = secrets.token_hex(16)
        asked = ledger.Reservation(id, f"a{number % 3}", "m", gateway, 0, PRICE, 1000)
        works: list[tuple[str, Any]] = [
            (f"reserved {id}", functools.partial(ledger.reserve, asked=asked)),
            (f"settled {id}", functools.partial(ledger.settle, id=id, tokens=Tokens(1, 2, 3), ended="finished")),
        ]
        if number % 10 == 0:
            works.append(("key", functools.partial(create, pepper=PEPPER, grant=Grant(id, budget=5))))
        for text, work in works:
            room.acquire()
            clerk.write(work, light=text.startswith("reserved")).add_done_callback(functools.partial(done, text))


def main(url: str) -> None:
    say("here")
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            say(f"pid {os.getpid()}")
            write_for_ever(url)
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main(sys.argv[1])
