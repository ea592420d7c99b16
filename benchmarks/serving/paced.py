"""A whole server over an engine of fixed speed (`paced_engine.py`): supervisor, gateway and wire are the real ones.

    python -m benchmarks.serving.paced MODEL --port 8000 --steps 20 --slots 64          keys: SPUTNIK_API_KEY
    text = answer(seed, tokens)                                                         what a request is told

For tests and benchmarks of the service; MODEL is what `paced_engine.make_model` made.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from sputnik.serve.identity import key_hash
from sputnik.serve.settings import GatewaySettings, WorkerSettings
from sputnik.serve.supervisor import Child, Supervisor
from sputnik.serve.watch import GATEWAY, WORKER

LETTERS = b"abcdefghijklmnopqrstuvwxyz "


def letter(seed: int, place: int) -> int:
    """The byte that a sample of this seed says at a place."""
    mixed = ((seed & 0xFFFFFFFF) ^ (place * 0x9E3779B1)) * 0x85EBCA6B & 0xFFFFFFFF
    return LETTERS[(mixed >> 13) % len(LETTERS)]


def answer(seed: int, tokens: int) -> str:
    """All that the first sample of a request is told."""
    return bytes(letter(seed, place) for place in range(tokens)).decode()


def serve(args: argparse.Namespace) -> int:
    directory = Path(tempfile.mkdtemp(prefix="paced-"))
    keys = [key_hash(each) for each in os.environ["SPUTNIK_API_KEY"].split(",")]
    path = str(directory / "worker.sock")
    engine = WorkerSettings(
        str(args.model), path, name="paced", precision="fp32", slots=args.slots, drain=args.drain, template="chat",
        cache_bytes=int(args.cache_gib * 2**30),
    )  # fmt: skip
    front = GatewaySettings(
        path, "127.0.0.1", args.port, args.operator_port or args.port + 1, "paced", keys, queue=args.queue,
        max_wait=args.max_wait, per_key=args.per_key, drain=args.drain,
    )  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.serving.paced_engine", str(args.steps)]

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    children = [Child("worker", engine, say, WORKER, command), Child("gateway", front, say, GATEWAY)]
    try:
        return Supervisor(children, say, lambda: say("serving"), args.drain).run()
    finally:
        shutil.rmtree(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--operator-port", type=int)
    parser.add_argument("--steps", type=float, default=20.0)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--queue", type=int, default=256)
    parser.add_argument("--max-wait", type=float, default=120.0)
    parser.add_argument("--per-key", type=int, default=1024)
    parser.add_argument("--drain", type=float, default=30.0)
    parser.add_argument("--cache-gib", type=float, default=0.05)
    args = parser.parse_args()
    return serve(args)


if __name__ == "__main__":
    sys.exit(main())
