"""Sizes: round trips through config.json, old and new keys, and one-line refusals."""

import math
from typing import Any

import pytest
import torch

from sputnik.errors import CheckpointError, ConfigError, SputnikError
from sputnik.model.config import PRESETS, ModelConfig
from sputnik.model.transformer import Transformer

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000, "rope_scaling": None,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 131072, "rope_theta": 10000, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
    "bos_token_id": 151643, "eos_token_id": [151643, 151645], "sliding_window": 4096, "use_sliding_window": False,
    "max_window_layers": 21,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_round_trip_is_exact(name: str) -> None:
    config = ModelConfig.preset(name)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("published", [SMOLLM2, QWEN2])
def test_dense_round_trip_is_exact(published: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(published)
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert not config.is_mla and config.num_key_value_heads == published["num_key_value_heads"]


def test_all_of_several_end_tokens_are_kept() -> None:
    config = ModelConfig.from_hf(QWEN2)
    assert config.end_ids == (151643, 151645) and list(config.to_hf()["eos_token_id"]) == QWEN2["eos_token_id"]
    assert ModelConfig.from_hf(QWEN2 | {"eos_token_id": 7}).end_ids == (7,)
    assert ModelConfig.from_hf(QWEN2 | {"eos_token_id": None}).end_ids == ()


def test_new_and_old_rope_keys_mean_the_same() -> None:
    scaling = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    base = {k: v for k, v in ModelConfig.preset("mini").to_hf().items() if k not in ("rope_theta", "rope_scaling")}
    old = ModelConfig.from_hf(base | {"rope_theta": 5e4, "rope_scaling": {"type": "yarn"} | scaling})
    new = ModelConfig.from_hf(base | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4} | scaling})
    assert old == new and old.rope_theta == 5e4 and old.rope_scaling == {"rope_type": "yarn"} | scaling
    plain = ModelConfig.from_hf(base | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}})
    assert plain.rope_scaling is None and plain.rope_theta == 5e4


def test_what_transformers_leaves_out_of_v3_is_the_v3_gate() -> None:
    published = ModelConfig.preset("mini").to_hf()
    sparse = {k: v for k, v in published.items() if k not in ("scoring_func", "topk_method", "norm_topk_prob")}
    config = ModelConfig.from_hf(sparse)
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("sigmoid", "noaux_tc", True)


def test_missing_fields_of_v3_mean_what_they_mean_in_transformers() -> None:
    unsaid = ("n_group", "topk_group", "num_experts_per_tok", "routed_scaling_factor", "first_k_dense_replace")
    sparse = {k: v for k, v in ModelConfig.preset("v3-671b").to_hf().items() if k not in unsaid}
    config = ModelConfig.from_hf(sparse)
    assert tuple(getattr(config, name) for name in unsaid) == (8, 4, 8, 2.5, 3)
    assert ModelConfig.from_hf(sparse | {"num_hidden_layers": 2}).first_k_dense_replace == 2


def test_the_original_length_is_found_where_transformers_looks_for_it() -> None:
    def length(**fields: Any) -> int:
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        config = ModelConfig.from_hf(QWEN2 | {"rope_scaling": scaling} | fields)
        assert config.rope_scaling is not None
        return int(config.rope_scaling["original_max_position_embeddings"])

    assert length() == 64 and length(original_max_position_embeddings=32) == 32
    assert length(rope_scaling={"type": "yarn", "factor": 4.0}) == QWEN2["max_position_embeddings"]
    assert length(rope_parameters={"rope_type": "yarn", "factor": 2.0}) == 64, "the old key wins where both are"


