"""`sputnik serve [MODEL]`: the API server, OpenAI's and DeepSeek's: address and key are printed when it is ready.

Three processes (docs/serving.md): this one supervises, a gateway speaks HTTP, a worker computes. SPUTNIK_API_KEY holds
the keys that are accepted, with commas between several; without it a new one is made and printed. Ctrl-C or SIGTERM let
running answers finish; Ctrl-C once more does not.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from tyro.conf import Positional, UseAppendAction, arg

from sputnik.errors import ConfigError, MissingPackage
from sputnik.serve.identity import key_hash, new_key
from sputnik.serve.ports import check_free
from sputnik.serve.settings import BookSettings, GatewaySettings, Template, UpstreamSettings, WorkerSettings
from sputnik.serve.supervisor import Child, Supervisor
from sputnik.serve.titles import set_title
from sputnik.serve.watch import GATEWAY, WORKER
from sputnik.text.named_models import EMBEDDED

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PACKAGES = ("fastapi", "granian", "prometheus_client", "setproctitle", "sqlalchemy", "alembic")


@dataclass(frozen=True)
class FrontConfig:
    """What is asked of whoever comes, whatever engine answers."""

    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = ""
    """A checkpoint directory, a GGUF file, a run, or the name of a run or a model (smollm2); r1-mini if left out."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    operator_port: int | None = None
    """Metrics, on loopback alone; one more than the port."""
    name: str | None = None
    """Of the model, as clients name it; else that of its directory."""
    open: bool = False
    """Ask nobody for a key; on loopback alone."""
    slots: int = 32
    """Answers written at once."""
    queue: int = 256
    """Requests that may wait; others are refused."""
    max_wait: float = 120.0
    """Seconds; who would wait longer is refused at once."""
    per_key: int = 64
    """Requests of one key, waiting and running."""
    drain: float = 30.0
    """Seconds that running answers get at the end."""
    database: str = ""
    """Keys and usage: a file, sqlite:///PATH, postgresql+psycopg://USER@HOST/NAME, or none; else a file of yours."""
    prices: Path | None = None
    """What tokens cost: a TOML file; else DeepSeek's first prices."""
    upstream: UseAppendAction[tuple[str, ...]] = ()
    """Another OpenAI-compatible server that answers, http://host:8000; several times for several. No model then.
    Its key, or keys with commas between: SPUTNIK_UPSTREAM_KEY, or in the file that SPUTNIK_UPSTREAM_KEY_FILE names."""
    affinity: bool = False
    """Conversations that begin alike go to the same upstream, where its cache has them."""
    log: Path | None = None
    """A file for the log, a JSON object per line; else stderr, as sentences on a terminal."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True)
class ServeConfig(FrontConfig):
    template: Template = "auto"
    """auto: the one the model was trained with."""
    device: str = "cpu"
    precision: str = "auto"
    weights: str | None = None
    """int8 or int4: smaller and faster."""
    exact: bool = False
    """The reproducible mode: an answer depends on nothing but its request, even over a crash; slower prefill."""
    cache_gib: float = 1.0
    max_tokens: int = 4096
    """Of requests that name none, thinking included; less where the context has less room."""
    temperature: float = 0.6
    """Of requests that name none."""
    top_p: float = 0.95

    def __post_init__(self) -> None:
        bounds = {"slots": 1, "max_tokens": 1, "queue": 1, "per_key": 1, "drain": 0, "max_wait": 0}
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {least}")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"--temperature {self.temperature}: from 0 to 2")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: above 0, up to 1")
        for port in (self.port, self.metrics_port):
            if not 0 < port < 65536:
                raise ConfigError(f"port {port}: choose one between 1 and 65535")
        if self.port == self.metrics_port:
            raise ConfigError(f"--operator-port {self.port}: that is the port of the API, choose another")
        if self.open and self.host not in LOOPBACK:
            raise ConfigError(f"--open would let everybody use {self.host}: leave it out, or listen on 127.0.0.1")
        self._check_upstreams()

    def _check_upstreams(self) -> None:
        """Either a model or upstreams, and of a model's flags none that an upstream would not hear of."""
        if self.model and self.upstream:
            raise ConfigError("name a model, or other servers by --upstream http://host:8000: one of both")
        if self.affinity and not self.upstream:
            raise ConfigError("--affinity is for several --upstream: leave it out")
        own = [field for field in fields(self) if field.name in ServeConfig.__annotations__]
        changed = [each.name for each in own if getattr(self, each.name) != each.default] if self.upstream else []
        if changed:
            raise ConfigError(f"--{changed[0].replace('_', '-')} is for a model of ours: an upstream decides by itself")
        for url in self.upstream:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ConfigError(f"--upstream {parts.hostname or url}: an address such as http://host:8000")
            if parts.username or parts.password:
                raise ConfigError(
                    f"--upstream {parts.hostname}: put its key into SPUTNIK_UPSTREAM_KEY, not the address"
                )

    @property
    def checkpoint(self) -> str:
        """The model that is served here; upstreams have their own."""
        return "" if self.upstream else self.model or EMBEDDED

    @property
    def metrics_port(self) -> int:
        return self.port + 1 if self.operator_port is None else self.operator_port

    @property
    def served_name(self) -> str:
        """`runs/quickstart/zero/checkpoint` is served as quickstart-zero; upstreams name their own."""
        if self.name is not None or self.upstream:
            return self.name or ""
        parts = [part for part in Path(self.checkpoint).parts if part not in ("/", "..", ".", "checkpoint")]
        if "runs" in parts[:-1]:
            parts = ["-".join(parts[parts.index("runs") + 1 :])]
        return parts[-1].removesuffix(".gguf") if parts else "model"

    def worker(self, path: Path) -> WorkerSettings:
        return WorkerSettings(
            self.checkpoint, str(path), name=self.served_name, template=self.template, device=self.device,
            precision=self.precision, weights=self.weights, exact=self.exact, slots=self.slots,
            cache_bytes=int(self.cache_gib * 2**30), drain=self.drain,
        )  # fmt: skip

    def gateway(
        self, path: Path, keys: list[str] | None, upstream_keys: list[str] | None = None,
        books: BookSettings | None = None,
    ) -> GatewaySettings:  # fmt: skip
        return GatewaySettings(
            str(path), self.host, self.port, self.metrics_port, self.served_name, keys, temperature=self.temperature,
            top_p=self.top_p, max_tokens=self.max_tokens, queue=self.queue, max_wait=self.max_wait,
            per_key=self.per_key, drain=self.drain, upstreams=self._upstreams(upstream_keys or []),
            log=None if self.log is None else str(self.log.absolute()), log_level=self.log_level,
            books=books,
        )  # fmt: skip

    def _upstreams(self, keys: list[str]) -> UpstreamSettings | None:
        if not self.upstream:
            return None
        if len(keys) not in (0, 1, len(self.upstream)):
            raise ConfigError(
                f"SPUTNIK_UPSTREAM_KEY: {len(keys)} keys for {len(self.upstream)} upstreams: one, or each"
            )
        urls = [url.rstrip("/") for url in self.upstream]
        return UpstreamSettings(urls, keys, self.name, self.affinity, self.slots)


