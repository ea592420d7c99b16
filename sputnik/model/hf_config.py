"""What a config.json of Hugging Face says, old or new, where it is not simply the field of `ModelConfig`.

The reference is transformers: a field that is missing means what it means there, and a function that we would compute
otherwise, or not at all, is refused by name.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from sputnik.errors import CheckpointError

# What transformers means by a field that a deepseek_v3 file lacks, where we mean something else.
V3_UNSAID = {
    "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
}  # fmt: skip


def check_values(config: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """CheckpointError where a field that we read is missing or of another type."""
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not config.get(name):
            raise CheckpointError(f"config.json: {name} = {config.get(name)}: a model needs one")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name), dict | None):
            raise CheckpointError(f"config.json: {name} = {config[name]!r}: must be an object or null")
    for name, kind in types.items():
        if config.get(name) is not None and not name.startswith("rope_"):
            try:
                msgspec.convert(config[name], kind, str_keys=True)
            except msgspec.ValidationError as error:
                raise CheckpointError(f"config.json: {name} = {config[name]!r}: {error}") from None


def read_rope(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """(theta, scaling) from either generation of keys; scaling None means plain RoPE."""
    scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = scaling.pop("rope_theta", config.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor is not computed here")
    legacy = scaling.pop("type", None)
    kind = scaling.pop("rope_type", legacy)
    if kind == "default" or not (kind or scaling):
        return theta, None
    if kind in ("yarn", "llama3"):
        length = scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        scaling["original_max_position_embeddings"] = config.get("original_max_position_embeddings", length)
    return theta, {"rope_type": kind} | scaling


def read_deepseek(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields whose absence means something else than our default. transformers leaves out scoring_func and
    topk_method, and means V3's sigmoid gate for deepseek_v3."""
    v3 = config["model_type"] == "deepseek_v3"
    expert_free = not config.get("n_routed_experts")
    found = {
        "scoring_func": config.get("scoring_func") or ("sigmoid" if v3 else "softmax"),
        "topk_method": config.get("topk_method") or ("noaux_tc" if v3 else "greedy"),
        "norm_topk_prob": bool(config.get("norm_topk_prob", v3)),
        "n_routed_experts": None if expert_free else config["n_routed_experts"],
        "n_shared_experts": config.get("n_shared_experts", 1) or 0,
        "n_group": config.get("n_group") or 1,
        "topk_group": config.get("topk_group") or 1,
        "q_lora_rank": config.get("q_lora_rank"),
        "first_k_dense_replace": min(config.get("first_k_dense_replace") or 0, config["num_hidden_layers"]),
    }
    if not expert_free:
        refuse_other_gates({**config, **found})
    return found


def refuse_other_gates(config: Mapping[str, Any]) -> None:
    """CheckpointError for a gate that transformers would silently take for the published one of the model_type."""
    v3 = config["model_type"] == "deepseek_v3"
    scoring, method = ("sigmoid", ("noaux_tc",)) if v3 else ("softmax", ("greedy", "group_limited_greedy"))
    for name, right in (
        ("scoring_func", config["scoring_func"] == scoring),
        ("topk_method", config["topk_method"] in method),
        ("norm_topk_prob", v3 or not config["norm_topk_prob"]),
    ):
        if not right:
            kind = config["model_type"]
            raise CheckpointError(f"config.json: a {kind} model has no {name} {config[name]!r}; change one")


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """CheckpointError for a feature that changes the function and that we do not compute."""
    layers = config.get("num_hidden_layers", 0)
    window = config.get("use_sliding_window") and config.get("max_window_layers", 0) < layers
    kinds = set(config.get("layer_types") or []) - {"full_attention"}
    refused = {
        f"hidden_act {config.get('hidden_act')!r}": config.get("hidden_act", "silu") not in ("silu", "swish"),
        "mlp_bias": bool(config.get("mlp_bias")),
        "use_sliding_window": bool(window),
        "sliding_window": config["model_type"] != "qwen2" and config.get("sliding_window") is not None,
        f"layer_types {sorted(kinds)}": bool(kinds),
        "attention_dropout": bool(config.get("attention_dropout")),
        "moe_layer_freq other than 1": config.get("moe_layer_freq", 1) != 1,
        "rope_interleave false": config.get("rope_interleave", True) is False,
        "attention_bias with MLA": bool(config.get("kv_lora_rank") and config.get("attention_bias")),
    }
    for feature, present in refused.items():
        if present:
            raise CheckpointError(f"config.json: {feature} is not computed here; convert another checkpoint")
