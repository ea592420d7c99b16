"""The sizes of a model, under the Hugging Face names, with checks that make an impossible model a one-line error.

`ModelConfig.preset("tiny")` names the shapes we train, `from_hf(json)` reads a published config.json (DeepSeek-V3/R1,
V2-Lite, Llama, Qwen2, SmolLM2) and `to_hf()` writes one back. What we do not compute (sliding windows, other
activations, other RoPE scalings, ...) is refused by name, never ignored. No torch in here.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from sputnik.config import from_dict
from sputnik.errors import CheckpointError, ConfigError
from sputnik.model.hf_config import (
    V3_UNSAID,
    check_values,
    read_deepseek,
    read_rope,
    refuse_other_gates,
    refuse_unsupported,
)  # fmt: skip

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "max_position_embeddings",
)  # fmt: skip
# Beyond these nobody has built one, sizes in bytes may pass 64 bits, and a loop over layers would not end.
MOST = {
    10_000: ("num_hidden_layers", "num_nextn_predict_layers"),
    1 << 16: ("n_routed_experts", "n_shared_experts", "num_attention_heads", "num_key_value_heads", "head_dim",
              "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    1 << 22: ("hidden_size", "intermediate_size", "moe_intermediate_size"),
    1 << 31: ("vocab_size", "max_position_embeddings"),
}  # fmt: skip
TOPK_METHODS = ("noaux_tc", "greedy", "group_limited_greedy")
# rope_type -> (required, optional) keys
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "linear": (("factor",), ()),
}


@dataclass(frozen=True)
class ModelConfig:
    """One transformer. Attention is MLA when `kv_lora_rank` is set, else grouped-query attention; a layer is an expert
    layer when `n_routed_experts` is set and its index is at least `first_k_dense_replace`."""

    model_type: str = "deepseek_v3"
    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    intermediate_size: int = 512
    # MLA (report section 2.1.1); None, None means grouped-query attention with heads of `head_dim`
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    head_dim: int | None = None
    attention_bias: bool = False  # Llama: q, k, v and o; Qwen2 always has q, k, v biases; MLA refuses it
    # experts (report section 2.1.2)
    n_routed_experts: int | None = None
    n_shared_experts: int = 1
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 0
    scoring_func: str = "sigmoid"  # V3; "softmax" in V2
    topk_method: str = "noaux_tc"  # V3: the bias selects; V2: "greedy" or "group_limited_greedy", no bias
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # multi-token prediction (report section 2.2): number of modules
    num_nextn_predict_layers: int = 0
    # positions
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    # the rest
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    # The V3 report trains with 0.006; the published config.json says 0.02, which is only transformers' default.
    initializer_range: float = 0.006
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1  # Llama 3 has several
    pad_token_id: int | None = 2

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ConfigError(problem)

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: nope + rope for MLA."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_mla else self.gqa_head_dim

    @property
    def gqa_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim if self.is_mla else self.gqa_head_dim

    @property
    def cache_width(self) -> int:
        """Values cached for one token in one layer: latent + shared RoPE key (MLA), or all K and V heads (GQA)."""
        if self.kv_lora_rank is not None:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.gqa_head_dim

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        ends = self.eos_token_id
        return ends if isinstance(ends, tuple) else () if ends is None else (ends,)

    def is_moe_layer(self, layer: int) -> bool:
        return self.n_routed_experts is not None and layer >= self.first_k_dense_replace

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """A named shape, with some fields changed: `preset("mini", vocab_size=8192)`."""
        if name not in PRESETS:
            raise ConfigError(f"unknown model preset {name!r}; known: {', '.join(PRESETS)}")
        known = {field.name for field in dataclasses.fields(cls)}
        for key in changes:
            if key not in known:
                raise ConfigError(f"unknown model field {key!r}; known: {', '.join(sorted(known))}")
        return cls(**(PRESETS[name] | changes))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a published config.json, old (`rope_theta`, `rope_scaling`) or transformers 5 (`rope_parameters`)."""
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise CheckpointError(f"config.json: model_type {model_type!r} is not one of {', '.join(ARCHITECTURES)}")
        if model_type == "deepseek_v3":
            config = {**V3_UNSAID, **config}
        check_values(config, get_type_hints(cls))
        refuse_unsupported(config)
        values = {f.name: config[f.name] for f in dataclasses.fields(cls) if config.get(f.name) is not None}
        values["rope_theta"], values["rope_scaling"] = read_rope(config)
        values["initializer_range"] = config.get("initializer_range", 0.02)
        values |= {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        values.setdefault("num_key_value_heads", config["num_attention_heads"])
        if model_type.startswith("deepseek"):
            values.pop("head_dim", None)  # transformers writes the rope width there
            values |= read_deepseek(config)
        else:
            values |= dict.fromkeys(("kv_lora_rank", "q_lora_rank", "n_routed_experts"))
            values.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        if model_type == "qwen2":
            values["attention_bias"] = False
        return from_dict(cls, values, "config.json")

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers, vLLM, SGLang and llama.cpp read; RoPE under the old keys, which all know."""
        fields = dataclasses.asdict(self)
        deepseek_only = {
            "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts",
            "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group",
            "first_k_dense_replace", "scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor",
            "num_nextn_predict_layers",
        }  # fmt: skip
        if self.n_routed_experts is not None:
            refuse_other_gates(fields)
        elif self.is_mla:  # transformers wants a number, and no layer that would have so many experts
            fields |= {"n_routed_experts": 0, "first_k_dense_replace": self.num_hidden_layers}
        if self.is_mla:
            fields.pop("head_dim")
            # Without scoring_func and topk_method vLLM refuses the model and llama.cpp computes something else.
            fields |= {"moe_layer_freq": 1, "ep_size": 1, "seq_aux": True, "rope_interleave": True}
        else:
            fields = {key: value for key, value in fields.items() if key not in deepseek_only}
            fields |= {"head_dim": self.gqa_head_dim, "mlp_bias": False}
        common = {
            "architectures": [ARCHITECTURES[self.model_type]], "hidden_act": "silu", "attention_dropout": 0.0,
            "use_cache": True, "torch_dtype": "float32",
        }  # fmt: skip
        return common | fields


def _problems(c: ModelConfig) -> Iterator[str]:
    """What is wrong with the sizes, each with its fix, the most telling first."""
    if c.model_type not in ARCHITECTURES:
        yield f"model_type {c.model_type!r}: use one of {', '.join(ARCHITECTURES)}"
    for name in POSITIVE:
        if getattr(c, name) <= 0:
            yield f"{name} = {getattr(c, name)}: must be positive"
    for name, most in ((name, most) for most, names in MOST.items() for name in names):
        if (getattr(c, name) or 0) > most:
            yield f"{name} = {getattr(c, name)}: more than {most:,} is surely a mistake"
    if not 1 < c.rope_theta < math.inf:
        yield f"rope_theta = {c.rope_theta}: must be above 1"
    for name in ("rms_norm_eps", "routed_scaling_factor", "initializer_range"):
        if not 0 <= getattr(c, name) < math.inf:
            yield f"{name} = {getattr(c, name)}: must be a number, 0 or more"
    if c.num_nextn_predict_layers < 0:
        yield "num_nextn_predict_layers must be 0 or more"
    yield from _gqa_problems(c) if c.kv_lora_rank is None else _mla_problems(c)
    if c.rope_dim <= 0 or c.rope_dim % 2:
        yield f"the RoPE width {c.rope_dim} must be even and positive"
    if c.n_routed_experts is not None:
        yield from _expert_problems(c, c.n_routed_experts)
    if c.rope_scaling is not None:
        yield from _rope_problems(c.rope_scaling)


def _gqa_problems(c: ModelConfig) -> Iterator[str]:
    heads, key_heads = c.num_attention_heads, c.num_key_value_heads
    if c.model_type.startswith("deepseek"):
        yield f"model_type {c.model_type!r} needs MLA: set kv_lora_rank"
    if c.head_dim is None and c.hidden_size % heads:
        yield f"hidden_size {c.hidden_size} is not a multiple of num_attention_heads {heads}: set head_dim"
    if heads % key_heads:
        yield f"num_attention_heads {heads} must be a multiple of num_key_value_heads {key_heads}"
    if c.n_routed_experts is not None:
        yield "routed experts need the DeepSeek block: set kv_lora_rank, or n_routed_experts to None"
    if c.num_nextn_predict_layers:
        yield f"model_type {c.model_type!r} has no multi-token prediction: set num_nextn_predict_layers to 0"


def _mla_problems(c: ModelConfig) -> Iterator[str]:
    if not c.model_type.startswith("deepseek"):
        yield f"model_type {c.model_type!r} has no MLA: set kv_lora_rank to None"
    if c.attention_bias:
        yield "attention_bias with MLA is not computed here: set it to false"
    if c.num_key_value_heads != c.num_attention_heads:
        yield f"MLA has one key head per query head: set num_key_value_heads to {c.num_attention_heads}"
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if getattr(c, name) <= 0:
            yield f"MLA needs {name} > 0"
    if not c.rms_norm_eps:
        yield "rms_norm_eps = 0: MLA needs more"
    for name in ("kv_lora_rank", "qk_nope_head_dim"):
        if getattr(c, name) % 2:
            yield f"{name} = {getattr(c, name)}: must be even, because what lies behind is rotated in pairs"
    if c.q_lora_rank is not None and c.q_lora_rank <= 0:
        yield "q_lora_rank must be positive, or None for uncompressed queries"
    if c.v_head_dim > c.qk_head_dim:
        yield f"v_head_dim {c.v_head_dim} must not exceed qk_nope_head_dim + qk_rope_head_dim = {c.qk_head_dim}"


def _expert_problems(c: ModelConfig, experts: int) -> Iterator[str]:
    if experts <= 0 or c.moe_intermediate_size <= 0:
        yield "experts need n_routed_experts > 0 and moe_intermediate_size > 0"
    if c.n_shared_experts < 0:
        yield f"n_shared_experts = {c.n_shared_experts}: must be 0 or more"
    if c.scoring_func not in ("sigmoid", "softmax"):
        yield f"scoring_func {c.scoring_func!r}: use sigmoid or softmax"
    if c.topk_method not in TOPK_METHODS:
        yield f"topk_method {c.topk_method!r}: use one of {', '.join(TOPK_METHODS)}"
    if not 0 <= c.first_k_dense_replace <= c.num_hidden_layers:
        yield f"first_k_dense_replace {c.first_k_dense_replace} must lie in 0..num_hidden_layers"
    if c.n_group <= 0 or experts % c.n_group:
        yield f"n_routed_experts {experts} must be a multiple of n_group {c.n_group}"
    if not 0 < c.topk_group <= c.n_group:
        yield f"topk_group {c.topk_group} must lie in 1..n_group = {c.n_group}"
    per_group = experts // c.n_group
    if c.topk_method == "noaux_tc" and c.n_group > 1 and per_group < 2:
        yield f"a group is ranked by its two best experts: lower n_group {c.n_group} to {experts // 2} or less"
    reachable = experts if c.topk_method == "greedy" else per_group * c.topk_group
    if not 0 < c.num_experts_per_tok <= reachable:
        yield f"num_experts_per_tok {c.num_experts_per_tok} must lie in 1..{reachable}, what topk_group groups hold"


def _rope_problems(scaling: Mapping[str, Any]) -> Iterator[str]:
    kind = scaling.get("rope_type")
    if kind not in ROPE_KEYS:
        yield f"rope_scaling: rope_type {kind!r} is not computed here; use {', '.join(ROPE_KEYS)} or no rope_scaling"
        return
    required, optional = ROPE_KEYS[kind]
    given = [key for key in optional if key != "truncate" and scaling.get(key) is not None]
    for key in (*required, *given):
        value = scaling.get(key)
        least = 0 if key.startswith("mscale") else 1e-9  # an mscale of 0 is none
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1 << 31:
            yield f"rope_scaling of type {kind} needs a positive {key}, not {value!r}"
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        yield "rope_scaling of type llama3 needs low_freq_factor < high_freq_factor"
    if not isinstance(scaling.get("truncate"), bool | None):
        yield f"rope_scaling: truncate = {scaling['truncate']!r}: must be true or false"
    for key in scaling:
        if key not in (*required, *optional, "rope_type"):
            yield f"rope_scaling of type {kind} has no key {key!r}; known: {', '.join((*required, *optional))}"


DEEPSEEK_YARN = {
    "rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    # The quickstart's model: 3.6 million parameters, 0.6 of them its prediction module. Init 0.02: at this width the
    # published 0.006 leaves the first hundreds of steps with nearly uniform attention and routing.
    "tiny": {
        "vocab_size": 2048, "hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 64, "q_lora_rank": 96,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_group": 4, "topk_group": 2,
        "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
        "max_position_embeddings": 1024, "initializer_range": 0.02,
    },
    # A dense student for distillation: a Llama of 1.1 million parameters.
    "dense": {
        "model_type": "llama",
        "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
        "max_position_embeddings": 1024, "initializer_range": 0.02,
    },
    # 59 million parameters, 26 million active: the shape of our speed comparisons. Init 0.02 as for tiny.
    "mini": {
        "vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408,
        "num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 128, "q_lora_rank": 192,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "n_group": 4, "topk_group": 2,
        "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0,
        "max_position_embeddings": 2048, "initializer_range": 0.02,
    },
    # DeepSeek-V2-Lite, 15.7 billion: the ablation shape of the V3 report.
    "v2-lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27, "intermediate_size": 10944,
        "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
        "max_position_embeddings": 163840, "rope_scaling": DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "bos_token_id": 100000, "eos_token_id": 100001, "pad_token_id": None,
    },
    # DeepSeek-V3 and R1, 671 billion and one prediction module of 11.6 billion.
    "v3-671b": {
        "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61, "intermediate_size": 18432,
        "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
        "max_position_embeddings": 163840, "rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "pad_token_id": None,
    },
}  # fmt: skip
