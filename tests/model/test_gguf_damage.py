"""GGUF files that are cut, corrupt, or of models we do not compute: one clear line each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from sputnik.errors import CheckpointError
from sputnik.model.checkpoint import load_model
from sputnik.model.gguf_out import write_gguf
from sputnik.model.transformer import Transformer
from sputnik.model.weights import weights_of
from sputnik.text.gguf_header import read_header

Build = Callable[..., Transformer]
Change = Callable[[dict[str, Any], dict[str, np.ndarray]], object]


def rewrite(path: Path, change: Change) -> None:
    """Change metadata and tensors of an F32 file."""
    metadata = dict(read_header(path).metadata)
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    change(metadata, tensors)
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if type(value) is int else kind)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def key(name: str, value: Any) -> Change:
    return lambda metadata, _: metadata.__setitem__(f"deepseek2.{name}", value)


CHANGES: dict[str, tuple[Change, str]] = {
    "another architecture": (lambda m, _: m.__setitem__("general.architecture", "gemma"), "'gemma' is not read"),
    "no sizes": (lambda m, _: m.pop("deepseek2.embedding_length"), "has no deepseek2.embedding_length"),
    "a size as text": (key("block_count", "three"), "block_count is three, not one whole number"),
    "sizes by layer": (key("attention.head_count", [4, 4]), "attention.head_count is [4, 4], not one"),
    "no heads": (key("attention.head_count", 0), "num_attention_heads = 0: must be positive"),
    "impossible sizes": (key("expert_used_count", 9), "num_experts_per_tok 9 must lie in"),
    "prediction modules": (key("nextn_predict_layers", 1), "prediction modules in GGUF are not read"),
    "a longer RoPE": (key("rope.scaling.factor", 4.0), "RoPE scaling 'none' by 4.0"),
    "a missing layer": (key("block_count", 4), "missing: blk.3."),
    "a layer too many": (key("block_count", 2), "unexpected: blk.2."),
    "a tensor less": (lambda _, t: t.pop("output_norm.weight"), "1 missing: output_norm.weight"),
    "a tensor more": (lambda _, t: t.__setitem__("blk.0.sinks", np.ones(2, np.float32)), "1 unexpected: blk.0.sinks"),
    "another width": (key("expert_feed_forward_length", 24), "of another shape: blk.1.ffn"),
    "no embedding": (lambda _, t: t.pop("token_embd.weight"), "holds no model"),
    "a type that is not read": (
        lambda _, t: t.__setitem__("output_norm.weight", np.ones(48, np.int32)),
        "output_norm.weight is stored as I32, which is not read",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_does_not_fit_is_one_clear_line(name: str, build: Build, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(weights_of(build()), path, "F32")
    change, words = CHANGES[name]
    rewrite(path, change)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_file_cut_in_its_weights_says_so(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(weights_of(build()), path, "F32")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated: blk.2.* download or convert it again|truncated: output"):
        load_model(path)


def test_layouts_of_other_writers_are_read(build: Build, tmp_path: Path) -> None:
    """Early files keep `kv_b_proj` whole beside its parts, later ones may join the experts' gate and up."""
    model = build()
    path = tmp_path / "a.gguf"
    write_gguf(weights_of(model), path, "F32")

    def other(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        state = model.state_dict()
        for layer in range(3):
            tensors[f"blk.{layer}.attn_kv_b.weight"] = state[f"model.layers.{layer}.self_attn.kv_b_proj.weight"].numpy()
        for layer in (1, 2):
            halves = [tensors.pop(f"blk.{layer}.ffn_{half}_exps.weight") for half in ("gate", "up")]
            tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(halves, axis=1)

    rewrite(path, other)
    back = load_model(path).state_dict()
    assert all(bool((back[key] == tensor).all()) for key, tensor in model.state_dict().items())


def test_flipped_bytes_of_a_header_raise_nothing_else(build: Build, tmp_path: Path) -> None:
    path, random = tmp_path / "a.gguf", np.random.default_rng(0)
    write_gguf(weights_of(build()), path, "F32")
    content, refused = path.read_bytes(), 0
    end = min(info.offset for info in read_header(path).tensors.values())
    for _ in range(80):
        damaged = bytearray(content)
        for place in random.integers(0, end, 2):
            damaged[place] = random.choice([0, 1, 2, 127, 128, 255])
        path.write_bytes(damaged)
        try:
            load_model(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 40


def test_a_header_that_promises_a_billion_layers_is_refused_at_once(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(weights_of(build()), path, "F32")
    rewrite(path, key("block_count", 10**9))
    with pytest.raises(CheckpointError, match="block_count is larger than its"):
        load_model(path)


def test_the_ends_of_a_turn_and_of_a_message_are_ends(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(weights_of(build()), path, "F32")
    ids = {"eos": 5, "eot": 7, "eom": 5}
    rewrite(path, lambda metadata, _: metadata.update({f"tokenizer.ggml.{k}_token_id": v for k, v in ids.items()}))
    assert load_model(path).config.end_ids == (5, 7)
