"""What supervisor, worker and gateway are told: plain records that go to a process as JSON on its stdin.

Not on its command line: everybody on the machine can read those, and keys are among it. `ServeConfig` of `cli/serve.py`
is what a user sets; these are made from it.
"""

from typing import Literal

import msgspec

Template = Literal["auto", "chat", "zero", "own"]


class WorkerSettings(msgspec.Struct, frozen=True):
    model: str
    socket: str
    """Path of the Unix socket, in a directory that only its user may enter."""
    beats: int | None = None
    """Descriptor of the heart-beat."""
    name: str = ""
    template: Template = "auto"
    device: str = "cpu"
    precision: str = "auto"
    weights: str | None = None
    exact: bool = False
    slots: int = 32
    cache_bytes: int = 1 << 30
    drain: float = 30.0
    """Seconds that running requests get after SIGTERM."""


class UpstreamSettings(msgspec.Struct, frozen=True):
    """Other servers that answer in place of a worker, all of them with the same models."""

    urls: list[str]
    keys: list[str]
    """One for each, or one for all, or none."""
    name: str | None = None
    """The name under which the one model of each is known here; None: their own names."""
    affinity: bool = False
    slots: int = 32
    """Answers written at once, of each."""
    every: float = 2.0
    """Seconds between probes."""
    first: float = 300.0
    """Seconds that a first token may take."""
    whole: float = 1800.0
    """Seconds that an answer may take which is not streamed: nothing is heard of it before its end."""
    stall: float = 60.0
    """Seconds of silence in the middle of an answer."""


class BookSettings(msgspec.Struct, frozen=True):
    """Where keys and usage are written down."""

    url: str
    """Of the database; empty: the user's own file."""
    pepper: str
    prices: str | None = None
    """Path of a price table; None: the one that ships."""


class GatewaySettings(msgspec.Struct, frozen=True):
    socket: str
    host: str
    port: int
    operator_port: int
    """Loopback: metrics, and what is running."""
    name: str
    keys: list[str] | None
    """Hashes; None: nobody is asked for one."""
    beats: int | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 4096
    queue: int = 256
    queue_tokens: int = 1 << 20
    max_wait: float = 120.0
    per_key: int = 64
    drain: float = 30.0
    books: BookSettings | None = None
    """None: nothing is written down, and there are no keys but `keys`."""
    upstreams: UpstreamSettings | None = None
    probe: float = 15.0
    """Seconds between probes for the status page."""
    log: str | None = None
    """A file; None: stderr."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
