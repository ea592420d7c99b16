"""`ModelConfig` as GGUF metadata, both ways, for the architectures llama, qwen2 and deepseek2 of llama.cpp.

    config = read_config(header); metadata = config_metadata(config)

llama.cpp computes less than we do in some corners (groups of softmax experts, some YaRN settings): such a model is
refused when it is written, with the reason, because the file would load and answer otherwise. Prediction modules are
left out.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sputnik.config import from_dict
from sputnik.errors import CheckpointError, SputnikError
from sputnik.model.config import ModelConfig
from sputnik.model.gguf_names import ROPE_FACTORS
from sputnik.model.mla import LATENT_EPS
from sputnik.model.rope import inverse_frequencies, yarn_range
from sputnik.text.gguf_header import Header

ARCHITECTURES = ("llama", "qwen2", "deepseek2")
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of gating functions
LLAMA3_LENGTH = 8192  # what Llama 3 was trained with
LITE_LAYERS = (26, 27)  # llama.cpp takes a deepseek2 of so many layers for one without compressed queries


def read_config(header: Header, rope_factors: Tensor | None) -> ModelConfig:
    """The sizes of a model; `rope_factors` is the tensor rope_freqs.weight if the file has one."""
    values = _Values(header)
    if values.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{header.path}: architecture {values.architecture!r} is not read; known: {', '.join(ARCHITECTURES)}"
        )
    sizes = _common(values) | (_deepseek(values) if values.architecture == "deepseek2" else _gqa(values))
    try:
        config = from_dict(ModelConfig, sizes, str(header.path))
        return from_dict(ModelConfig, sizes | {"rope_scaling": _rope_scaling(values, config, rope_factors)}, "")
    except SputnikError as error:
        raise CheckpointError(f"{header.path}: {error}") from None


class _Values:
    """Metadata under the prefix of the architecture."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.architecture = str(header.get("general.architecture"))

    def get(self, key: str) -> Any:
        return self.header.get(f"{self.architecture}.{key}")

    def maybe(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number, not negative; must be there when it has no default. Lists are sizes that vary by layer."""
        value = self.get(key) if default is None else self.maybe(key, default)
        if not isinstance(value, int) or value < 0:
            raise CheckpointError(f"{self.header.path}: {key} is {str(value)[:40]}, not one whole number")
        return value

    def token(self, name: str) -> Any:
        return self.header.metadata.get(f"tokenizer.ggml.{name}_token_id")


def _common(values: _Values) -> dict[str, Any]:
    tensors = values.header.tensors
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{values.header.path}: holds no model (no token_embd.weight); give a whole GGUF file")
    if values.count("block_count") > len(tensors):
        raise CheckpointError(
            f"{values.header.path}: block_count is larger than its {len(tensors)} tensors allow; corrupt"
        )
    if values.count("nextn_predict_layers", 0):
        raise CheckpointError(f"{values.header.path}: prediction modules in GGUF are not read; convert without them")
    return {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": values.count("embedding_length"),
        "num_hidden_layers": values.count("block_count"),
        "num_attention_heads": values.count("attention.head_count"),
        "intermediate_size": values.count("feed_forward_length"),
        "max_position_embeddings": values.count("context_length"),
        "rms_norm_eps": values.get("attention.layer_norm_rms_epsilon"),
        "rope_theta": values.maybe("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "initializer_range": 0.02,
        "bos_token_id": values.token("bos"),
        "eos_token_id": _ends([values.token(name) for name in ("eos", "eot", "eom")]),
        "pad_token_id": values.token("padding"),
    }


def _ends(ids: list[Any]) -> Any:
    """The end of a text, of a turn, of a message with a call: most files have one token for all."""
    found = [id for place, id in enumerate(ids) if id is not None and id not in ids[:place]]
    return found if len(found) > 1 else found[0] if found else None


def _gqa(values: _Values) -> dict[str, Any]:
    heads = values.count("attention.head_count")
    width = values.count("attention.key_length", values.count("embedding_length") // max(heads, 1))
    for key, wanted in (("attention.value_length", width), ("rope.dimension_count", width), ("expert_count", 0)):
        if values.maybe(key, wanted) != wanted:
            raise CheckpointError(f"{values.header.path}: {key} {values.maybe(key)} is not computed here")
    return {
        "model_type": values.architecture,
        "num_key_value_heads": values.count("attention.head_count_kv", heads),
        "head_dim": width,
        "attention_bias": values.architecture == "llama" and "blk.0.attn_q.bias" in values.header.tensors,
    }


def _deepseek(values: _Values) -> dict[str, Any]:
    rope = values.count("rope.dimension_count")
    if abs(values.get("attention.layer_norm_rms_epsilon") - LATENT_EPS) > 1e-9:
        raise CheckpointError(f"{values.header.path}: norms of latents need an epsilon of {LATENT_EPS} here")
    sizes = {
        "kv_lora_rank": values.count("attention.kv_lora_rank"),
        "q_lora_rank": values.count("attention.q_lora_rank", 0) or None,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": values.count("attention.key_length_mla", values.count("attention.key_length", 0)) - rope,
        "v_head_dim": values.count("attention.value_length_mla", values.count("attention.value_length", 0)),
        "num_key_value_heads": values.count("attention.head_count"),
    }
    if not values.count("expert_count", 0) or values.count("leading_dense_block_count", 0) >= values.count(
        "block_count"
    ):
        return sizes | {"model_type": "deepseek_v3", "first_k_dense_replace": values.count("block_count")}
    groups, kept = values.count("expert_group_count", 1) or 1, values.count("expert_group_used_count", 1) or 1
    biased = any(name.endswith(".exp_probs_b.bias") for name in values.header.tensors)
    sigmoid = values.maybe("expert_gating_func", SOFTMAX) == SIGMOID
    return sizes | {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "n_routed_experts": values.count("expert_count"),
        "num_experts_per_tok": values.count("expert_used_count"),
        "n_shared_experts": values.count("expert_shared_count", 0),
        "moe_intermediate_size": values.count("expert_feed_forward_length"),
        "first_k_dense_replace": values.count("leading_dense_block_count", 0),
        "routed_scaling_factor": values.maybe("expert_weights_scale") or 1.0,
        "norm_topk_prob": values.maybe("expert_weights_norm", False),
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if biased else "group_limited_greedy" if kept < groups else "greedy",
        "n_group": groups,
        "topk_group": kept,
    }


def _rope_scaling(values: _Values, config: ModelConfig, factors: Tensor | None) -> dict[str, Any] | None:
    kind, factor = values.maybe("rope.scaling.type", "none"), values.maybe("rope.scaling.factor", 1.0)
    length = values.maybe("rope.scaling.original_context_length")
    if factors is not None:
        return _llama3(values, config, factors, length or LLAMA3_LENGTH)
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow"),
                             ("attention_factor", "yarn_attn_factor")):  # fmt: skip
            if values.maybe(f"rope.scaling.{theirs}") is not None:
                scaling[ours] = values.maybe(f"rope.scaling.{theirs}")
        weight = values.maybe("rope.scaling.yarn_log_multiplier")
        if config.is_mla and isinstance(weight, float) and weight:
            scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * weight, 6))  # stored as a tenth
        return scaling
    if kind in ("none", "linear") and factor in (0.0, 1.0):
        return None
    if kind == "linear" and not config.is_mla:
        return {"rope_type": "linear", "factor": factor}
    raise CheckpointError(f"{values.header.path}: RoPE scaling {kind!r} by {factor} is not computed here")


def _llama3(values: _Values, config: ModelConfig, factors: Tensor, length: int) -> dict[str, Any]:
    """GGUF holds the outcome, not the settings: those of Llama 3 are tried."""
    scaling = {
        "rope_type": "llama3", "factor": round(float(factors.max()), 4), "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": length,
    }  # fmt: skip
    expected = llama3_factors(config, scaling)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(f"{values.header.path}: {ROPE_FACTORS} are not Llama 3's; convert another file")
    return scaling


def llama3_factors(config: ModelConfig, scaling: dict[str, Any]) -> Tensor:
    """(R/2,) what each frequency is divided by."""
    plain, _ = inverse_frequencies(config.rope_dim, config.rope_theta, None)
    return plain / inverse_frequencies(config.rope_dim, config.rope_theta, scaling)[0]


# --- writing ---------------------------------------------------------------------------------------------------------


def config_metadata(config: ModelConfig) -> dict[str, Any]:
    """Metadata under the full keys; Python's int stands for uint32, float for float32. Refuses what would differ."""
    for reason in _impossible(config):
        raise CheckpointError(f"llama.cpp cannot compute this model: {reason}; write a Hugging Face directory instead")
    architecture = "deepseek2" if config.is_mla else config.model_type
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1 if config.is_mla else config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.rope_dim,
        **(_deepseek_metadata(config) if config.is_mla else _gqa_metadata(config)),
        **_rope_metadata(config),
    }
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in sizes.items()}


