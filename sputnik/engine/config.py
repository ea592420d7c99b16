"""The engine's settings, the size of its cache, and the block tables of the sequences that run."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sputnik.engine.sequence import Work
from sputnik.errors import ConfigError
from sputnik.model.config import ModelConfig
from sputnik.model.memory import available_memory


@dataclass(frozen=True)
class EngineConfig:
    cache_tokens: int | None = None
    """Tokens the cache holds, over all requests; None: what `cache_bytes` hold, no more than can be used."""
    cache_bytes: int = 1 << 30
    """At most these, and no more than are free."""
    block_size: int = 16
    max_running: int = 256
    chunk: int = 512
    """Prompt tokens computed in a step that also decodes."""
    precision: str = "auto"
    """fp32 or bf16: of the cache, and of the weights unless `weights` says otherwise. auto: the faster one here."""
    weights: str | None = None
    """int8 or int4: weight-only quantisation; fp8 on a GPU."""
    exact: bool = False
    """The reproducible mode: a request's tokens do not depend on what else runs, nor on cache hits. Slower prefill."""
    guesses: int = 0
    """Tokens that the prediction modules guess ahead; 0, or a model without modules: no speculative decoding."""
    adaptive: bool = True
    """Guess only where it is measured to pay."""
    record_routes: bool = False
    """Keep the experts of every token with its sample, for training to replay; prefixes are not reused then."""
    seed: int = 0
    """Of the requests that bring no seed of their own."""

    def __post_init__(self) -> None:
        for name, least in (("cache_bytes", 1), ("block_size", 1), ("max_running", 1), ("chunk", 1), ("guesses", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: at least {least}")


@dataclass
class Tables:
    """Block tables of the running sequences as one array, touched only where a sequence has a new block."""

    array: np.ndarray = field(default_factory=lambda: np.zeros((64, 8), dtype=np.int32))
    lines: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Sequence id -> (line, blocks written)."""

    def of(self, works: Sequence[Work]) -> Tensor:
        """(S, most blocks) int32, a line per work."""
        widest = max(len(work.sequence.blocks) for work in works)
        fresh = sum(work.sequence.id not in self.lines for work in works)
        if len(self.lines) + fresh > len(self.array) or widest > self.array.shape[1]:
            self._grow(works, widest)
        order = []
        for work in works:
            sequence = work.sequence
            line, written = self.lines.get(sequence.id) or (len(self.lines), 0)
            if written != len(sequence.blocks) or not sequence.decoding:  # a prefill may swap blocks for shared ones
                self.array[line, : len(sequence.blocks)] = sequence.blocks
                self.lines[sequence.id] = (line, len(sequence.blocks))
            order.append(line)
        return torch.from_numpy(self.array[order, :widest])

    def _grow(self, works: Sequence[Work], widest: int) -> None:
        """Start anew, with room to spare: those who left have left lines behind."""
        self.lines = {}
        shape = max(64, 4 * len(works)), max(self.array.shape[1], 2 * widest)
        self.array = np.zeros(shape, dtype=np.int32)


def cache_blocks(shape: ModelConfig, config: EngineConfig, precision: str, device: str = "cpu") -> int:
    """How many blocks the cache has. A ConfigError if this machine has no memory for them; GPUs are not asked."""
    layers = shape.num_hidden_layers + shape.num_nextn_predict_layers
    block = config.block_size * layers * shape.cache_width * (2 if precision == "bf16" else 4)
    free = available_memory() if device == "cpu" else None
    if config.cache_tokens is None:
        usable = config.max_running * -(-shape.max_position_embeddings // config.block_size)
        room = config.cache_bytes if free is None else min(config.cache_bytes, free)
        if room < block:
            raise ConfigError(f"a cache of {room} bytes: one block of {config.block_size} tokens takes {block}")
        return min(room // block, usable)
    if config.cache_tokens < config.block_size:
        raise ConfigError(f"cache_tokens = {config.cache_tokens}: at least one block of {config.block_size}")
    blocks = -(-config.cache_tokens // config.block_size)
    if free is not None and blocks * block > free:
        raise ConfigError(
            f"a cache of {blocks * config.block_size} tokens takes {blocks * block / 1e9:.2f} GB, {free / 1e9:.2f} GB "
            "of memory are free: lower cache_tokens"
        )
    return blocks