def test_written_config_tells_engines_what_they_need() -> None:
    written = ModelConfig.preset("v3-671b").to_hf()
    expected = {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1, "num_nextn_predict_layers": 1, "n_group": 8,
    }  # fmt: skip
    assert {key: written[key] for key in expected} == expected
    assert "quantization_config" not in written and "head_dim" not in written


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"n_group": 3}, "n_routed_experts 16 must be a multiple of n_group 3"),
        ({"num_experts_per_tok": 9}, "must lie in 1..8"),
        ({"topk_group": 5}, "topk_group 5 must lie in 1..n_group = 4"),
        ({"n_group": 16, "topk_group": 8}, "lower n_group 16 to 8"),
        ({"qk_rope_head_dim": 15}, "RoPE width 15 must be even"),
        ({"num_key_value_heads": 4}, "set num_key_value_heads to 8"),
        ({"v_head_dim": 128}, "v_head_dim 128 must not exceed"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"model_type": "gpt2"}, "use one of"),
        ({"model_type": "llama"}, "set kv_lora_rank to None"),
        ({"kv_lora_rank": None}, "set kv_lora_rank"),
        ({"attention_bias": True}, "set it to false"),
        ({"first_k_dense_replace": 9}, "0..num_hidden_layers"),
        ({"scoring_func": "relu"}, "use sigmoid or softmax"),
        ({"topk_method": "best"}, "noaux_tc"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not computed here"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "needs a positive original_max_position_embeddings"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64, "beta": 1}},
            "no key 'beta'",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": 64,
                    "beta_fast": "x",
                }
            },
            "needs a positive beta_fast, not 'x'",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2,
                    "original_max_position_embeddings": 64,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "low_freq_factor < high_freq_factor",
        ),
        ({"rope_theta": 0.0}, "rope_theta = 0.0: must be above 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: must be a number"),
        ({"qk_nope_head_dim": 31}, "qk_nope_head_dim = 31: must be even"),
        ({"kv_lora_rank": 31}, "kv_lora_rank = 31: must be even"),
        ({"hiden_size": 64}, "unknown model field 'hiden_size'"),
    ],
)
def test_impossible_sizes_are_one_line_with_the_fix(changes: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.preset("mini", **changes)
    assert fix in str(caught.value) and "\n" not in str(caught.value)


def test_heads_must_divide_among_key_heads() -> None:
    with pytest.raises(ConfigError, match="multiple of num_key_value_heads"):
        ModelConfig(model_type="llama", num_attention_heads=4, num_key_value_heads=3)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="tiny, dense, mini"):
        ModelConfig.preset("huge")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "llama", "sliding_window": 64}, "sliding_window"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_type None is not computed here"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}}, "rope_type None is not computed here"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"model_type": "mamba"}, "mamba"),
    ],
)
def test_a_function_we_do_not_compute_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=named):
        ModelConfig.from_hf(QWEN2 | changes)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("mini", {"scoring_func": "softmax"}),
        ("mini", {"topk_method": "greedy"}),
        ("v2-lite", {"norm_topk_prob": True}),
    ],
)
def test_gates_that_transformers_would_take_for_others_are_neither_read_nor_written(
    preset: str, changes: dict[str, Any]
) -> None:
    config = ModelConfig.preset(preset)
    named = f"a {config.model_type} model has no {next(iter(changes))}"
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_hf(config.to_hf() | changes)
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.preset(preset, **changes).to_hf()


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "mscale_all_dim": 1.0}


@pytest.mark.parametrize("name", ["tiny", "dense"])
@pytest.mark.parametrize("value", ["x", [1, 2], {"a": 1}, -1, 0, 10**9, 10**30, True, 1.5, math.nan, None], ids=repr)
def test_whatever_a_config_json_says_is_a_model_or_one_line(name: str, value: Any) -> None:
    """No field with an absurd value is a traceback, or a loop without end."""
    whole = ModelConfig.preset(name).to_hf()
    if name == "tiny":
        whole |= {"rope_scaling": YARN}
    cases = [whole | {key: value} for key in whole]
    cases += [whole | {"rope_scaling": YARN | {key: value}} for key in YARN]
    for case in cases:
        try:
            config = ModelConfig.from_hf(case)
        except SputnikError as error:
            assert "\n" not in str(error)
        else:
            with torch.device("meta"):
                Transformer(config)
            config.to_hf()
