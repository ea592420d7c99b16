"""Checkpoints: `load_model(path)` and `save_model(model, directory)`.

A path is a Hugging Face directory (DeepSeek, Llama and Qwen2 models in safetensors, FP8 included; see `hf_in.py`), a
GGUF file or a directory with one (`gguf_in.py`), or a model's name (`text/named_models.py`). A wrong or damaged file is
one `CheckpointError` before the first weight is read and never a half-filled model; so is a model larger than memory.
GGUF files are written by `gguf_out.py`. Left out: resume state, which belongs to training.
"""

from pathlib import Path

import torch

from sputnik.errors import CheckpointError
from sputnik.model.config import ModelConfig
from sputnik.model.gguf_in import open_gguf
from sputnik.model.hf_in import CONFIG, open_hf
from sputnik.model.hf_out import Saveable, write_hf
from sputnik.model.transformer import Transformer
from sputnik.model.weights import Weights, build, weights_of
from sputnik.text.gguf_header import gguf_file
from sputnik.text.named_models import find_model

__all__ = ["Saveable", "check_tokenizer", "load_model", "open_weights", "save_model"]


def load_model(path: str | Path, dtype: torch.dtype | None = torch.float32) -> Transformer:
    """The model at `path` in eval mode on the CPU, cast to `dtype` (None: as stored; routing biases stay fp32).

    The module is built without memory, then filled from memory-mapped files: the peak is one copy of the weights, and a
    CheckpointError with both numbers when that does not fit.
    """
    return build(open_weights(path), dtype)


def open_weights(path: str | Path) -> Weights:
    """The weights at `path`, known by their headers; nothing is read yet."""
    path = find_model(path)
    packed = None if (path / CONFIG).exists() else gguf_file(path)
    return open_hf(path) if packed is None else open_gguf(packed)


def save_model(
    model: Transformer,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    tokenizer: Saveable | None = None,
) -> None:
    """Write the checkpoint directory `path`, cast to `dtype` (None keeps each tensor's own; routing biases stay fp32).

    All or nothing: the files go to a hidden sibling directory that takes the place of `path` when they are safely on
    disk. Other files of an existing `path` (a tokenizer, a README) are kept.
    """
    write_hf(weights_of(model), Path(path), dtype, max_shard_bytes=max_shard_bytes, tokenizer=tokenizer)


def check_tokenizer(config: ModelConfig, vocab_size: int, where: object) -> None:
    """Raise when a tokenizer of `vocab_size` ids belongs to another model: some of its ids have no embedding."""
    if vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {vocab_size} ids and the model {config.vocab_size} rows of embedding: use the "
            "tokenizer saved with the model"
        )
