"""The model: embedding, decoder layers, final norm, head and multi-token prediction modules.

`model(ids)` gives logits; training and sampling use `trunk` (hidden states, no head) and `model.head` or
`sputnik.model.head` on the positions they need. Parameters have Hugging Face's names, except the stacked experts and
`mtp.*`.
B batch, T tokens, D hidden, V vocabulary.
"""

import copy
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from sputnik.model.attention import Pass
from sputnik.model.cache import Cache
from sputnik.model.config import ModelConfig
from sputnik.model.gqa import GQA
from sputnik.model.head import logits
from sputnik.model.kernels import fused
from sputnik.model.mla import MLA
from sputnik.model.moe import MLP, Experts, Gate, MoE, Route
from sputnik.model.mtp import MTPModule
from sputnik.model.precision import RMSNorm, compute_dtype
from sputnik.model.rope import Rope


@dataclass(frozen=True)
class Trunk:
    hidden: Tensor  # (B, T, D) after the final norm: what the head reads
    residual: Tensor  # (B, T, D) before it: what `mtp_hidden` reads
    routes: list[Route]  # one per expert layer


@dataclass(frozen=True)
class Ahead:
    """Depth k = 1, 2, ...: `hidden[k - 1]` is (B, T - k, D); its position i predicts token i + k + 1."""

    hidden: list[Tensor]
    routes: list[Route]


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, layer) if config.is_mla else GQA(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        moe = config.is_moe_layer(layer)
        self.mlp = MoE(config, layer) if moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, now: Pass, token_mask: Tensor | None) -> tuple[Tensor, Route | None]:
        seen = self.self_attn(self.input_layernorm(x, now.dtype), now)
        if isinstance(self.mlp, MoE):
            x, inner = self.post_attention_layernorm.after_adding(x, seen)
            out, route = self.mlp(inner, token_mask, now.routes.get(self.mlp.layer), now.segments)
            return x + out, route
        x, inner = self.post_attention_layernorm.after_adding(x, seen, now.dtype)
        return x + self.mlp(inner), None