def _impossible(c: ModelConfig) -> Iterator[str]:
    if c.is_mla and c.q_lora_rank is not None and c.num_hidden_layers in LITE_LAYERS:
        yield f"deepseek2 with {c.num_hidden_layers} layers must have uncompressed queries"
    if c.n_routed_experts is not None:
        if not c.n_shared_experts:
            yield "deepseek2 needs a shared expert"
        if c.topk_method == "group_limited_greedy" and c.topk_group < c.n_group:
            yield "it ranks a group of experts by the best two, not by the best one"
        if c.n_group == c.n_routed_experts and _grouped(c):
            yield "a group needs more than one expert"
    if c.is_mla and abs(c.rms_norm_eps - LATENT_EPS) > 1e-9:
        yield f"its norms of latents have the epsilon of all others, which must be {LATENT_EPS}"
    if c.model_type == "qwen2" and c.num_attention_heads * c.gqa_head_dim != c.hidden_size:
        yield f"qwen2 wants heads of {c.hidden_size} / {c.num_attention_heads}"
    scaling = c.rope_scaling or {}
    if scaling.get("rope_type") == "llama3" and c.model_type != "llama":
        yield "it takes Llama 3's RoPE for llama only"
    if scaling.get("rope_type") == "linear" and c.is_mla:
        yield "with MLA it takes no linear RoPE scaling"
    if scaling.get("rope_type") != "yarn":
        return
    low, high = yarn_range(c.rope_dim, c.rope_theta, scaling)
    if low > high:
        yield "YaRN's range of frequencies is upside down"
    if (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1, scaling.get("truncate", True)) != (32, 1, True):
        yield "of YaRN it takes beta_fast 32, beta_slow 1 and truncate only"
    weights = (scaling.get("mscale"), scaling.get("mscale_all_dim"))
    if scaling.get("attention_factor") is not None or weights[0] != weights[1] or bool(weights[0]) != c.is_mla:
        yield "of YaRN it takes no attention_factor, and for MLA an mscale equal to mscale_all_dim"


