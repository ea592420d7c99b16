"""Our transformer against transformers' DeepSeek, Llama and Qwen2: same checkpoint, same numbers, both directions.

Weights are random with a spread of 0.1 and norms, biases and routing biases are moved off their neutral values, so that
a swapped half, a forgotten bias or a wrong rotation shows. Prompts are longer than the original YaRN length.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sputnik.model.cache import Cache
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.rope import inverse_frequencies
from sputnik.model.transformer import Transformer

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
transformers = pytest.importorskip("transformers", reason="compared with transformers: pip install 'sputnik[dev]'")

MLA = {
    "vocab_size": 97, "hidden_size": 40, "intermediate_size": 56, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 12, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "max_position_embeddings": 128,
}  # fmt: skip
GQA = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.5}


def yarn(**mscale: float) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
            **mscale}  # fmt: skip


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("DeepseekV3", MLA | {"rope_scaling": yarn(mscale=1.0, mscale_all_dim=1.0)}),
    "v3-plain-rope": ("DeepseekV3", MLA),
    "v3-full-queries": ("DeepseekV3", MLA | {"q_lora_rank": None, "rms_norm_eps": 1e-3}),
    "v3-yarn-mscale-ratio": ("DeepseekV3", MLA | {"rope_scaling": yarn(mscale=1.0, mscale_all_dim=0.5)}),
    "v3-yarn-no-mscale": ("DeepseekV3", MLA | {"rope_scaling": yarn()}),
    "v3-no-dense-layer": ("DeepseekV3", MLA | {"first_k_dense_replace": 0}),
    "v3-two-dense-layers": ("DeepseekV3", MLA | {"first_k_dense_replace": 2, "q_lora_rank": None}),
    "v3-all-dense": ("DeepseekV3", MLA | {"first_k_dense_replace": 5}),
    "v3-linear": ("DeepseekV3", MLA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rms_norm_eps": 1e-2}),
    "v3-one-group-top1": ("DeepseekV3", MLA | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}),
    "v3-one-group-kept": ("DeepseekV3", MLA | {"n_group": 8, "topk_group": 1, "num_experts_per_tok": 2}),
    "v3-every-expert": ("DeepseekV3", MLA | {"n_routed_experts": 4, "n_group": 2}),
    "v3-no-shared": ("DeepseekV3", MLA | {"n_shared_experts": 0}),
    "v3-two-shared": ("DeepseekV3", MLA | {"n_shared_experts": 2, "routed_scaling_factor": 1.0}),
    "v3-raw-gate-weights": ("DeepseekV3", MLA | {"norm_topk_prob": False, "routed_scaling_factor": 1.7}),
    "v3-tied": ("DeepseekV3", MLA | {"tie_word_embeddings": True, "rope_theta": 500.0}),
    "v3-other-widths": ("DeepseekV3", MLA | {"v_head_dim": 16, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6}),
    "v2-greedy": (
        "DeepseekV2",
        MLA | SOFTMAX | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
                         "rope_scaling": yarn(mscale=0.707, mscale_all_dim=0.707)},
    ),
    "v2-groups": ("DeepseekV2", MLA | SOFTMAX | {"topk_method": "group_limited_greedy", "rms_norm_eps": 1e-4}),
    "llama": ("Llama", GQA),
    "llama-tied": ("Llama", GQA | {"tie_word_embeddings": True, "rope_theta": 100.0}),
    "llama-3": ("Llama", GQA | {"rope_scaling": LLAMA3, "head_dim": 12, "num_key_value_heads": 1}),
    "llama-linear": ("Llama", GQA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "hidden_act": "swish"}),
    "llama-yarn-upside-down": ("Llama", GQA | {"rope_theta": 3.0, "rope_scaling": yarn() | {"beta_slow": 40}}),
    "llama-biased": ("Llama", GQA | {"attention_bias": True, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", GQA),
    "qwen2-tied": ("Qwen2", GQA | {"tie_word_embeddings": True}),
}  # fmt: skip


def reference(family: str, sizes: dict[str, Any]) -> Any:
    """A transformers model with weights far from their neutral initial values."""
    config = getattr(transformers, f"{family}Config")(
        **sizes, initializer_range=0.1, bos_token_id=0, eos_token_id=None, pad_token_id=None
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or name.endswith("bias"):
                tensor.add_(torch.randn_like(tensor) * 0.2)
    return model


def prompts() -> torch.Tensor:
    return torch.randint(97, (3, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def greedy(model: Transformer, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Continuations by the cache: the prompt at once, then one token at a time."""
    cache = Cache.empty(model.config, len(ids), ids.shape[1] + steps, torch.float32)
    new, out = ids, [ids]
    for _ in range(steps):
        new = model(new, cache)[:, -1:].argmax(-1)
        out.append(new)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers, without shared experts