def main(config: ServeConfig) -> int:
    for package in (*PACKAGES, "httpx2") if config.upstream else PACKAGES:
        if find_spec(package) is None:
            raise MissingPackage(package.replace("_", "-"), extra="serve")
    _check_watchers(config.log)
    check_free(config.host, config.port)
    check_free("127.0.0.1", config.metrics_port)
    given = [key.strip() for key in os.environ.pop("SPUTNIK_API_KEY", "").split(",") if key.strip()]
    keys = given or [new_key()]
    books = None if config.database == "none" else _books(config)
    set_title("sputnik serve")
    directory = Path(tempfile.mkdtemp(prefix="sputnik-"))  # of mode 0700
    try:
        path = directory / "worker.sock"
        hashes = None if config.open else [key_hash(key) for key in keys]
        gateway = Child("gateway", config.gateway(path, hashes, _upstream_keys(), books), _say, GATEWAY)
        workers = [] if config.upstream else [Child("worker", config.worker(path), _say, WORKER)]
        shown = None if config.open else "that of SPUTNIK_API_KEY" if given else keys[0]
        _say(f"loading {config.checkpoint}" if config.checkpoint else f"waiting for {' or '.join(config.upstream)}")
        return Supervisor([*workers, gateway], _say, lambda: _welcome(config, shown), config.drain).run()
    finally:
        shutil.rmtree(directory)


def _books(config: ServeConfig) -> BookSettings:
    """The database made or brought up to date, and all that could be wrong with it found before anything starts."""
    from sputnik.serve.books.access import open_keys
    from sputnik.serve.books.prices import load_prices

    load_prices(config.prices)
    database, pepper = open_keys(config.database, os.environ)
    database.close()
    return BookSettings(config.database, pepper, None if config.prices is None else str(config.prices))


def _upstream_keys() -> list[str]:
    """Out of the environment, so that no child has them there."""
    given, file = os.environ.pop("SPUTNIK_UPSTREAM_KEY", ""), os.environ.pop("SPUTNIK_UPSTREAM_KEY_FILE", "")
    if file:
        try:
            given = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"SPUTNIK_UPSTREAM_KEY_FILE: {file} cannot be read: {error}") from None
    return [key.strip() for key in given.split(",") if key.strip()]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _welcome(config: ServeConfig, key: str | None) -> None:
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    at = f"http://{host}:{config.port}"
    bearer = key if key is not None and key.startswith("sk-") else "$SPUTNIK_API_KEY"
    header = "" if key is None else f' -H "Authorization: Bearer {bearer}"'
    question = (
        f'{{"model": "{config.served_name or "MODEL"}", "messages": [{{"role": "user", "content": "What is 7+5-3?"}}]}}'
    )
    lines = [
        f"serving {config.served_name or ', '.join(config.upstream)} at {at}/v1",
        f"  key      {key or 'none is asked for'}",
        f"  metrics  http://127.0.0.1:{config.metrics_port}/metrics",
        f"  try      curl {at}/v1/chat/completions{header} -H 'Content-Type: application/json' -d '{question}'",
        "  stop     Ctrl-C",
    ]
    print("\n".join(lines), flush=True)


def _check_watchers(log: Path | None) -> None:
    """That the gateway will be able to write its log and its traces."""
    from sputnik.serve.tracing import asked_for

    if asked_for(os.environ) and (find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None):
        raise MissingPackage("opentelemetry-sdk", extra="otel")
    try:
        if log is not None:
            log.open("a").close()
    except OSError as error:
        raise ConfigError(f"--log {log}: {error.strerror or error}") from None
