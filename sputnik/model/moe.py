"""Feed-forward blocks: the dense SwiGLU and DeepSeekMoE with bias-balanced routing (report section 2.1.2).

A routed token goes to K of E experts; one sort brings every expert's tokens together, and all experts run as two
grouped matrix products. Nothing is dropped. `loop_experts` is the same function written plainly, for the tests.
B batch, T tokens, N = B*T, D hidden, I expert width, E experts, K chosen, G groups.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sputnik.model.config import ModelConfig
from sputnik.model.kernels import fused
from sputnik.model.precision import Linear, compute_dtype, linear_fp32

BLOCK = 32


@dataclass(frozen=True)
class Route:
    """What one expert layer did in one pass."""

    layer: int
    experts: int
    chosen: Tensor  # (N, K) expert of each token, no order
    valid: Tensor | None  # (N,) bool: tokens that count; None: all
    balance_loss: Tensor | None  # scalar, sum_i f_i P_i (report 2.1.2, without alpha), mean of sequences; training only

    @property
    def load(self) -> Tensor:
        """(E,) fp32: tokens per expert."""
        chosen = self.chosen if self.valid is None else self.chosen[self.valid]
        return torch.bincount(chosen.flatten(), minlength=self.experts).float()


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, bias=False)
        self.up_proj = Linear(hidden, width, bias=False)
        self.down_proj = Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if fused.usable(x):
            gate, up, down = (each.weight for each in (self.gate_proj, self.up_proj, self.down_proj))
            if not fused.narrows(x):
                gate, up, down = gate.to(x.dtype), up.to(x.dtype), down.to(x.dtype)
            return fused.mlp(x.flatten(0, -2), gate, up, down).view_as(x)
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

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> scores (N, E) fp32, weights (N, K) fp32, chosen (N, K). `given` (N, K) overrules the choice where
        it is not negative; the weights are this gate's all the same."""
        logits = linear_fp32(x, self.weight)
        scores = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        chosen = self._choose(scores.detach())
        if given is not None:
            chosen = torch.where(given < 0, chosen, given)
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
        if fused.usable(x) and (x.dtype == torch.float32 or fused.narrows(x)):
            return fused.experts(x, weights, chosen, self.gate_up_proj.float(), self.down_proj.float())
        gate_up, down = self.gate_up_proj.to(x.dtype), self.down_proj.to(x.dtype)
        out: Tensor = _GroupedExperts.apply(x, weights.to(x.dtype), chosen, gate_up, down)  # type: ignore[no-untyped-call]
        return out


def loop_experts(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """`Experts.forward` one expert at a time."""
    out = torch.zeros_like(x)
    for index in range(experts.gate_up_proj.shape[0]):
        token, place = (chosen == index).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], experts.gate_up_proj[index].to(x.dtype)).chunk(2, dim=-1)
        act = F.silu(gate) * up * weights[token, place].to(x.dtype)[:, None]
        out = out.index_add(0, token, F.linear(act, experts.down_proj[index].to(x.dtype)).to(x.dtype))
    return out


class _GroupedExperts(torch.autograd.Function):
    """One sort brings each expert's tokens together; two grouped products run all experts.

    The gradient is written out for speed: autograd would add gathered rows one by one, scale at the hidden width rather
    than the expert width, and keep the (N*K, D) gathered tokens, which are gathered again here instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ends, row, order = _rows_of_experts(chosen, gate_up.shape[0])
        token, weight = order // chosen.shape[1], weights.flatten()[order]
        if row is not None:  # what is between the blocks are copies of the first token that weigh nothing
            rows = int(ends[-1])
            token = token.new_zeros(rows).index_copy_(0, row, token)
            weight = weight.new_zeros(rows).index_copy_(0, row, weight)
        slot = order.argsort().view_as(chosen)
        slot = slot if row is None else row[slot]
        inner = F.grouped_mm(x.index_select(0, token), gate_up.transpose(1, 2), offs=ends)
        gate, up = inner.chunk(2, dim=-1)
        act = F.silu(gate).mul_(up)
        ctx.save_for_backward(x, weight[:, None], gate_up, down, inner, act, token, slot, ends)
        return _sum_slots(F.grouped_mm(act, down.transpose(1, 2), offs=ends), slot, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        x, weight, gate_up, down, inner, act, token, slot, ends = ctx.saved_tensors
        grad_out = grad.index_select(0, token)
        grad_act = F.grouped_mm(grad_out, down, offs=ends)
        grad_weights = torch.linalg.vecdot(grad_act, act)[slot]
        grad_down = F.grouped_mm(grad_out.t(), act * weight, offs=ends)
        gate, up = inner.chunk(2, dim=-1)
        grad_act *= weight
        grad_inner = torch.empty_like(inner)
        grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
        torch.mul(grad_act, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=grad_gate)
        grad_gate_up = F.grouped_mm(grad_inner.t(), x.index_select(0, token), offs=ends)
        grad_x = _sum_slots(F.grouped_mm(grad_inner, gate_up, offs=ends), slot, None)
        return grad_x, grad_weights, None, grad_gate_up, grad_down


def _rows_of_experts(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(N, K) -> where the rows of each expert end (E,); the row of each of the N*K picks in the order of experts, None
    for one after another; that order.

    On a CPU each expert's rows begin at a multiple of `BLOCK`: oneDNN compiles bf16 products anew for every number of
    rows, 0.3 ms each where the product itself takes 0.05, and numbers of tokens hardly ever come twice."""
    ranked, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(ranked, torch.arange(experts, device=chosen.device), right=True, out_int32=True)
    if chosen.device.type != "cpu" or len(ranked) < 2 * BLOCK * experts:
        return ends, None, order
    counts = ends.diff(prepend=ends.new_zeros(1))
    blocks = (counts + BLOCK - 1) // BLOCK * BLOCK
    block_ends = blocks.cumsum(0, dtype=torch.int32)
    moved = (block_ends - blocks) - (ends - counts)
    return block_ends, torch.arange(len(ranked)) + moved[ranked], order