def test_same_numbers_as_transformers_both_ways(case: str, tmp_path: Path) -> None:
    theirs = reference(*CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    ids = prompts()
    expected = theirs(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)

    continued = theirs.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(greedy(ours, ids, 12), continued)

    save_model(ours, tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("unexpected_keys", "mismatched_keys"))
    state = back.state_dict()
    assert all(state[name].numel() == 0 for name in info["missing_keys"]), "only what is empty may be missing"
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name
    torch.testing.assert_close(back(ids).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_transformers_reads_a_preset_we_initialised(tmp_path: Path) -> None:
    """A config.json that never was of transformers, with MTP layers, which it leaves unread."""
    config = ModelConfig.preset("tiny", hidden_size=64, vocab_size=97, initializer_range=0.1)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0)).eval()
    save_model(model, tmp_path / "tiny", max_shard_bytes=1e6)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("model.layers.4.") for name in info["unexpected_keys"])
    ids = prompts()
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scaling", [yarn(), yarn(mscale=0.7, mscale_all_dim=1.0), LLAMA3])
@pytest.mark.parametrize(("theta", "width"), [(1e6, 32), (1e4, 64)])
def test_frequencies_are_those_of_transformers_to_the_last_bit(
    scaling: dict[str, Any], theta: float, width: int
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = scaling | {"original_max_position_embeddings": 1024, "factor": 40.0}
    config = transformers.LlamaConfig(
        hidden_size=width, num_attention_heads=1, rope_parameters=scaling | {"rope_theta": theta}
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    found, factor = inverse_frequencies(width, theta, scaling)
    assert torch.equal(found, expected) and factor == pytest.approx(magnitude, abs=1e-12)


@torch.no_grad()
def test_transformers_reads_latent_attention_without_experts(tmp_path: Path) -> None:
    config = ModelConfig(**(MLA | {"n_routed_experts": None}), initializer_range=0.1)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0)).eval()
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(prompts()).logits, model(prompts()), atol=1e-4, rtol=0)
    assert load_model(tmp_path).config.n_routed_experts is None


@torch.no_grad()
def test_mtp_module_equals_the_one_of_transformers(tmp_path: Path) -> None:
    """transformers reads our MTP layers for drafting (`generate(use_mtp=True)`) and computes the same hidden states."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    torch.manual_seed(0)
    config = ModelConfig(**MLA, num_nextn_predict_layers=1, initializer_range=0.1)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0)).eval()
    for name, tensor in model.state_dict().items():
        if "norm" in name or name.endswith("bias"):
            tensor.add_(torch.randn_like(tensor) * 0.2)
    save_model(model, tmp_path)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    theirs._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\..*"]  # theirs only knows layer 61
    draft = MtpModel.from_pretrained(theirs, device_map={"": "cpu"}).eval()

    ids = prompts()
    trunk = model.trunk(ids)
    positions = torch.arange(1, ids.shape[1]).expand(len(ids), -1)
    expected = draft.forward_layer(
        0, trunk.hidden[:, :-1], positions, MtpCache(config=theirs.config.get_mtp_config()), input_ids=ids[:, 1:]
    )
    torch.testing.assert_close(model.mtp_hidden(trunk.residual, ids).hidden[0], expected, atol=1e-4, rtol=0)
