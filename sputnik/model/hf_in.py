"""Hugging Face checkpoints in: config.json plus model.safetensors, or shards with an index.

    weights = open_hf(directory)

FP8 files in DeepSeek's form (E4M3 values, one scale for each 128 x 128 block) are dequantised as they are read.
Left out: other quantised files (refused by name) and pickled weights (never opened).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sputnik.errors import CheckpointError, SputnikError
from sputnik.files import sibling
from sputnik.model import hf_names
from sputnik.model.config import ModelConfig
from sputnik.model.fp8 import BLOCK, dequantise, scales_shape
from sputnik.model.hf_names import Piece, Shape
from sputnik.model.weights import Stored, Weights, assemble

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALE = "_scale_inv"
READABLE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8, SCALES = "F8_E4M3", ("F32", "BF16", "F8_E8M0")
CHUNK_ROWS = 1024  # of an FP8 tensor at once, so that its fp32 copy stays small


def _open(path: Path, framework: str) -> Any:
    """Map a file: "np" to read its header, "pt" to read its tensors, which reserves memory for the whole file."""
    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {_what_is_at(path.parent)}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt ({error}); download or save it again") from None
    except RuntimeError as error:
        raise CheckpointError(f"{path}: cannot be mapped ({error}); save it in shards of a few gigabytes") from None


class _Files:
    """The mapped file read last; models are read roughly file by file."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._handle: Any = None

    def tensor(self, path: Path, name: str) -> Tensor:
        if path != self._path:
            self._handle, self._path = None, None  # let go of one before the next is mapped
            self._handle, self._path = _open(path, "pt"), path
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class PlainTensor:
    files: _Files
    file: Path
    name: str
    shape: Shape
    dtype: torch.dtype
    quantised: bool = False

    def copy_into(self, place: Tensor) -> None:
        place.copy_(self.files.tensor(self.file, self.name))


