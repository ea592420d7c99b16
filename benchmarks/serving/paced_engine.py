"""An engine of fixed speed behind the real worker: what is measured over it is the service, not the model.

    python -m benchmarks.serving.paced_engine 20 < settings.json          a worker that takes 20 steps a second

Scheduler, blocks of the cache, desk, wire and all that stands before them are the real ones; only the network is
replaced: each step takes 1 / `steps` seconds, more where it reads prompts, and the token of a sample is a function of
its seed and place (`paced.answer`). 0 steps a second: as fast as it goes. Left out: logprobs, grammars, thoughts.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from benchmarks.serving.paced import LETTERS, letter
from sputnik.engine.engine import Engine
from sputnik.engine.flat import FlatBatch
from sputnik.engine.llm import LLM
from sputnik.engine.sample import Event, Sample
from sputnik.engine.sampling import Drawn
from sputnik.model.checkpoint import save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.serve import wire, worker
from sputnik.serve.settings import WorkerSettings
from sputnik.text.tokenizer import Tokenizer

CONTEXT = 8192
PROMPT_TOKEN = 0.004
"""What a token of a prompt adds to its step, in steps."""


class PacedEngine(Engine):
    """A step takes 1 / `steps` seconds; one that needs longer by itself takes what it needs."""

    def __init__(self, llm: LLM, steps: float) -> None:
        super().__init__(llm.engine.model, llm.engine.eos_ids, llm.engine.config)
        self.runner, self.speculation = _Silent(), None  # type: ignore[assignment]
        self._letters = [llm.tok.encode(chr(byte))[0] for byte in range(128)]
        self._pause = 1 / steps if steps else 0.0

    def step(self, most: int = 1) -> list[Event]:
        begun, before = time.monotonic(), self.metrics.computed_tokens
        events = super().step()  # one token each: a pause stands for a step
        prompts = self.metrics.computed_tokens - before - len(events)
        time.sleep(max(0.0, begun + self._pause * (1 + PROMPT_TOKEN * prompts) - time.monotonic()))
        return events

    def _draw(self, rows: list[Sample], hidden: Tensor) -> Drawn:
        tokens = [self._letters[letter(each.seed, len(each.written))] for each in rows]
        return Drawn(torch.tensor(tokens), None, torch.ones(len(rows), dtype=torch.bool))


class _Silent:
    """A network that says nothing."""

    def forward(self, batch: FlatBatch) -> Tensor:
        return torch.zeros(len(batch.wanted), 1)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        pass

    def routes(self) -> None:
        return None


def make_model(folder: Path) -> Path:
    """A small checkpoint; only its tokenizer and its sizes are used."""
    tok = Tokenizer.train(["".join(map(chr, LETTERS))], vocab_size=400)
    config = ModelConfig.preset(
        "tiny", vocab_size=tok.vocab_size, eos_token_id=tok.eos_id, max_position_embeddings=CONTEXT
    )
    save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), folder, tokenizer=tok)
    return folder


def paced_load(steps: float) -> worker.Loader:
    def load(settings: WorkerSettings) -> tuple[LLM, wire.Hello]:
        llm, hello = worker.load(settings)
        llm.engine = PacedEngine(llm, steps)
        return llm, hello

    return load


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerSettings)
    sys.exit(worker.main(settings, paced_load(float(sys.argv[1]))))
