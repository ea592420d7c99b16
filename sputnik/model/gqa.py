"""Grouped-query attention of Llama, Qwen2 and SmolLM2: the architecture of the distilled dense models.

B batch, T tokens, S cached tokens, H query heads, G key heads, D head width.
"""

import torch
from torch import Tensor, nn

from sputnik.model.attention import Pass, attend
from sputnik.model.config import ModelConfig
from sputnik.model.kernels import fused
from sputnik.model.precision import Linear
from sputnik.model.rope import rotate_halves, softmax_scale


class GQA(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.key_heads = layer, config.num_attention_heads, config.num_key_value_heads
        width, hidden = config.gqa_head_dim, config.hidden_size
        bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = Linear(hidden, self.heads * width, bias=bias)
        self.k_proj = Linear(hidden, self.key_heads * width, bias=bias)
        self.v_proj = Linear(hidden, self.key_heads * width, bias=bias)
        self.o_proj = Linear(self.heads * width, hidden, bias=config.attention_bias)
        self.scale = softmax_scale(config)

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """x (B, T, hidden) in the compute type -> the same shape."""
        query = self.q_proj(x).unflatten(-1, (self.heads, -1))
        key_btgd = self.k_proj(x).unflatten(-1, (self.key_heads, -1))
        value_btgd = self.v_proj(x).unflatten(-1, (self.key_heads, -1))
        if now.cache is None and fused.usable(x):
            segments = fused.batch_segments(*x.shape[:2]) if now.segments is None else now.segments
            flat = (query.flatten(0, 1), key_btgd.flatten(0, 1), value_btgd.flatten(0, 1))
            return self.o_proj(fused.causal(*flat, now.turn[0], segments, self.scale).view(*x.shape[:2], -1))
        turn = now.turn[:, :, None]
        query = rotate_halves(query, turn).to(now.core)
        key_btgd = rotate_halves(key_btgd, turn).to(now.core)
        value_btgd = value_btgd.to(now.core)
        bias = None
        if now.cache is not None:
            fresh = torch.cat([key_btgd.flatten(2), value_btgd.flatten(2)], dim=-1)
            if now.plan is None:
                now.cache.fill(self.layer, fresh)
            else:
                row_bsw = now.cache.append(self.layer, fresh, now.plan)
                key_btgd, value_btgd = (half.unflatten(-1, (self.key_heads, -1)) for half in row_bsw.chunk(2, dim=-1))
                query, bias = query.to(row_bsw.dtype), now.plan.bias[:, None]
        out = attend(query.transpose(1, 2), key_btgd.transpose(1, 2), value_btgd.transpose(1, 2), self.scale, bias)
        return self.o_proj(out.transpose(1, 2).flatten(2).to(now.dtype))
