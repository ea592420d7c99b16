"""Multi-head latent attention (report section 2.1.1), in the two forms that compute the same function.

Expanded, for training and prefill: latents are multiplied out to keys and values per head. Absorbed, for decoding: the
up projections move to the query and the output, and all heads attend to the cached latents themselves.
B batch, T tokens, S cached tokens, H heads, N nope, R rope, Q = N + R, V value, C latent, W = C + R.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sputnik.model.attention import Pass, attend
from sputnik.model.config import ModelConfig
from sputnik.model.kernels import fused
from sputnik.model.precision import Linear, RMSNorm, linear
from sputnik.model.rope import rotate_interleaved, rotate_tail_, softmax_scale

LATENT_EPS = 1e-6  # of the latents' norms in DeepSeek's code, whatever rms_norm_eps says


class MLA(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        hidden, self.heads, self.layer = config.hidden_size, config.num_attention_heads, layer
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.latent = config.v_head_dim, config.kv_lora_rank
        self.scale = softmax_scale(config)
        query_width = self.heads * (self.nope + self.rope)
        self.compressed_queries = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, query_width, bias=False)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_EPS)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = Linear(self.heads * self.value, hidden, bias=False)

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """x (B, T, D) in the compute type -> (B, T, D)."""
        if now.cache is None and fused.usable(x):
            return self.o_proj(self._fused(x, now))
        q_bthq = self._rotated(self._queries(x, now), now)
        latent_btc, key_btr = self._latents(x, now)
        if now.cache is None:
            out = self.expanded(q_bthq, latent_btc, key_btr, now)
        elif now.plan is None:
            now.cache.fill(self.layer, torch.cat([latent_btc, key_btr], dim=-1))
            out = self.expanded(q_bthq, latent_btc, key_btr, now)
        else:
            row_bsw = now.cache.append(self.layer, torch.cat([latent_btc, key_btr], dim=-1), now.plan)
            out = self.absorbed(q_bthq, row_bsw, now.plan.bias)
        return self.o_proj(out.to(now.dtype))

    def _queries(self, x: Tensor, now: Pass) -> Tensor:
        """(B, T, H, Q), not yet rotated."""
        if self.compressed_queries:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x), now.dtype))
        else:
            q = self.q_proj(x)
        return q.view(*q.shape[:2], self.heads, -1)

    def _rotated(self, q_bthq: Tensor, now: Pass) -> Tensor:
        """In the core type, the last R rotated."""
        if not torch.is_grad_enabled():
            return rotate_tail_(q_bthq.float(), now.turn[:, :, None]).to(now.core)
        return _RotateTail.apply(q_bthq, now.turn[:, :, None], now.core)  # type: ignore[no-untyped-call]

    def _latents(self, x: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Normed latent (B, T, C), and the one rotated key all heads share (B, T, R), both fp32."""
        latent, key = torch.split(self.kv_a_proj_with_mqa(x), [self.latent, self.rope], dim=-1)
        return self.kv_a_layernorm(latent), rotate_interleaved(key, now.turn)

    def _fused(self, x: Tensor, now: Pass) -> Tensor:
        """`expanded` and all rotations in one kernel: nothing is copied or padded for it."""
        latent, key = torch.split(self.kv_a_proj_with_mqa(x), [self.latent, self.rope], dim=-1)
        up = self.raised(self.kv_a_layernorm(latent, now.dtype), now)
        segments = fused.batch_segments(*x.shape[:2]) if now.segments is None else now.segments
        q_nhq, up_nhx, key_nr = self._queries(x, now).flatten(0, 1), up.flatten(0, 1), key.flatten(0, 1)
        return fused.causal_latent(q_nhq, up_nhx, key_nr, now.turn[0], segments, self.scale).view(*x.shape[:2], -1)

    def raised(self, latent_btc: Tensor, now: Pass) -> Tensor:
        """Unrotated keys and values of all heads, (B, T, H, N + V)."""
        # The weight is fp32 in a `lowered` copy, for `absorbed`.
        return linear(latent_btc.to(now.dtype), self.kv_b_proj.weight).unflatten(-1, (self.heads, -1))

    def expanded(self, q_bthq: Tensor, latent_btc: Tensor, key_btr: Tensor, now: Pass) -> Tensor:
        """Causal attention over the pass's own tokens -> (B, T, H*V)."""
        up_bthx = self.raised(latent_btc, now)
        k_bthq, v_bthq = _KeysValues.apply(up_bthx, key_btr.to(now.core), self.nope)  # type: ignore[no-untyped-call]
        out = attend(q_bthq.transpose(1, 2), k_bthq.transpose(1, 2), v_bthq.transpose(1, 2), self.scale)
        return out.transpose(1, 2)[..., : self.value].flatten(2)

    def absorbed(self, q_bthq: Tensor, row_bsw: Tensor, bias_bts: Tensor) -> Tensor:
        """Attention over cached rows [latent C | rope R]; bias (B, T, S) is 0 or -inf -> (B, T, H*V)."""
        batch, tokens = q_bthq.shape[:2]
        weight = self.kv_b_proj.weight.to(q_bthq.dtype).view(self.heads, self.nope + self.value, self.latent)
        up_key_hnc, up_value_hvc = weight[:, : self.nope], weight[:, self.nope :]
        q_hxq = q_bthq.flatten(0, 1).transpose(0, 1)  # x = B*T
        with torch.autocast(q_bthq.device.type, enabled=False):
            query_hxw = torch.cat([torch.bmm(q_hxq[..., : self.nope], up_key_hnc), q_hxq[..., self.nope :]], dim=-1)
            # One key head for all queries: the heads stand in line as further query rows, (B, 1, T*H, W).
            query = query_hxw.transpose(0, 1).reshape(batch, 1, tokens * self.heads, -1).to(row_bsw.dtype)
            bias = bias_bts if tokens == 1 else bias_bts.repeat_interleave(self.heads, dim=1)
            row = row_bsw[:, None]
            seen = attend(query, row, row, self.scale, bias[:, None])[..., : self.latent].to(q_bthq.dtype)
            seen_hxc = seen.view(batch * tokens, self.heads, -1).transpose(0, 1)
            out_hxv = torch.bmm(seen_hxc, up_value_hvc.transpose(1, 2))
        return out_hxv.transpose(0, 1).reshape(batch, tokens, -1)


