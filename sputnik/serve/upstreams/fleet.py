"""The replicas: probed, counted, chosen. It is the `Engine` of a gateway that has no worker.

    fleet = Fleet(settings, resized, stepped)
    task = asyncio.create_task(fleet.run())                    # probes for ever
    replica = fleet.choose(model, prefix, tried)               # Refusal 404 or 503
    async with fleet.ask(replica, "/chat/completions", body, id) as response: ...

The least loaded one is chosen, by the tokens that it still has to write; with affinity the one that had the same
beginning of a conversation, unless it has a quarter more to do than the others. A replica that fell is probed with a
real token before it is trusted again. Keys are sent to upstreams and go nowhere else.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from typing import Any, Protocol

import httpx2
import msgspec

from sputnik.serve.refusals import Refusal
from sputnik.serve.settings import UpstreamSettings
from sputnik.serve.upstreams.breaker import Breaker, Kind

LOG = logging.getLogger("sputnik")
PROBE_SECONDS = 5.0
TOKEN_SECONDS = 30.0
CONNECT_SECONDS = 5.0
BUSY = (429, 503, 529)
"""Statuses of a server that is well and has no room."""
MOST_READ = 16 << 20
"""Bytes of an answer that is not streamed, or of a list of models."""


class Flight(Protocol):
    """A request that is with a replica."""

    def fallen(self) -> None:
        """The replica is down."""


class Replica:
    def __init__(self, url: str, key: str | None) -> None:
        self.url = url if url.endswith("/v1") else f"{url}/v1"
        self.name = url.partition("://")[2].removesuffix("/v1")
        """Host, port and path: what logs and the status page show."""
        self.headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})
        self.breaker = Breaker()
        self.models: dict[str, dict[str, Any]] = {}
        self.reason = ""
        """Why it is down, or was."""
        self.load = 0.0
        """Tokens that it has to write."""
        self.used = 0.0
        """When it was last chosen."""
        self.flights: set[Flight] = set()

    @contextlib.contextmanager
    def carrying(self, flight: Flight, cost: float) -> Iterator[None]:
        self.flights.add(flight)
        self.load += cost
        try:
            yield
        finally:
            self.flights.discard(flight)
            self.load -= cost


class Fleet:
    def __init__(
        self, settings: UpstreamSettings, resized: Callable[[int], None], stepped: Callable[[int], None]
    ) -> None:
        """`resized`: so many answers can be written at once now; `stepped`: so many tokens have come."""
        self.settings, self._resized, self.stepped = settings, resized, stepped
        keys = settings.keys * len(settings.urls) if len(settings.keys) == 1 else settings.keys
        self.replicas = [Replica(url, keys[place] if keys else None) for place, url in enumerate(settings.urls)]
        limits = httpx2.Limits(max_connections=None, keepalive_expiry=15.0)
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS, write=PROBE_SECONDS * 3)
        self._client = httpx2.AsyncClient(limits=limits, timeout=timeout, trust_env=False)

    # --- as the engine of a service ---

    @property
    def up(self) -> bool:
        return any(replica.breaker.up for replica in self.replicas)

    @property
    def died(self) -> int:
        return sum(replica.breaker.falls for replica in self.replicas)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for replica in self.replicas:
                group.create_task(self._watch(replica))
                group.create_task(self._doubt(replica))

    async def probe(self) -> float:
        begun = time.monotonic()
        trusted = [replica for replica in self.replicas if replica.breaker.up]
        if not trusted:
            raise ConnectionRefusedError("no upstream answers")
        try:
            came = await self._token(min(trusted, key=lambda each: each.load))
        except (httpx2.HTTPError, ValueError) as error:
            raise ConnectionResetError(str(error)) from None
        if not came:
            raise ConnectionRefusedError("the upstreams are busy")
        return time.monotonic() - begun

    async def figures(self) -> dict[str, float]:
        breakers = [replica.breaker for replica in self.replicas]
        up, doubted = sum(each.up for each in breakers), sum(each.doubted for each in breakers)
        return {"replicas": float(len(breakers)), "replicas_up": float(up), "replicas_doubted": float(doubted)}

    # --- whom to ask ---

    def models(self) -> dict[str, dict[str, Any]]:
        """By the name under which clients ask for them; also of replicas that are down."""
        found = {name: entry for replica in self.replicas for name, entry in replica.models.items()}
        name = self.settings.name
        return found if name is None else {name: {**next(iter(found.values()), {}), "id": name}}

    def own_name(self, replica: Replica, model: str) -> str:
        """What the replica calls it."""
        return model if self.settings.name is None else next(iter(replica.models), model)

    def trusted(self, model: str, tried: Collection[Replica] = ()) -> list[Replica]:
        """Who can answer for it now, less those that were tried. Refusal 404 or 503 if nobody can."""
        known = self.models()
        if known and model not in known:
            names = ", ".join(list(known)[:20])
            raise Refusal(404, f"no model {model!r} here; there are {names}", code="model_not_found", param="model")
        able = [each for each in self.replicas if each.breaker.up and self.own_name(each, model) in each.models]
        found = [each for each in able if each not in tried]
        if not found:
            text = "no upstream answers now"
            raise Refusal(503, text, code="no_upstream", retry_after=2 * self.settings.every)
        return found

    def choose(self, model: str, prefix: bytes, tried: Collection[Replica] = ()) -> Replica:
        trusted = self.trusted(model, tried)
        chosen = min(trusted, key=lambda each: (each.load, each.used))
        if self.settings.affinity:
            most = 1.25 * sum(each.load for each in trusted) / len(trusted)
            near = [each for each in trusted if each.load <= most]
            chosen = min(
                near or trusted, key=lambda each: hashlib.blake2b(prefix, key=each.name.encode()[:64]).digest()
            )
        chosen.used = time.monotonic()
        return chosen

    @contextlib.asynccontextmanager
    async def ask(
        self, replica: Replica, path: str, body: bytes, headers: dict[str, str]
    ) -> AsyncIterator[httpx2.Response]:
        """A request under way; leaving the block early breaks it off."""
        headers = replica.headers | {"content-type": "application/json"} | headers
        async with self._client.stream("POST", replica.url + path, content=body, headers=headers) as response:
            yield response

    def worked(self, replica: Replica, kind: Kind) -> None:
        self._change(replica, lambda: replica.breaker.worked(kind, time.monotonic()))

    def failed(self, replica: Replica, kind: Kind, reason: str) -> None:
        if not replica.reason and not replica.models:
            LOG.warning("upstream does not answer yet", extra={"fields": {"upstream": replica.name, "reason": reason}})
        replica.reason = reason
        self._change(replica, lambda: replica.breaker.failed(kind, time.monotonic()))

    def _change(self, replica: Replica, happens: Callable[[], None]) -> None:
        was = replica.breaker.up
        happens()
        if replica.breaker.up == was:
            return
        told = {"upstream": replica.name} | ({"reason": replica.reason} if was else {})
        LOG.log(
            logging.WARNING if was else logging.INFO, "upstream down" if was else "upstream up", extra={"fields": told}
        )
        self._resized(self.settings.slots * sum(each.breaker.up for each in self.replicas))
        if was:
            for flight in list(replica.flights):
                flight.fallen()

    # --- probes ---

    async def _watch(self, replica: Replica) -> None:
        while True:
            async with self._trial(replica, "probe"), asyncio.timeout(PROBE_SECONDS):
                replica.models = await self._list(replica)
            await asyncio.sleep(self.settings.every)

    async def _doubt(self, replica: Replica) -> None:
        """Beside the probes, which must not wait for a token of a server that hangs."""
        while True:
            if replica.breaker.doubted:
                async with self._trial(replica, "token"):
                    await self._token(replica)
            await asyncio.sleep(self.settings.every)

    @contextlib.asynccontextmanager
    async def _trial(self, replica: Replica, kind: Kind) -> AsyncIterator[None]:
        """Tells the breaker how the block went."""
        try:
            yield
            self.worked(replica, kind)
        except TimeoutError:
            self.failed(replica, kind, "it did not answer a probe in time")
        except httpx2.HTTPError as error:
            self.failed(replica, kind, type(error).__name__)
        except ValueError as error:
            self.failed(replica, kind, str(error))

    async def _list(self, replica: Replica) -> dict[str, dict[str, Any]]:
        async with self._client.stream("GET", f"{replica.url}/models", headers=replica.headers) as response:
            found = await read_object(response)
        entries = found.get("data")
        if response.status_code != 200 or not isinstance(entries, list):
            raise ValueError(f"its list of models came with status {response.status_code}")
        names = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        if not names:
            raise ValueError("it has no model")
        return {entry["id"]: entry for entry in names}

    async def _token(self, replica: Replica) -> bool:
        """One real token; False: it is too busy for one. TimeoutError, HTTPError or ValueError: it is sick."""
        messages = [{"role": "user", "content": "1"}]
        question = {"model": next(iter(replica.models)), "messages": messages, "max_tokens": 1}
        async with (
            asyncio.timeout(TOKEN_SECONDS),
            self.ask(replica, "/chat/completions", msgspec.json.encode(question), {}) as response,
        ):
            if response.status_code in BUSY:
                return False
            if response.status_code != 200:
                raise ValueError(f"a probe was answered with status {response.status_code}")
            await read_object(response)
        return True


async def read_object(response: httpx2.Response) -> dict[str, Any]:
    """A JSON object, read up to a bound; ValueError if it is none."""
    found = bytearray()
    async for piece in response.aiter_bytes():
        found += piece
        if len(found) > MOST_READ:
            raise ValueError(f"more than {MOST_READ} bytes")
    try:
        value = msgspec.json.decode(found)
    except (msgspec.DecodeError, RecursionError):
        raise ValueError("what came is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("what came is not a JSON object")
    return value