class Decoder(nn.Module):
    """The part Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        depths = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        self.mtp = nn.ModuleList(MTPModule(config, DecoderLayer(config, layer)) for layer in depths)
        self.rope = Rope(config)

    def forward(self, ids: Tensor, cache: Cache | None = None, lengths: Tensor | None = None) -> Tensor:
        """(B, T) -> fp32 logits (B, T, V)."""
        return self.head(self.trunk(ids, cache, lengths=lengths).hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) after the final norm -> fp32 logits (..., V)."""
        return logits(hidden, self.lm_head.weight)

    def trunk(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        token_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        routes: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Trunk:
        """All layers. With a cache the tokens extend its rows. `lengths` (B,) says how many of the T are valid per row
        (None: all); the rest is right padding, whose outputs mean nothing. `token_mask` (B, T): False tokens are left
        out of expert load and balance loss; it changes no output. `routes` (expert layers, B, T, K) replays experts
        chosen elsewhere, by the sampler for instance; -1 where the gate is to choose for itself. `segments` (S, 4): ids
        (1, N) hold many sequences (`kernels.fused`, whose attention alone knows how)."""
        tokens = ids.shape[1]
        if token_mask is None and lengths is not None:
            token_mask = torch.arange(tokens, device=ids.device) < lengths[:, None]
        assert cache is None or segments is None
        now = self._pass(tokens, ids.device, cache) if segments is None else self._packed_pass(segments)
        if routes is not None:
            now = replace(now, routes=dict(zip(self._expert_layers(), routes, strict=True)))
        x, taken = self.model.embed_tokens(ids), []
        for layer in self.model.layers:
            x, route = layer(x, now, token_mask)
            if route is not None:
                taken.append(route)
        if cache is not None:
            cache.advance(tokens, lengths)
        return Trunk(self.model.norm(x), x, taken)

    def _expert_layers(self) -> list[int]:
        return [layer for layer in range(self.config.num_hidden_layers) if self.config.is_moe_layer(layer)]

    def mtp_hidden(
        self, residual: Tensor, ids: Tensor, token_mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Ahead:
        """Run the prediction modules on `Trunk.residual` (B, T, D) of the same ids (B, T). A depth gets the output of
        the one before after its norm (depth 1: the main model's), as serving engines feed the released weights. With
        `segments` of `trunk`, none of them a prefix, depth k gives all N rows; the last k of each segment mean nothing,
        and no load counts them."""
        ahead = Ahead([], [])
        hidden = self.model.norm(residual)
        for k, module in enumerate(self.mtp, start=1):
            if segments is None:
                length = ids.shape[1] - k
                now, further, hidden = self._pass(length, ids.device, None), ids[:, k:], hidden[:, :length]
                mask = None if token_mask is None else token_mask[:, k:]
            else:
                now, further = self._packed_pass(segments), ids.roll(-k, dims=1)
                mask = _all_but_last(segments, k)[None]
            hidden, route = module(self.model.embed_tokens(further), hidden, now, mask)
            ahead.hidden.append(hidden)
            if route is not None:
                ahead.routes.append(route)
        return ahead

    def _packed_pass(self, segments: Tensor) -> Pass:
        longest = int((segments[:, 1] + segments[:, 3]).max())
        now = self._pass(longest, segments.device, None)
        assert fused.usable(now.turn.real), "packed sequences need the training kernels"
        return replace(now, segments=segments)

    def _pass(self, tokens: int, device: torch.device, cache: Cache | None) -> Pass:
        dtype = compute_dtype(cast(DecoderLayer, self.model.layers[0]).self_attn.o_proj.weight)
        plan = None if cache is None else cache.plan(tokens)
        if plan is None:
            return Pass(self.rope.table(tokens, device)[None], dtype, cache)
        return Pass(self.rope.table(plan.visible, device)[plan.positions], dtype, cache, plan)

    def gates(self) -> dict[int, Gate]:
        """Layer index (as in `Route.layer`) -> gate, prediction modules included."""
        return {m.layer: m.gate for m in self.modules() if isinstance(m, MoE)}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> "Transformer":
        """Normal(0, initializer_range) for matrices, ones for norms, zeros for biases; depends on `generator` alone."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Gate):
                module.weight.normal_(0.0, std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, Experts):
                module.gate_up_proj.normal_(0.0, std, generator=generator)
                module.down_proj.normal_(0.0, std, generator=generator)
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            if isinstance(module, Gate) and module.e_score_correction_bias is not None:
                module.e_score_correction_bias.zero_()
        return self

    @torch.no_grad()
    def lowered(self, dtype: torch.dtype) -> "Transformer":
        """A frozen copy for sampling whose matrix weights have type `dtype`: the numbers of autocast without its casts.
        Embedding, head, norms and gates are shared with this model, not copied. Remake it after an optimizer step."""
        memo: dict[int, object] = {id(self.rope): self.rope}
        memo |= {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        for name, module in self.named_modules():
            if isinstance(module, Experts) or (isinstance(module, nn.Linear) and module is not self.lm_head):
                for weight in module.parameters(recurse=False):
                    rounded = weight.to(dtype)
                    if name.endswith("kv_b_proj"):  # read as fp32 by every absorbed step
                        rounded = rounded.float()
                    memo[id(weight)] = nn.Parameter(rounded, requires_grad=False)
        return copy.deepcopy(self, memo).eval()


def _all_but_last(segments: Tensor, count: int) -> Tensor:
    """(N,) False on the last `count` rows of each segment."""
    starts, lengths = segments[:, 0], segments[:, 1]
    mask = torch.ones(int(lengths.sum()), dtype=torch.bool, device=segments.device)
    for back in range(1, count + 1):
        mask[(starts + lengths - back)[lengths >= back]] = False
    return mask