@dataclass(frozen=True)
class Fp8Tensor:
    files: _Files
    file: Path
    name: str
    shape: Shape
    scale_file: Path
    block: tuple[int, int]
    dtype: torch.dtype = torch.float32
    quantised: bool = True

    def copy_into(self, place: Tensor) -> None:
        scales = self.files.tensor(self.scale_file, self.name + SCALE).float()
        values = self.files.tensor(self.file, self.name)
        step = max(1, CHUNK_ROWS // self.block[0])  # rows of blocks
        for top in range(0, len(scales), step):
            rows = slice(top * self.block[0], (top + step) * self.block[0])
            place[rows].copy_(dequantise(values[rows], scales[top : top + step], self.block))


def open_hf(root: Path) -> Weights:
    """The weights of a checkpoint directory, known by their headers; nothing is read yet.

    transformers announces MTP in config.json and writes no MTP tensor; such files give a model without MTP.
    """
    data = _read_json(root / CONFIG)
    block = _fp8_block(root, data)
    stored = _inventory(root, block)
    config = _without_absent_mtp(_config(root, data | _ends(root, data)), stored)

    def pieces_of(key: str, shape: Shape) -> list[Piece]:
        return hf_names.pieces(key, shape, config.num_hidden_layers, fused=key in stored)

    copies = hf_names.shared_copies(
        config.num_hidden_layers, config.num_nextn_predict_layers, config.tie_word_embeddings
    )
    return assemble(str(root), config, stored, pieces_of, copies, CONFIG, f"use the {CONFIG} saved with them")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; {_what_is_at(file.parent)}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download or save the checkpoint again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds no JSON object; download or save the checkpoint again")
    return value


def _what_is_at(root: Path) -> str:
    """What to do about a directory that is not a checkpoint."""
    interrupted = sibling(root, "replaced")
    if not root.exists() and interrupted.is_dir():
        return f"an interrupted save left the previous checkpoint in {interrupted}, rename it back"
    if not root.is_dir():
        return "give the directory of a checkpoint or a .gguf file"
    if any(root.glob("*.bin")) or any(root.glob("*.pth")):
        return "only safetensors and GGUF files are read, convert pickled weights with transformers' save_pretrained"
    return f"a checkpoint directory holds {CONFIG} and {WEIGHTS} (or shards with {INDEX})"


def _fp8_block(root: Path, data: dict[str, Any]) -> tuple[int, int] | None:
    """Size of the blocks that share a scale, None when the file says nothing of quantisation."""
    quantised = data.get("quantization_config")
    if not quantised:
        return None
    method, size = quantised, None
    if isinstance(quantised, dict):
        method, size = quantised.get("quant_method"), quantised.get("weight_block_size")
    match method, size:
        case "fp8", [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case _:
            raise CheckpointError(
                f"{root}: weights are quantised ({method}); of such files only FP8 with a weight_block_size "
                f"such as {list(BLOCK)} is read: convert them to bfloat16 first"
            )


def _config(root: Path, data: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_hf(data)
    except SputnikError as error:
        raise CheckpointError(f"{root / CONFIG}: {str(error).removeprefix('config.json: ')}") from None
    except KeyError as error:
        raise CheckpointError(
            f"{root / CONFIG}: {error.args[0]} is missing; use the file saved with the weights"
        ) from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{root / CONFIG}: damaged ({error}); use the file saved with the weights") from None


def _ends(root: Path, data: dict[str, Any]) -> dict[str, Any]:
    """All end tokens: chat models name some of theirs in generation_config.json alone."""
    further = _read_json(root / GENERATION) if (root / GENERATION).exists() else {}
    listed = [each.get("eos_token_id") for each in (data, further)]
    ends = [id for ids in listed for id in (ids if isinstance(ids, list) else [ids]) if id is not None]
    ends = [id for place, id in enumerate(ends) if id not in ends[:place]]
    return {"eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None}


@dataclass(frozen=True)
class _Listed:
    file: Path
    shape: Shape
    kind: str


def _inventory(root: Path, block: tuple[int, int] | None) -> dict[str, Stored]:
    """Every tensor by name, from the headers alone; scales are part of their weight."""
    files = _Files()
    listed: dict[str, _Listed] = {}
    for file in _weight_files(root):
        handle = _open(file, "np")
        for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
            view = handle.get_slice(name)
            if name in listed:
                raise CheckpointError(f"{file}: {name} is in {listed[name].file.name} too; delete one of them")
            listed[name] = _Listed(file, tuple(view.get_shape()), view.get_dtype())
    stored: dict[str, Stored] = {}
    for name, found in listed.items():
        if block is not None and found.kind == FP8:
            stored[name] = _fp8_tensor(files, name, listed, block)
        elif block is not None and _is_scale_of_fp8(name, listed):
            continue
        elif found.kind in READABLE:
            stored[name] = PlainTensor(files, found.file, name, found.shape, READABLE[found.kind])
        else:
            raise CheckpointError(f"{found.file}: {name} is {found.kind}; convert it to bfloat16 first")
    return stored


def _weight_files(root: Path) -> list[Path]:
    if (root / WEIGHTS).exists() or not (root / INDEX).exists():
        return [root / WEIGHTS]
    weight_map = _read_json(root / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{root / INDEX}: has no weight_map; download or save the checkpoint again")
    return [root / name for name in sorted(set(weight_map.values()))]


def _is_scale_of_fp8(name: str, listed: Mapping[str, _Listed]) -> bool:
    weight = listed.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
    return weight is not None and weight.kind == FP8


def _fp8_tensor(files: _Files, name: str, listed: Mapping[str, _Listed], block: tuple[int, int]) -> Fp8Tensor:
    weight, scale = listed[name], listed.get(name + SCALE)
    if scale is None:
        raise CheckpointError(f"{weight.file}: {name} is {FP8} and has no {name + SCALE}; download the file again")
    expected = scales_shape(weight.shape, block) if len(weight.shape) == 2 else None
    if scale.shape != expected or scale.kind not in SCALES:
        raise CheckpointError(
            f"{scale.file}: {name + SCALE} is {scale.kind} {list(scale.shape)}, which does not fit the weight's "
            f"{list(weight.shape)} in blocks of {list(block)}; use the {CONFIG} saved with it"
        )
    return Fp8Tensor(files, weight.file, name, weight.shape, scale.file, block)


def _without_absent_mtp(config: ModelConfig, stored: Mapping[str, Stored]) -> ModelConfig:
    depths = range(config.num_nextn_predict_layers)
    prefixes = tuple(hf_names.mtp_prefix(config.num_hidden_layers, depth) for depth in depths)
    if prefixes and not any(name.startswith(prefixes) for name in stored):
        return dataclasses.replace(config, num_nextn_predict_layers=0)
    return config
