"""What all runners share: the flat batch, the paged cache, a layer's weights in the form kernels want.

A batch is flat: the tokens of all sequences behind one another, each with its position; sequence s owns tokens
[starts[s], starts[s + 1]) and the cache blocks in row s of `tables`.
N tokens, S sequences, R wanted rows, D hidden, W cached width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sputnik.model import kernels
from sputnik.model.config import ModelConfig
from sputnik.model.gqa import GQA
from sputnik.model.mla import LATENT_EPS, MLA
from sputnik.model.moe import MoE
from sputnik.model.transformer import DecoderLayer


@dataclass(frozen=True)
class FlatBatch:
    """What one step computes."""

    ids: Tensor  # (N,)
    positions: Tensor  # (N,)
    starts: Tensor  # (S + 1,)
    tables: Tensor  # (S, most blocks) int32
    wanted: Tensor  # (R,) indices of tokens whose hidden state is asked for

    @classmethod
    def of(cls, spans: Sequence[tuple[Sequence[int], int, Sequence[int]]], wanted: Sequence[int]) -> "FlatBatch":
        """From (token ids, position of the first, blocks) per sequence."""
        starts, positions, ids = [0], list[int](), list[int]()
        for tokens, first, _ in spans:
            ids.extend(tokens)
            positions.extend(range(first, first + len(tokens)))
            starts.append(len(ids))
        width = max(len(blocks) for _, _, blocks in spans)
        tables = torch.tensor([[*blocks, *[0] * (width - len(blocks))] for _, _, blocks in spans], dtype=torch.int32)
        rows = torch.tensor(wanted, dtype=torch.long)
        return cls(torch.tensor(ids), torch.tensor(positions), torch.tensor(starts), tables, rows)


class Runner(Protocol):
    """All runners. Cache contents belong to the runner; who may use which block is the scheduler's business."""

    caches: list[Tensor]
    """Per layer (blocks, size, W)."""

    def forward(self, batch: FlatBatch) -> Tensor:
        """Write the batch's tokens to the cache and return (R, D) fp32 hidden states after the final norm."""

    def head(self, hidden: Tensor, keep: bool = True) -> Tensor:
        """(R, D) -> fp32 logits (R, V). Not to `keep`: the next call may write over them, which saves fresh pages."""

    def ahead(self, batch: FlatBatch, next_ids: Tensor, module: int = 0, hidden: Tensor | None = None) -> Tensor:
        """Prediction module `module` on the batch: (R, D) hidden states whose head predicts the token after `next_ids`.

        `next_ids` (N,) follow the batch's ids. `hidden` (N, D) are the states of the module before; None: those of the
        last `forward`, which was of this very batch."""

    def routes(self) -> Tensor | None:
        """Experts of the last `forward`, (expert layers, N, K); None without expert layers."""

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, source to destination."""

    def refresh(self) -> None:
        """Take over the model's weights as they are now."""

    def release(self) -> None:
        """The model is for running alone: let go of weights that exist twice. No `refresh` afterwards."""


def new_caches(
    config: ModelConfig, blocks: int, size: int, precision: str, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Per layer, the prediction modules' included, (blocks, size, W)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    shape = blocks, size, config.cache_width
    if torch.device(device).type == "cpu" and kernels.load():
        return [torch.ops.sputnik.huge_zeros(shape, dtype) for _ in range(layers)]
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]


def copy_blocks(caches: list[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    if pairs:
        source, target = (torch.tensor(side) for side in zip(*pairs, strict=True))
        for cache in caches:
            cache[target] = cache[source]


def layer_weights(layer: DecoderLayer) -> dict[str, Tensor]:
    """One layer as runner.cpp takes it: projections of the same input stacked, kv_b split by head."""
    found: dict[str, Any] = {"norm1": layer.input_layernorm.weight, "norm2": layer.post_attention_layernorm.weight}
    attention, ffn = layer.self_attn, layer.mlp
    eps = layer.input_layernorm.eps
    found |= _mla_weights(attention, eps) if isinstance(attention, MLA) else _gqa_weights(attention)
    if isinstance(ffn, MoE):
        found["router"], found["router_bias"] = ffn.gate.weight, ffn.gate.e_score_correction_bias
        found["expert_gate_up"], found["expert_down"] = ffn.experts.gate_up_proj, ffn.experts.down_proj
    dense = ffn.shared_experts if isinstance(ffn, MoE) else ffn
    if dense is not None:
        found["gate_up"] = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
        found["down"] = dense.down_proj.weight
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def _gqa_weights(a: GQA) -> dict[str, Tensor | None]:
    parts = (a.q_proj, a.k_proj, a.v_proj)
    bias = None if a.q_proj.bias is None else torch.cat([part.bias for part in parts])
    return {
        "qkv": torch.cat([part.weight for part in parts]), "qkv_bias": bias, "out": a.o_proj.weight,
        "out_bias": a.o_proj.bias,
    }  # fmt: skip


def _mla_weights(a: MLA, eps: float) -> dict[str, Tensor | None]:
    """Runners know one epsilon, `eps`. A norm with another is that norm of inputs scaled by the root of their ratio."""
    first = a.q_a_proj.weight if a.compressed_queries else a.q_proj.weight
    latent, key = a.kv_a_proj_with_mqa.weight.split([a.latent, a.rope])
    if eps != LATENT_EPS:
        scale = (eps / LATENT_EPS) ** 0.5
        first, latent = first.float() * scale if a.compressed_queries else first, latent.float() * scale
    up_hxc = a.kv_b_proj.weight.view(a.heads, a.nope + a.value, a.latent)
    found: dict[str, Tensor | None] = {
        "qkv": torch.cat([first, latent, key]), "kv_norm": a.kv_a_layernorm.weight,
        "kv_b": a.kv_b_proj.weight, "up_key": up_hxc[:, : a.nope].transpose(1, 2), "up_value": up_hxc[:, a.nope :],
        "out": a.o_proj.weight,
    }  # fmt: skip
    if a.compressed_queries:
        found |= {"q_norm": a.q_a_layernorm.weight, "q_b": a.q_b_proj.weight}
    return found