def _grouped(config: ModelConfig) -> bool:
    return config.topk_method != "greedy" and config.topk_group < config.n_group


def _gqa_metadata(config: ModelConfig) -> dict[str, Any]:
    return {"attention.key_length": config.gqa_head_dim, "attention.value_length": config.gqa_head_dim}


def _deepseek_metadata(config: ModelConfig) -> dict[str, Any]:
    """Attention is declared as llama.cpp runs it, one key head of latent and rope; the real sizes end in `_mla`."""
    latent = config.kv_lora_rank or 0
    moe = config.n_routed_experts is not None
    sizes: dict[str, Any] = {
        "leading_dense_block_count": config.first_k_dense_replace if moe else config.num_hidden_layers,
        "attention.q_lora_rank": config.q_lora_rank or 0,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + config.qk_rope_head_dim,
        "attention.value_length": latent,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "expert_feed_forward_length": config.moe_intermediate_size if moe else config.intermediate_size,
        "expert_shared_count": config.n_shared_experts if moe else 0,
    }
    if moe:
        sizes |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_weights_scale": config.routed_scaling_factor,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_gating_func": SIGMOID if config.scoring_func == "sigmoid" else SOFTMAX,
        }
    if moe and _grouped(config):
        sizes |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return sizes


def _rope_metadata(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope.scaling.type": "none"}
    if scaling["rope_type"] == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    original = {"rope.scaling.original_context_length": scaling["original_max_position_embeddings"]}
    if scaling["rope_type"] == "llama3":
        return {"rope.scaling.type": "none"} | original
    weight = {"rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"]} if config.is_mla else {}
    return {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling["factor"])} | original | weight
