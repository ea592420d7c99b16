"""Feed-forward blocks: the dense SwiGLU and DeepSeekMoE with bias-balanced routing (report section 2.1.2).

A routed token goes to K of E experts; every expert's tokens are brought together by one sort, and all experts run as two
grouped matrix products. Nothing is dropped. `loop_experts` is the same function written plainly, for the tests.
B batch, T tokens, N = B*T, D hidden, I expert width, E experts, K chosen, G groups.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sputnik.model.config import ModelConfig
from sputnik.model.precision import compute_dtype, linear_fp32


@dataclass(frozen=True)
class Route:
    """What one expert layer did in one pass."""

    layer: int
    chosen: Tensor  # (N, K) expert of each token, no order
    load: Tensor  # (E,) tokens per expert, without masked tokens
    balance_loss: Tensor | None  # scalar, mean over sequences of sum_i f_i P_i (section 2.1.2, without alpha); training only


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Affinity scores and the choice of experts. The bias takes part in the choice only, never in the weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor | None
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> scores (N, E) fp32, weights (N, K) fp32, chosen (N, K)."""
        logits = linear_fp32(x, self.weight)
        scores = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        chosen = self._choose(scores.detach())
        weights = scores.gather(1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return scores, weights * self.config.routed_scaling_factor, chosen

    def _choose(self, scores: Tensor) -> Tensor:
        c, bias = self.config, self.e_score_correction_bias
        if bias is not None:
            scores = scores + bias
        if c.topk_method != "greedy" and c.topk_group < c.n_group:
            grouped_ngm = scores.unflatten(1, (c.n_group, -1))
            if bias is not None:
                group_score = grouped_ngm.topk(2, dim=-1, sorted=False).values.sum(dim=-1)
            else:
                group_score = grouped_ngm.amax(dim=-1)
            kept = group_score.topk(c.topk_group, dim=-1, sorted=False).indices
            closed = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, kept, False)
            # -inf as in the published code: with 0.0 a closed group would beat an expert whose biased score is negative
            scores = grouped_ngm.masked_fill(closed[:, :, None], float("-inf")).flatten(1)
        return scores.topk(c.num_experts_per_tok, dim=-1, sorted=False).indices


class Experts(nn.Module):
    """All routed experts, stacked: rows of `gate_up_proj` are gate first, then up."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """sum over the K chosen of weight * expert(x): x (N, D), weights and chosen (N, K) -> (N, D)."""
        experts = torch.arange(self.gate_up_proj.shape[0], device=x.device)
        ranked, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(ranked, experts, right=True, out_int32=True)
        token, back = order // chosen.shape[1], order.argsort()
        inner = F.grouped_mm(_Spread.apply(x, token, back), self.gate_up_proj.to(x.dtype).transpose(1, 2), offs=ends)
        gate, up = inner.chunk(2, dim=-1)
        act = F.silu(gate) * up * weights.flatten()[order].to(x.dtype)[:, None]
        out = F.grouped_mm(act, self.down_proj.to(x.dtype).transpose(1, 2), offs=ends)
        return _Gather.apply(out, token, back, chosen.shape[1])  # type: ignore[no-any-return]


def loop_experts(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """`Experts.forward` one expert at a time."""
    out = torch.zeros_like(x)
    for index in range(experts.gate_up_proj.shape[0]):
        token, place = (chosen == index).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], experts.gate_up_proj[index].to(x.dtype)).chunk(2, dim=-1)
        act = F.silu(gate) * up * weights[token, place].to(x.dtype)[:, None]
        out = out.index_add(0, token, F.linear(act, experts.down_proj[index].to(x.dtype)).to(x.dtype))
    return out


class _Spread(torch.autograd.Function):
    """Rows of x (N, D) to their experts' order (N*K, D). Its transpose is `_Gather`: both directions are gathers, where
    autograd's own backward of indexing would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.tokens = x.shape[0]
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back).view(ctx.tokens, -1, grad.shape[1]).sum(1), None, None


class _Gather(torch.autograd.Function):
    """Expert-ordered rows (N*K, D) summed back to their tokens (N, D)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, back: Tensor, picks: int) -> Tensor:
        ctx.save_for_backward(token)
        return y.index_select(0, back).view(-1, picks, y.shape[1]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None, None


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.layer, width = layer, config.moe_intermediate_size
        self.gate = Gate(config)
        self.experts = Experts(config.n_routed_experts, config.hidden_size, width)
        self.shared_experts = MLP(config.hidden_size, width * config.n_shared_experts)

    def forward(self, x_btd: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Route]:
        """x (B, T, D) as the norm gave it; token_mask (B, T), False = not counted in load and balance."""
        scores, weights, chosen = self.gate(x_btd.flatten(0, 1))
        x = x_btd.to(compute_dtype(self.experts.down_proj))
        routed = self.experts(x.flatten(0, 1), weights, chosen).view_as(x)
        return self.shared_experts(x) + routed, self._route(scores, chosen, x.shape[0], token_mask)

    def _route(self, scores: Tensor, chosen: Tensor, batch: int, token_mask: Tensor | None) -> Route:
        experts, picks = scores.shape[1], chosen.shape[1]
        tokens = scores.shape[0] // batch
        valid_bt = scores.new_ones(batch, tokens) if token_mask is None else token_mask.to(scores.dtype)
        count_be = scores.new_zeros(batch, experts).scatter_add_(
            1, chosen.view(batch, -1), valid_bt.repeat_interleave(picks, dim=1)
        )
        loss = None
        if self.training:
            length_b1 = valid_bt.sum(dim=1, keepdim=True).clamp(min=1)
            share_be = count_be * experts / (picks * length_b1)
            p_bte = (scores / scores.sum(dim=-1, keepdim=True)).view(batch, tokens, experts)
            p_be = torch.einsum("bte,bt->be", p_bte, valid_bt) / length_b1
            loss = (share_be * p_be).sum(dim=-1).mean()
        return Route(self.layer, chosen, count_be.sum(dim=0), loss)


@torch.no_grad()
def update_bias(gate: Gate, load: Tensor, speed: float) -> None:
    """After a step: raise the bias of experts below the mean load, lower it above. `load` (E,) counts the whole global
    batch of the step, over all micro-batches and processes; `speed` is gamma of section 2.1.2, 0.001 in the report."""
    bias = gate.e_score_correction_bias
    assert bias is not None, "only gates with topk_method noaux_tc are balanced by a bias"
    load = load.to(bias.dtype)
    bias += speed * (load.mean() - load).sign()
