"""Multi-head latent attention (report section 2.1.1), in the two forms that compute the same function.

Expanded, for training and prefill: latents are multiplied out to keys and values per head. Absorbed, for decoding: the up
projections move to the query and the output, and all heads attend to the cached latents themselves.
B batch, T tokens, S cached tokens, H heads, N nope, R rope, V value, C latent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sputnik.model.cache import Append, Cache
from sputnik.model.config import ModelConfig
from sputnik.model.precision import RMSNorm
from sputnik.model.rope import rotate_interleaved, softmax_scale


@dataclass(frozen=True)
class Pass:
    """What all attention layers of one forward pass share."""

    turn: Tensor  # complex rotations, (1 or B, T, R/2)
    dtype: torch.dtype  # of matrix products
    cache: Cache | None = None
    plan: Append | None = None  # None: training, or prefill into an empty cache


class MLA(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        hidden, self.heads, self.layer = config.hidden_size, config.num_attention_heads, layer
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.latent = config.v_head_dim, config.kv_lora_rank
        self.scale = softmax_scale(config)
        query_width = self.heads * (self.nope + self.rope)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.compressed_queries = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """x (B, T, D) in the compute type -> (B, T, D)."""
        q_bthn, q_bthr = self._queries(x, now)
        latent_btc, key_btr = self._latents(x, now)
        if now.cache is None:
            out = self.expanded(q_bthn, q_bthr, latent_btc, key_btr)
        elif now.plan is None:
            now.cache.fill(self.layer, torch.cat([latent_btc, key_btr], dim=-1))
            out = self.expanded(q_bthn, q_bthr, latent_btc, key_btr)
        else:
            row_bsw = now.cache.append(self.layer, torch.cat([latent_btc, key_btr], dim=-1), now.plan)
            out = self.absorbed(q_bthn, q_bthr, row_bsw, now.plan.mask)
        return self.o_proj(out)

    def _queries(self, x: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        if self.compressed_queries:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)).to(now.dtype))
        else:
            q = self.q_proj(x)
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], dim=-1)
        return q_nope, rotate_interleaved(q_rope, now.turn[:, :, None])

    def _latents(self, x: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Normed latent (B, T, C) and the one rotated key all heads share (B, T, R)."""
        latent, key = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], dim=-1)
        return self.kv_a_layernorm(latent).to(now.dtype), rotate_interleaved(key, now.turn)

    def expanded(self, q_bthn: Tensor, q_bthr: Tensor, latent_btc: Tensor, key_btr: Tensor) -> Tensor:
        """Causal attention over the pass's own tokens -> (B, T, H*V)."""
        k_nope, v_bthv = self.kv_b_proj(latent_btc).unflatten(-1, (self.heads, -1)).split([self.nope, self.value], dim=-1)
        query = torch.cat([q_bthn, q_bthr], dim=-1).transpose(1, 2)
        key = torch.cat([k_nope, key_btr[:, :, None].expand(-1, -1, self.heads, -1)], dim=-1).transpose(1, 2)
        # SDPA's CPU flash kernel wants equal widths of key and value.
        value = F.pad(v_bthv, (0, self.nope + self.rope - self.value)).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return out.transpose(1, 2)[..., : self.value].flatten(2)

    def absorbed(self, q_bthn: Tensor, q_bthr: Tensor, row_bsw: Tensor, mask: Tensor) -> Tensor:
        """Attention over cached rows [latent C | rope R]; mask (B, 1, T, S) -> (B, T, H*V)."""
        weight = self.kv_b_proj.weight.to(q_bthn.dtype).unflatten(0, (self.heads, -1))
        up_key_hnc, up_value_hvc = weight.split([self.nope, self.value], dim=1)
        query = torch.cat([torch.einsum("bthn,hnc->bhtc", q_bthn, up_key_hnc), q_bthr.transpose(1, 2)], dim=-1)
        rows = row_bsw.to(query.dtype)
        score_bhts = torch.einsum("bhtw,bsw->bhts", query, rows).float() * self.scale
        share_bhts = score_bhts.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(query.dtype)
        seen_bhtc = torch.einsum("bhts,bsc->bhtc", share_bhts, rows[..., : self.latent])
        return torch.einsum("bhtc,hvc->bthv", seen_bhtc, up_value_hvc).flatten(2)
