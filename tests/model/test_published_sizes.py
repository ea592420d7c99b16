"""The published models, built without memory: their parameter counts are those of the reports.

Report: 671B total, 37B activated; 11.5B of MTP weights of its own (README_WEIGHTS); 70,272 cache bytes per token in
bf16 (ISCA 2025 paper, table 1). V2-Lite: 15.7B total, 2.4B activated.
"""

import pytest
import torch

from sputnik.model.cache import Cache
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer


def build(name: str) -> Transformer:
    with torch.device("meta"):
        return Transformer(ModelConfig.preset(name))


def count(model: Transformer, prefix: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefix))


def active(model: Transformer) -> int:
    """Main-model parameters that touch one token: all but the routed experts it does not choose."""
    config = model.config
    total = count(model) - count(model, "mtp.")
    experts = sum(
        p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name and not name.startswith("mtp.")
    )
    assert config.n_routed_experts is not None
    return total - experts * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts


def test_v3_has_the_published_size() -> None:
    model = build("v3-671b")
    assert round((count(model) - count(model, "mtp.")) / 1e9, 2) == 671.03
    assert round(count(model, "mtp.") / 1e9, 2) == 11.61
    embedding = count(model, "model.embed_tokens.")
    assert embedding == count(model, "lm_head.") == 129280 * 7168
    assert round((count(model, "mtp.") + 2 * embedding) / 1e9, 2) == 13.46  # "14B" with what it shares
    assert round(active(model) / 1e9, 2) == 37.55
    assert round((active(model) - embedding) / 1e9, 2) == 36.63


def test_v2_lite_has_the_published_size() -> None:
    model = build("v2-lite")
    assert round(count(model) / 1e9, 1) == 15.7
    assert 2.4e9 < active(model) - count(model, "model.embed_tokens.") < 2.5e9


@pytest.mark.parametrize(("name", "expected"), [("v3-671b", 70_272), ("v2-lite", 27 * 576 * 2)])
def test_cache_bytes_per_token_are_the_published_ones(name: str, expected: int) -> None:
    assert Cache.empty(ModelConfig.preset(name), 1, 1, torch.bfloat16).bytes_per_token == expected
