"""GGUF both ways: what we write is read back exactly, lies as llama.cpp expects it, and damage is one clear line."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from sputnik.errors import CheckpointError, ConfigError
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.gguf_in import GgufTensor
from sputnik.model.gguf_out import write_gguf
from sputnik.model.transformer import Transformer
from sputnik.model.weights import weights_of
from sputnik.text.gguf_header import read_header
from sputnik.text.tokenizer import Tokenizer

YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("deepseek", {"rope_scaling": YARN}),
    "v3-full-queries": ("deepseek", {"q_lora_rank": None, "n_shared_experts": 2, "norm_topk_prob": False}),
    "v3-one-group": ("deepseek", {"n_group": 1, "topk_group": 1, "tie_word_embeddings": True}),
    "v3-dense": (
        "deepseek",
        {"n_routed_experts": None, "first_k_dense_replace": 3, "n_group": 1, "topk_group": 1,
         "num_experts_per_tok": 1, "moe_intermediate_size": 0, "routed_scaling_factor": 1.0},
    ),
    "v2": (
        "deepseek",
        {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "n_group": 1,
         "topk_group": 1, "norm_topk_prob": False},
    ),
    "llama": ("dense", {"model_type": "llama", "head_dim": 12}),
    "llama-3": ("dense", {"model_type": "llama", "head_dim": 12, "rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": ("dense", {"model_type": "llama", "head_dim": 12, "rope_scaling": LINEAR}),
    "llama-biased": ("dense", {"model_type": "llama", "head_dim": 12, "attention_bias": True}),
    "qwen2": ("dense", {"head_dim": 12, "rms_norm_eps": 1e-5, "rope_theta": 5e5}),
}  # fmt: skip
Build = Callable[..., Transformer]


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return Tokenizer.train(topics.values(), vocab_size=300)


def same_tensors(a: Transformer, b: Transformer) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def write(model: Transformer, path: Path, kind: str = "F32", tokenizer: Tokenizer | None = None) -> Path:
    write_gguf(weights_of(model), path, kind, tokenizer=tokenizer)
    return path


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_back_exactly(case: str, build: Build, tmp_path: Path) -> None:
    family, changes = CASES[case]
    model = build(family, **changes)
    back = load_model(write(model, tmp_path / "a.gguf"))
    assert same_tensors(model, back) and not back.training
    unsaid = {"initializer_range": 0.02, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assert back.config == dataclasses.replace(model.config, **unsaid)


def test_experts_in_no_layer_leave_no_trace(build: Build, tmp_path: Path) -> None:
    back = load_model(write(build(first_k_dense_replace=3), tmp_path / "a.gguf"))
    assert back.config.n_routed_experts is None
    save_model(back, tmp_path / "hf")


def test_tokenizer_and_directory(build: Build, vocabulary: Tokenizer, tmp_path: Path) -> None:
    model = build(vocab_size=vocabulary.vocab_size + 5, bos_token_id=None)
    write(model, tmp_path / "a.gguf", tokenizer=vocabulary)
    tok = Tokenizer.load(tmp_path)
    assert tok.encode("Hello 123\n") == vocabulary.encode("Hello 123\n") and tok.think_id == vocabulary.think_id
    back = load_model(tmp_path)
    assert same_tensors(model, back)
    assert (back.config.bos_token_id, back.config.eos_token_id, back.config.pad_token_id) == (0, 1, 2)
    save_model(model, tmp_path)
    assert load_model(tmp_path).config.bos_token_id is None, "a directory's own config.json wins over a GGUF beside it"


def test_prediction_modules_are_left_out_with_a_warning(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(num_nextn_predict_layers=1)
    back = load_model(write(model, tmp_path / "a.gguf"))
    assert "prediction modules are left out" in caplog.text
    assert not back.mtp and torch.equal(back.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_types_round_once(kind: str, dtype: torch.dtype, build: Build, tmp_path: Path) -> None:
    model = build()
    back = load_model(write(model, tmp_path / "a.gguf", kind)).state_dict()
    for key, tensor in model.state_dict().items():
        exact = tensor.dim() == 1 or key.endswith("mlp.gate.weight")
        assert torch.equal(back[key], tensor if exact else tensor.to(dtype).float()), key


def test_q8_0_is_within_half_a_step_and_odd_rows_become_f16(build: Build, tmp_path: Path) -> None:
    model = build(hidden_size=64, q_lora_rank=32)
    path = write(model, tmp_path / "a.gguf", "Q8_0")
    kinds = {name: gguf.GGMLQuantizationType(info.kind).name for name, info in read_header(path).tensors.items()}
    assert kinds["blk.1.ffn_up_exps.weight"] == kinds["token_embd.weight"] == kinds["blk.0.attn_q_b.weight"] == "Q8_0"
    assert kinds["blk.0.attn_k_b.weight"] == "F16" and kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    back = load_model(path).state_dict()
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    rows, stored = model.state_dict()[stack].view(-1, 32), back[stack].view(-1, 32)
    step = rows.abs().amax(dim=1, keepdim=True) / 127
    assert ((stored - rows).abs() <= 0.501 * step + rows.abs() / 1024).all() and not torch.equal(stored, rows)


def test_tensors_lie_as_llama_cpp_reads_them(build: Build, tmp_path: Path) -> None:
    """Read by the `gguf` package: experts stacked, kv_b split and its key part transposed, rotated rows interleaved."""
    deepseek, llama = build(), build("dense", model_type="llama")
    c, state = deepseek.config, deepseek.state_dict()
    found = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(write(deepseek, tmp_path / "a.gguf")).tensors}
    up_kv = state["model.layers.2.self_attn.kv_b_proj.weight"].view(4, c.qk_nope_head_dim + c.v_head_dim, -1)
    for head in range(4):
        assert torch.equal(found["blk.2.attn_k_b.weight"][head], up_kv[head, : c.qk_nope_head_dim].T)
        assert torch.equal(found["blk.2.attn_v_b.weight"][head], up_kv[head, c.qk_nope_head_dim :])
    stack = state["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(found["blk.1.ffn_gate_exps.weight"][5], stack[5, : c.moe_intermediate_size])
    assert torch.equal(found["blk.1.ffn_up_exps.weight"][5], stack[5, c.moe_intermediate_size :])
    assert torch.equal(found["blk.1.exp_probs_b.bias"], state["model.layers.1.mlp.gate.e_score_correction_bias"])
    found = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(write(llama, tmp_path / "b.gguf")).tensors}
    ours, width = llama.state_dict()["model.layers.1.self_attn.k_proj.weight"], llama.config.gqa_head_dim
    for head in range(2):
        for pair in range(width // 2):
            row = found["blk.1.attn_k.weight"][head * width + 2 * pair : head * width + 2 * pair + 2]
            assert torch.equal(row, ours[[head * width + pair, head * width + pair + width // 2]])


def test_metadata_has_what_llama_cpp_looks_for(build: Build, tmp_path: Path) -> None:
    header = read_header(write(build(rope_scaling=YARN), tmp_path / "a.gguf"))
    wanted = {
        "leading_dense_block_count": 1, "attention.head_count_kv": 1, "attention.key_length": 24 + 8,
        "attention.value_length": 24, "attention.key_length_mla": 20, "attention.value_length_mla": 16,
        "rope.dimension_count": 8, "expert_gating_func": 2, "expert_weights_scale": 2.5, "expert_weights_norm": True,
        "expert_group_count": 4, "expert_group_used_count": 2, "expert_shared_count": 1, "attention.q_lora_rank": 20,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.yarn_log_multiplier": 0.07,
    }  # fmt: skip
    assert {key: header.metadata[f"deepseek2.{key}"] for key in wanted} == wanted
    assert header.metadata["tokenizer.ggml.model"] == "none"


def test_models_llama_cpp_would_compute_otherwise_are_refused(build: Build, tmp_path: Path) -> None:
    for changes, words in (
        ({"n_shared_experts": 0}, "needs a shared expert"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "mscale equal to mscale_all_dim"),
        ({"rope_scaling": YARN | {"beta_fast": 16}}, "beta_fast 32"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 4096}, "rope_theta": 3.0}, "upside down"),
        ({"rope_scaling": LINEAR}, "no linear RoPE scaling"),
        ({"rms_norm_eps": 1e-5}, "the epsilon of all others"),
        ({"rope_scaling": LLAMA3}, "for llama only"),
        ({"num_hidden_layers": 27}, "uncompressed queries"),
        ({"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}, "best two"),
    ):
        with pytest.raises(CheckpointError, match=words):
            write(build(**changes), tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="qwen2 wants heads of 48 / 4"):
        write(build("dense", head_dim=16), tmp_path / "a.gguf")
    with pytest.raises(ConfigError, match="choose one of F32, F16, BF16, Q8_0"):
        write(build(), tmp_path / "a.gguf", "Q4_K")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(build: Build, tmp_path: Path) -> None:
    path = write(build(), tmp_path / "a.gguf")
    before = path.read_bytes()
    broken = dataclasses.replace(weights_of(build()), read=lambda key, dtype: torch.empty(0)[1])
    with pytest.raises(IndexError):
        write_gguf(broken, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    with pytest.raises(CheckpointError, match="could not be written, nothing there was changed"):
        write(build(), path / "inside.gguf")


# --- storage types, each against a decoder written from its definition ---------------------------------------------


def half(data: np.ndarray) -> np.ndarray:
    return data.copy().view(np.float16).astype(np.float32)[..., 0]


def nibbles(data: np.ndarray) -> list[int]:
    """Low halves first, as the 32-blocks lie."""
    return [int(byte) & 15 for byte in data] + [int(byte) >> 4 for byte in data]


def q4_k(block: np.ndarray) -> list[float]:
    d, low, packed, out = half(block[:2]), half(block[2:4]), [int(b) for b in block[4:16]], []
    for part in range(8):
        if part < 4:
            scale, least = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = packed[part + 4] & 15 | packed[part - 4] >> 6 << 4
            least = packed[part + 4] >> 4 | packed[part] >> 6 << 4
        start = 16 + part // 2 * 32
        codes = [int(byte) >> 4 * (part % 2) & 15 for byte in block[start : start + 32]]
        out += [d * scale * code - low * least for code in codes]
    return out


def q6_k(block: np.ndarray) -> list[float]:
    low, high, scales, d = block[:128], block[128:192], block[192:208].copy().view(np.int8), half(block[208:210])
    out = []
    for i in range(256):
        group, place = i // 128, i % 128
        code = int(low[64 * group + place % 64]) >> 4 * (place // 64) & 15
        code |= (int(high[32 * group + place % 32]) >> 2 * (place // 32) & 3) << 4
        out.append(d * int(scales[i // 16]) * (code - 32))
    return out


DECODERS: dict[str, Callable[[np.ndarray], list[float]]] = {
    "F32": lambda b: b.copy().view(np.float32).tolist(),
    "F16": lambda b: b.copy().view(np.float16).tolist(),
    "BF16": lambda b: [(int(b[0]) << 16 | int(b[1]) << 24) and
                       float(np.array([int(b[0]) << 16 | int(b[1]) << 24], np.uint32).view(np.float32)[0])],
    "Q8_0": lambda b: [half(b[:2]) * code for code in b[2:].copy().view(np.int8).tolist()],
    "Q4_0": lambda b: [half(b[:2]) * (code - 8) for code in nibbles(b[2:])],
    "Q4_1": lambda b: [half(b[:2]) * code + half(b[2:4]) for code in nibbles(b[4:])],
    "Q4_K": q4_k,
    "Q6_K": q6_k,
}  # fmt: skip
SCALES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}  # where a half float lies


@pytest.mark.parametrize("name", DECODERS)
def test_storage_types_are_decoded_as_defined(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    size, width = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2 * 3 * 2, width), dtype=np.uint8)
    if not SCALES.get(name):  # a plain number: keep it finite
        blocks[:, -1] &= 0x3F
    for at in SCALES.get(name, ()):
        blocks[:, at : at + 2] = random.normal(size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
    tensor = GgufTensor(blocks.reshape(-1), (2, 3, 2 * size), int(kind))
    expected = torch.tensor([float(value) for block in blocks for value in DECODERS[name](block)]).view(2, 3, -1)
    whole, swapped = torch.empty(2, 3, 2 * size), torch.empty(3, 2, 2 * size)
    tensor.copy_into(whole)
    tensor.copy_into(swapped.transpose(0, 1))
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(swapped.transpose(0, 1), whole)
