"""`sputnik convert MODEL OUT`: a model in another format, tensor by tensor, tokenizer and chat template included.

sputnik convert runs/quickstart quickstart.gguf --dtype q8_0      for llama.cpp
sputnik convert smollm2 smollm2-hf                                for transformers, vLLM and SGLang
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from tyro.conf import Positional, arg

from sputnik.cli.console import Console
from sputnik.errors import CheckpointError, ConfigError
from sputnik.model.checkpoint import check_tokenizer, open_weights
from sputnik.model.gguf_out import write_gguf
from sputnik.model.hf_in import CONFIG
from sputnik.model.hf_names import EMBEDDING
from sputnik.model.hf_out import Progress as Report
from sputnik.model.hf_out import write_hf
from sputnik.model.weights import Weights
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.text.gguf_header import MAGIC, gguf_file, read_header
from sputnik.text.tokenizer import Tokenizer

Format = Literal["hf", "gguf"]
DType = Literal["auto", "float32", "bfloat16", "float16", "fp8", "q8_0"]
HF_TYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": torch.float8_e4m3fn,
}  # fmt: skip
GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}


@dataclass(frozen=True)
class ConvertConfig:
    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A checkpoint directory, a GGUF file, a run, a run's name, or smollm2."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """A directory, or a file that ends in .gguf."""
    to: Format | None = None
    """hf or gguf; default: what the name of OUT says."""
    dtype: DType = "auto"
    """auto keeps the type of the weights, and takes bfloat16 for quantised ones; fp8 is for hf, q8_0 for gguf."""


def main(config: ConvertConfig) -> None:
    target = _format(config)
    found = find_checkpoint(config.model).path
    _require_replaceable(config.out, target)
    if _same_place(found, config.out):
        raise ConfigError(f"{config.out}: is the model itself; give another name")
    weights = open_weights(found)
    dtype = config.dtype if config.dtype != "auto" else _dtype_of(weights)
    tokenizer = load_tokenizer(found)
    console = Console()
    if tokenizer is None:
        console.print(f"note: {found} has no tokenizer, so {config.out} gets none", style="yellow", soft_wrap=True)
    else:
        check_tokenizer(weights.config, tokenizer.vocab_size, found)
    with _bar(console) as report:
        if target == "gguf":
            name = found.stem if found.is_file() else found.resolve().name
            write_gguf(weights, config.out, GGUF_TYPES[dtype], tokenizer=tokenizer, name=name, progress=report)
        else:
            write_hf(weights, config.out, HF_TYPES[dtype], tokenizer=tokenizer, progress=report)
    written = sum(file.stat().st_size for file in ([config.out] if target == "gguf" else config.out.iterdir()))
    console.print(f"{config.out}: {dtype}, {written / 1e6:,.1f} MB", highlight=False, soft_wrap=True)


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None when it has none."""
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return Tokenizer.load(path)
    packed = gguf_file(path)
    if packed is None or read_header(packed).metadata.get("tokenizer.ggml.model") in (None, "none"):
        return None
    return Tokenizer.load(packed)


def _format(config: ConvertConfig) -> Format:
    named: Format = "gguf" if config.out.suffix == ".gguf" else "hf"
    target = config.to or named
    if target != named:
        fix = "name a file that ends in .gguf" if target == "gguf" else "name a directory"
        raise ConfigError(f"{config.out}: not the name of a {target} model; {fix}")
    known = GGUF_TYPES if target == "gguf" else HF_TYPES
    if config.dtype not in ("auto", *known):
        raise ConfigError(f"--dtype {config.dtype}: {target} models are written as {', '.join(known)}")
    return target


def _dtype_of(weights: Weights) -> str:
    dtype = torch.bfloat16 if weights.quantised else weights.like[EMBEDDING].dtype
    return next((name for name, known in HF_TYPES.items() if known == dtype), "float32")


def _require_replaceable(out: Path, target: Format) -> None:
    """Only a model of the same format is overwritten."""
    if target == "gguf" and out.exists():
        if not out.is_file():
            raise CheckpointError(f"{out}: not a file; choose another name")
        with out.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{out}: exists and is no GGUF file; choose another name")
    if target == "hf" and out.exists():
        if not out.is_dir():
            raise CheckpointError(f"{out}: not a directory; choose another name")
        if any(out.iterdir()) and not (out / CONFIG).is_file():
            raise CheckpointError(f"{out}: exists and is no checkpoint; choose another name")


def _same_place(found: Path, out: Path) -> bool:
    return out.resolve() in (found.resolve(), found.resolve().parent if found.is_file() else None)


@contextmanager
def _bar(console: Console) -> Iterator[Report]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