class _RotateTail(torch.autograd.Function):
    """Query heads with their last R values rotated: one copy forward, one backward."""

    @staticmethod
    def forward(ctx: Any, q_bthq: Tensor, turn: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(turn)
        ctx.dtype = q_bthq.dtype
        return rotate_tail_(q_bthq.to(torch.float32, copy=True), turn).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (turn,) = ctx.saved_tensors
        back = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return rotate_tail_(back, turn.conj()).to(ctx.dtype), None, None


class _KeysValues(torch.autograd.Function):
    """Up-projected latents (B, T, H, N+V) and the shared key (B, T, R) -> keys [nope | shared], values [value | zeros].

    Both are (B, T, H, Q) of the shared key's type: SDPA's flash kernels want equal widths, else all T x T scores are
    held in memory."""

    @staticmethod
    def forward(ctx: Any, up_bthx: Tensor, key_btr: Tensor, nope: int) -> tuple[Tensor, Tensor]:
        rope, value = key_btr.shape[-1], up_bthx.shape[-1] - nope
        ctx.nope, ctx.value, ctx.dtype = nope, value, up_bthx.dtype
        key = key_btr.new_empty(*up_bthx.shape[:-1], nope + rope)
        key[..., :nope] = up_bthx[..., :nope]
        key[..., nope:] = key_btr[:, :, None]
        values = torch.zeros_like(key)
        values[..., :value] = up_bthx[..., nope:]
        return key, values

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor, None]:
        nope, value = ctx.nope, ctx.value
        grad_up = grad_key.new_empty(*grad_key.shape[:-1], nope + value, dtype=ctx.dtype)
        grad_up[..., :nope] = grad_key[..., :nope]
        grad_up[..., nope:] = grad_value[..., :value]
        return grad_up, grad_key[..., nope:].sum(2), None
