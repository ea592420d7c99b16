"""The gateway process: `python -m sputnik.serve.gateway` with its settings as JSON on stdin. HTTP in front, no torch.

Granian serves two applications on one event loop: the API, and the operator's on loopback. SIGTERM drains: new requests
get 503 at once, running ones their time, then it exits with 0.
"""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from sputnik.errors import ConfigError, MissingPackage
from sputnik.serve.beats import Beat, Pulse
from sputnik.serve.guard import App
from sputnik.serve.logs import Journal, Watched
from sputnik.serve.ports import check_free
from sputnik.serve.service import Service
from sputnik.serve.settings import GatewaySettings
from sputnik.serve.status import watch
from sputnik.serve.titles import set_title
from sputnik.serve.tracing import make_tracer

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
HEADER_MILLISECONDS = 10_000
"""That a client may take to send its headers."""
CONNECTIONS = 4096
ORPHANED = 20.0
"""Seconds beyond its drain that a gateway without a supervisor has to end."""
BOOKS_SECONDS = 5.0
"""At the end, for what is still to be written down."""


def hosts_of(host: str) -> Collection[str] | None:
    """Names by which a server on this address may be called."""
    return LOOPBACK if host in LOOPBACK else None


def http_server(app: App, host: str, port: int) -> Any:
    try:
        from granian.constants import HTTPModes, Interfaces
        from granian.http import HTTP1Settings
        from granian.server.embed import Server
    except ImportError:
        raise MissingPackage("granian", extra="serve") from None
    limits = HTTP1Settings(header_read_timeout=HEADER_MILLISECONDS)
    return Server(
        app, host, port, interface=Interfaces.ASGINL, http=HTTPModes.http1, websockets=False, log_enabled=False,
        backlog=CONNECTIONS, backpressure=CONNECTIONS, http1_settings=limits,
    )  # fmt: skip


async def serve(settings: GatewaySettings) -> int:
    from sputnik.serve.app import make_app, make_operator_app

    service = Service(settings)
    inner = _before_others(service, settings) if settings.upstreams else make_app(service, hosts_of(settings.host))
    tracer = make_tracer(os.environ)
    app = Watched(inner, service, tracer)
    pulse: Pulse | None = None
    if settings.beats is not None:

        def life() -> Beat:
            return Beat(service.state, service.turns, len(service.requests))

        pulse = Pulse(settings.beats, life, settings.drain + ORPHANED)
        pulse.start()
    tasks = service.begin()
    servers = [
        http_server(app, settings.host, settings.port),
        http_server(make_operator_app(service), "127.0.0.1", settings.operator_port),
    ]
    running = [asyncio.create_task(server.serve()) for server in servers]
    tasks.append(asyncio.create_task(watch(service, service.board, settings.host, settings.port, settings.probe)))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([stopping, *tasks, *running], return_when=asyncio.FIRST_COMPLETED)
    if not stop.is_set():
        for task in [*tasks, *running]:  # one of them has ended, which none of them should
            if task.done():
                task.result()
        return 1
    drained = await service.drain(settings.drain)
    await asyncio.sleep(0.2)  # the last bytes leave
    for server in servers:
        server.stop()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*running), 5)
    if service.books is not None and not await service.books.finish(BOOKS_SECONDS):
        print("gateway: the last usage could not be written down", file=sys.stderr, flush=True)
    if tracer is not None:
        tracer.close()
    if pulse is not None:
        pulse.tidy(Path(settings.socket).parent)
    return 0 if drained else 1


def _before_others(service: Service, settings: GatewaySettings) -> App:
    """Upstreams take the worker's place."""
    from sputnik.serve.upstreams.fleet import Fleet
    from sputnik.serve.upstreams.routes import make_upstream_app

    assert settings.upstreams is not None
    service.engine = fleet = Fleet(settings.upstreams, service.resized, service.stepped)
    return make_upstream_app(service, fleet, hosts_of(settings.host))


def main(settings: GatewaySettings) -> int:
    set_title("sputnik gateway")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a file, and many allow 1,024
    try:
        check_free(settings.host, settings.port)
        check_free("127.0.0.1", settings.operator_port)
    except ConfigError as error:
        print(f"gateway: {error}", file=sys.stderr, flush=True)
        return 1  # the one before us may still be saying goodbye: it is tried again
    journal = Journal(settings.log, settings.log_level)
    try:
        return asyncio.run(serve(settings))
    finally:
        journal.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = main(msgspec.json.decode(sys.stdin.buffer.read(), type=GatewaySettings))
    sys.stderr.flush()
    os._exit(code)  # Granian's threads may still hold connections, and abort when the interpreter ends under them
