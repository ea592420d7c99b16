"""Small models whose weights are far from neutral, so that a swapped half or a forgotten bias shows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer

DEEPSEEK: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "initializer_range": 0.15,
    "max_position_embeddings": 128,
}  # fmt: skip
DENSE: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "max_position_embeddings": 128,
}  # fmt: skip

Build = Callable[..., Transformer]


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    torch.manual_seed(0)


@pytest.fixture
def build() -> Build:
    """build("deepseek" or "dense", **changes) -> model in eval mode."""

    def make(family: str = "deepseek", **changes: Any) -> Transformer:
        sizes = {"deepseek": DEEPSEEK, "dense": DENSE}[family]
        generator = torch.Generator().manual_seed(0)
        model = Transformer(ModelConfig(**(sizes | changes))).init_weights(generator)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if "norm" in name or name.endswith("bias"):
                    tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
        return model.eval()

    return make
