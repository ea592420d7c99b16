"""Hugging Face checkpoints out, in the layout of DeepSeek's own releases, MTP included.

    write_hf(weights, directory, dtype)      # dtype torch.float8_e4m3fn: FP8 blocks and scales, the rest bfloat16

All or nothing: the files go to a hidden sibling that takes the place of the directory when they are safely on disk.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sputnik.errors import CheckpointError
from sputnik.files import replace_directory
from sputnik.model import hf_names
from sputnik.model.fp8 import BLOCK, quantise, scales_shape
from sputnik.model.hf_in import CONFIG, GENERATION, INDEX, SCALE, WEIGHTS
from sputnik.model.hf_names import EMBEDDING, HEAD, Piece
from sputnik.model.weights import Weights, dtype_name, stored_type

FP8 = torch.float8_e4m3fn
# Not embedding, head, norms, gate and eh_proj, as in the published files.
FP8_NAMES = re.compile(
    r".*\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj)\.weight"
)
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [*BLOCK]}

Progress = Callable[[int, int], None]  # bytes written, bytes in all


class Saveable(Protocol):
    """A tokenizer, as far as a checkpoint is concerned."""

    def save(self, directory: Path) -> None: ...


@dataclass(frozen=True)
class _Entry:
    """One tensor to be written."""

    piece: Piece
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        numel = torch.Size(self.piece.shape).numel()
        scales = 4 * torch.Size(scales_shape(self.piece.shape)).numel() if self.dtype == FP8 else 0
        return numel * self.dtype.itemsize + scales


def write_hf(
    weights: Weights,
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    max_shard_bytes: float = 5e9,
    tokenizer: Saveable | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the directory `path`, cast to `dtype` (None keeps each tensor's own; routing biases stay fp32).

    Other files of an existing `path` (a tokenizer, a README) are kept.
    """
    entries = list(_entries(weights, dtype))
    try:
        with replace_directory(path) as directory:
            _require_checkpoint(path)
            _write_configs(weights, directory, dtype)
            _write_shards(weights, entries, directory, max_shard_bytes, progress)
            if tokenizer is not None:
                tokenizer.save(directory)
            _keep_other_files(path, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: could not be written, nothing there was changed: {error}") from error


def _entries(weights: Weights, dtype: torch.dtype | None) -> Iterator[_Entry]:
    """Every tensor in state dict order, the copies of shared ones last; nothing is read."""
    config = weights.config
    layers, depths = config.num_hidden_layers, config.num_nextn_predict_layers
    for key, tensor in weights.like.items():
        for piece in hf_names.pieces(key, tuple(tensor.shape), layers):
            yield _Entry(piece, _type_on_disk(piece.name, key, tensor, dtype))
    for name, key in hf_names.shared_copies(layers, depths, config.tie_word_embeddings).items():
        if name != HEAD:  # a tied head is not written: every reader takes the embedding
            tensor = weights.like[key]
            yield _Entry(Piece(name, key, (), tuple(tensor.shape)), _type_on_disk(name, key, tensor, dtype))


def _type_on_disk(name: str, key: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype == FP8:
        dtype = FP8 if FP8_NAMES.fullmatch(name) else torch.bfloat16
    return stored_type(key, tensor.dtype if dtype is None else dtype)


def _write_configs(weights: Weights, directory: Path, dtype: torch.dtype | None) -> None:
    config = weights.config.to_hf()
    config["torch_dtype"] = dtype_name(dtype or weights.like[EMBEDDING].dtype)
    if dtype == FP8:
        config |= {"torch_dtype": "bfloat16", "quantization_config": FP8_CONFIG}
    _write_json(directory / CONFIG, config)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(directory / GENERATION, {key: config[key] for key in ids if config.get(key) is not None})


def _write_shards(
    weights: Weights, entries: list[_Entry], directory: Path, max_shard_bytes: float, progress: Progress | None
) -> None:
    weight_map: dict[str, str] = {}
    total, done = sum(entry.nbytes for entry in entries), 0
    shards = _pack(entries, max_shard_bytes)
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = _read_shard(weights, shard)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        shutil.copymode(directory / CONFIG, directory / file)  # safetensors writes 0600, unreadable to a server's user
        weight_map |= dict.fromkeys(tensors, file)
        done += sum(entry.nbytes for entry in shard)
        if progress is not None:
            progress(done, total)
    if len(shards) > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _pack(entries: list[_Entry], max_shard_bytes: float) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _read_shard(weights: Weights, shard: list[_Entry]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    held: tuple[str, Tensor] | None = None  # experts share a key: it is read once for all of them
    for entry in shard:
        name, key = entry.piece.name, entry.piece.key
        if held is None or held[0] != key:
            held = (key, weights.read(key, weights.like[key].dtype))
        tensor = entry.piece.place(held[1])
        if entry.dtype == FP8:
            tensors[name], tensors[name + SCALE] = quantise(tensor)
        else:
            tensors[name] = tensor.to(entry.dtype).contiguous()
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()  # safetensors writes no two names for one memory
        seen.add(tensor.data_ptr())
    return tensors


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _require_checkpoint(path: Path) -> None:
    if path.exists() and any(entry.is_dir() for entry in path.iterdir()):
        raise CheckpointError(f"{path}: holds more than a checkpoint; save to a new directory")


def _keep_other_files(old: Path, new: Path) -> None:
    for file in old.iterdir() if old.exists() else ():
        weights = file.name in (WEIGHTS, INDEX) or file.match("model-*-of-*.safetensors")
        if weights or (new / file.name).exists():
            continue
        try:
            os.link(file, new / file.name)  # a link, so that a file being written to stays the same file
        except OSError:  # a file system without links
            shutil.copy2(file, new / file.name)