def _sum_slots(rows: Tensor, slot: Tensor, weights: Tensor | None) -> Tensor:
    """out[n] = sum_k weights[n, k] rows[slot[n, k]], without the (N, K, D) in between."""
    return F.embedding_bag(slot, rows, mode="sum", per_sample_weights=weights)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.layer, width = layer, config.moe_intermediate_size
        self.gate = Gate(config)
        self.experts = Experts(config.n_routed_experts, config.hidden_size, width)
        shared = config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, width * shared) if shared else None

    def forward(
        self, x_btd: Tensor, token_mask: Tensor | None, given: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Route]:
        """x (B, T, D) as the norm gave it; token_mask (B, T), False = not counted in load and balance; `given`
        (B, T, K): experts to replay (Gate); `segments` (S, 4): the sequences that x (1, N, D) holds."""
        scores, weights, chosen = self.gate(x_btd.flatten(0, 1), None if given is None else given.flatten(0, 1))
        x = x_btd.to(compute_dtype(self.experts.down_proj))
        routed = self.experts(x.flatten(0, 1), weights, chosen).view_as(x)
        out = routed if self.shared_experts is None else self.shared_experts(x) + routed
        valid = None if token_mask is None else token_mask.flatten()
        loss = None
        if self.training and segments is not None:
            loss = self._packed_balance_loss(scores, chosen, segments, valid)
        elif self.training:
            loss = self._balance_loss(scores, chosen, x.shape[0], valid)
        return out, Route(self.layer, scores.shape[1], chosen, valid, loss)

    def _balance_loss(self, scores: Tensor, chosen: Tensor, batch: int, valid: Tensor | None) -> Tensor:
        experts, picks = scores.shape[1], chosen.shape[1]
        valid_bt = (scores.new_ones(len(scores)) if valid is None else valid.to(scores.dtype)).view(batch, -1)
        length_b1 = valid_bt.sum(dim=1, keepdim=True).clamp(min=1)
        count_be = scores.new_zeros(batch, experts).scatter_add_(
            1, chosen.view(batch, -1), valid_bt.repeat_interleave(picks, dim=1)
        )
        f_be = count_be * experts / (picks * length_b1)
        p_bte = (scores / scores.sum(dim=-1, keepdim=True)).view(batch, -1, experts)
        p_be = (p_bte * valid_bt[:, :, None]).sum(dim=1) / length_b1
        return (f_be * p_be).sum(dim=-1).mean()

    def _packed_balance_loss(self, scores: Tensor, chosen: Tensor, segments: Tensor, valid: Tensor | None) -> Tensor:
        """The same for segments of a packed row, which follow one another."""
        experts, picks = scores.shape[1], chosen.shape[1]
        counted = scores.new_ones(len(scores)) if valid is None else valid.to(scores.dtype)
        owner = torch.arange(len(segments), device=scores.device).repeat_interleave(segments[:, 1])
        length_s1 = scores.new_zeros(len(segments)).index_add_(0, owner, counted).clamp_(min=1)[:, None]
        count_se = scores.new_zeros(len(segments) * experts).index_add_(
            0, (owner[:, None] * experts + chosen).flatten(), counted.repeat_interleave(picks)
        )
        f_se = count_se.view(-1, experts) * experts / (picks * length_s1)
        p_ne = scores / scores.sum(dim=-1, keepdim=True) * counted[:, None]
        p_se = scores.new_zeros(f_se.shape).index_add(0, owner, p_ne) / length_s1
        return (f_se * p_se).sum(dim=-1).mean()


@torch.no_grad()
def update_bias(gate: Gate, load: Tensor, speed: float) -> None:
    """After a step: raise the bias of experts below the mean load, lower it above. `load` (E,) counts the whole global
    batch of the step, over all micro-batches and processes; `speed` is gamma of section 2.1.2, 0.001 in the report."""
    bias = gate.e_score_correction_bias
    assert bias is not None, "only gates with topk_method noaux_tc are balanced by a bias"
    load = load.to(bias.dtype)
    bias += speed * (load.mean() - load).sign()
