"""The forecast is what a model takes, and a model that does not fit is refused before a byte of it is read."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sputnik.errors import CheckpointError
from sputnik.model.checkpoint import load_model, open_weights, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.memory import available_memory, require_memory
from sputnik.model.transformer import Transformer
from sputnik.model.weights import unique_state, without_memory

Build = Callable[..., Transformer]
GB = 10**9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_the_forecast_is_exact(build: Build, tmp_path: Path, dtype: torch.dtype | None) -> None:
    for family in ("deepseek", "dense"):
        save_model(build(family, tie_word_embeddings=family == "dense"), tmp_path / family, dtype=torch.float16)
        tensors = {t.data_ptr(): t.nbytes for t in load_model(tmp_path / family, dtype).state_dict().values()}
        assert open_weights(tmp_path / family).nbytes(dtype) == sum(tensors.values())


def sparse_llama(root: Path, vocab_size: int) -> None:
    """A checkpoint with a true header and weights that are a hole in the disk."""
    config = ModelConfig(
        model_type="llama", vocab_size=vocab_size, hidden_size=4096, num_hidden_layers=1, head_dim=128,
        num_attention_heads=32, num_key_value_heads=8, intermediate_size=4096, tie_word_embeddings=True,
    )  # fmt: skip
    (root / "config.json").write_text(json.dumps(config.to_hf()))
    header, end = {}, 0
    for name, tensor in unique_state(without_memory(config)).items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (root / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_a_model_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    free = available_memory()
    assert free is not None
    sparse_llama(tmp_path, vocab_size=2 * free // (2 * 4096))
    assert (tmp_path / "model.safetensors").stat().st_size > free
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        needed = open_weights(tmp_path).nbytes(dtype)
        with pytest.raises(CheckpointError) as caught:
            load_model(tmp_path, dtype)
        message = str(caught.value)
        assert f"take {needed / 1e9:.2f} GB as {name}" in message and "GB of memory are free" in message
        assert str(tmp_path) in message and "\n" not in message


def test_the_fix_is_a_smaller_type_where_that_helps() -> None:
    free = available_memory()
    assert free is not None
    with pytest.raises(CheckpointError, match=r"load it as bfloat16, or .* convert.*, 1\.00 GB"):
        require_memory("model", 2 * free, "float32", 1 * GB)
    with pytest.raises(CheckpointError, match="machine with more memory or a smaller model"):
        require_memory("model", 4 * free, "float32", 2 * free)
    with pytest.raises(CheckpointError, match="machine with more memory"):
        require_memory("model", 2 * free, "bfloat16", 2 * free)
    require_memory("model", free // 2, "float32", free // 4)


def test_available_memory_respects_a_container(tmp_path: Path) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   8000000 kB\n")
    group.mkdir()
    assert available_memory(meminfo, group) == 8_000_000 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text(f"{3 * GB}\n")
    assert available_memory(meminfo, group) == 8_000_000 * 1024
    (group / "memory.max").write_text(f"{4 * GB}\n")
    assert available_memory(meminfo, group) == GB
    (group / "memory.stat").write_text(f"anon 7\ninactive_file {GB // 2}\n")
    assert available_memory(meminfo, group) == GB + GB // 2
    (group / "memory.current").write_text(f"{9 * GB}\n")
    assert available_memory(meminfo, group) == 0
