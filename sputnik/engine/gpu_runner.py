"""The runner of a model that lies on a GPU: flat batches through the kernels of model/gpu, decode steps as CUDA graphs.

    runner = GpuRunner(model, blocks=100_000, size=16, precision="bf16", weights=None)

Seen from here a batch is rows: a token, its position, the pages of its sequence. Steps without long spans (decoding,
checking guesses) are padded to the next power of two rows and replayed from a graph, captured when a size first comes;
padding writes to a block of its own. A long span, which is a chunk of a prompt, runs eagerly and attends through
torch's fused kernel, with latents multiplied out.

The numbers are tested on the CPU through the twins of the kernels and in Triton's interpreter. Unmeasured on a GPU:
neither speed nor the capture of graphs has been tried on one. Left out: several GPUs, graphs of the prediction modules
and of prompts, experts in FP8, the reproducible mode.
N tokens, R wanted rows, D hidden, P pages, H heads, C latent, Q query width, S visible slots, W cached width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from sputnik.engine.flat import FlatBatch, copy_blocks, layer_weights, new_caches
from sputnik.model.attention import attend
from sputnik.model.gpu.attention import paged_attention
from sputnik.model.gpu.experts import grouped_experts
from sputnik.model.gpu.fp8 import Fp8Matrix
from sputnik.model.gpu.layout import Layout
from sputnik.model.moe import MoE
from sputnik.model.mtp import MTPModule
from sputnik.model.rope import rotate_halves, rotate_interleaved, rotate_tail_, softmax_scale
from sputnik.model.transformer import DecoderLayer, Transformer

LONG = 8
"""Spans of more tokens than this are attended to as a whole, shorter ones row by row."""
MOST_ROWS = 512
"""The largest step that gets a graph."""
FP8 = ("qkv", "q_b", "out", "gate_up", "down")
NOT_HERE = ("router", "router_bias", "up_key", "up_value")  # the gate has the first two, kv_b is the others
Matrix = Tensor | Fp8Matrix


@dataclass(frozen=True)
class Rows:
    """One step, token by token. All tensors on the model's device."""

    ids: Tensor  # (N,)
    positions: Tensor  # (N,)
    tables: Tensor  # (N, P) int32
    spans: tuple[tuple[int, int, int], ...] = ()
    """Long spans: first row, row after the last, visible slots."""
    short: Tensor | slice = field(default_factory=lambda: slice(None))
    """Rows outside of them."""

    @classmethod
    def of(cls, batch: FlatBatch, device: torch.device) -> "Rows":
        counts = batch.starts.diff()
        tables = batch.tables.repeat_interleave(counts, dim=0)
        spans = tuple(
            (start, end, int(batch.positions[end - 1]) + 1)
            for start, end in pairwise(batch.starts.tolist())
            if end - start > LONG
        )
        rows = batch.ids.to(device), batch.positions.to(device), tables.to(device)
        if not spans:
            return cls(*rows)
        return cls(*rows, spans, (counts <= LONG).repeat_interleave(counts).nonzero()[:, 0].to(device))

    def slots(self, size: int) -> Tensor:
        """(N,) places in the cache seen as one list of slots."""
        block = self.tables.gather(1, (self.positions // size)[:, None])[:, 0]
        return block * size + self.positions % size


class GpuRunner:
    """Works on any device: off the GPU the kernels are their twins, and nothing is captured."""

    def __init__(self, model: Transformer, blocks: int, size: int, precision: str, weights: str | None) -> None:
        self.model, self.config, self.fp8 = model, model.config, weights == "fp8"
        self.device = model.lm_head.weight.device
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.caches = new_caches(model.config, blocks + 1, size, precision, self.device)
        self.size, self.spare = size, blocks  # a block more than asked for
        self.pages = -(-model.config.max_position_embeddings // size) + 1
        self.layout, self.scale = Layout.of(model.config), softmax_scale(model.config)
        self.turns = model.rope.table(self.pages * size, self.device)
        self.blocks = [cast(DecoderLayer, each) for each in model.model.layers]
        self.blocks += [cast(DecoderLayer, each.block) for each in model.mtp]
        self.weights: list[dict[str, Matrix]] = []
        self.steps: dict[int, _Step] = {}
        self.pool: Any = None  # one for the memory of all graphs, which never run at the same time
        self.residual, self.taken = torch.empty(0), list[Tensor]()  # of the last forward, the latter by expert layer
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """In place from the second time on: captured graphs read the weights where they lie."""
        if not self.weights:
            self.weights = [
                {name: self._packed(name, weight) for name, weight in _used_weights(block)} for block in self.blocks
            ]
            return
        for held, block in zip(self.weights, self.blocks, strict=True):
            for name, weight in _used_weights(block):
                held[name].copy_(weight)

    def release(self) -> None:
        """Nothing: gates, embedding, head and norms are read from the model, and tensors of its own type not copied."""

    def _packed(self, name: str, weight: Tensor) -> Matrix:
        """Matrices in the type of products, norms in fp32; the model's own tensor where that is what it has."""
        if self.fp8 and name in FP8:
            return Fp8Matrix.of(weight)
        return weight.to(self.dtype if weight.ndim > 1 else torch.float32)

    # --- the protocol ---

    @torch.no_grad()
    def forward(self, batch: FlatBatch) -> Tensor:
        rows = Rows.of(batch, self.device)
        count = len(rows.ids)
        if rows.spans or count > MOST_ROWS:
            self.residual, self.taken = self.trunk(rows)
        else:
            size = 1 << (count - 1).bit_length()
            if size not in self.steps:
                self.steps[size] = _Step(self, size)
            residual, taken = self.steps[size].run(rows)
            self.residual, self.taken = residual[:count], [chosen[:count] for chosen in taken]
        return self._norm(self.residual[batch.wanted.to(self.device)], self.model.model.norm.weight)

    @torch.no_grad()
    def ahead(self, batch: FlatBatch, next_ids: Tensor, module: int = 0, hidden: Tensor | None = None) -> Tensor:
        if hidden is None:
            hidden = self._norm(self.residual, self.model.model.norm.weight)
        each = cast(MTPModule, self.model.mtp[module])
        embedded = self.model.model.embed_tokens(next_ids.to(self.device)).float()
        joined = torch.cat([self._norm(embedded, each.enorm.weight), self._norm(hidden, each.hnorm.weight)], dim=-1)
        x = F.linear(joined.to(self.dtype), each.eh_proj.weight.to(self.dtype)).float()
        x = self._layer(self.config.num_hidden_layers + module, x, Rows.of(batch, self.device), [])
        return self._norm(x, each.norm.weight)[batch.wanted.to(self.device)]

    @torch.no_grad()
    def head(self, hidden: Tensor, keep: bool = True) -> Tensor:
        return self.model.head(hidden)

    def routes(self) -> Tensor | None:
        return torch.stack(self.taken).cpu() if self.taken else None

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        copy_blocks(self.caches, pairs)

    # --- the model ---

    def trunk(self, rows: Rows) -> tuple[Tensor, list[Tensor]]:
        """(N, D) fp32 before the final norm, and for each expert layer the experts taken (N, K)."""
        x, taken = self.model.model.embed_tokens(rows.ids).float(), list[Tensor]()
        for layer in range(self.config.num_hidden_layers):
            x = self._layer(layer, x, rows, taken)
        return x, taken

    def _layer(self, layer: int, x: Tensor, rows: Rows, taken: list[Tensor]) -> Tensor:
        w, ffn = self.weights[layer], self.blocks[layer].mlp
        attention = self._latent if self.config.is_mla else self._grouped
        x = x + self._product(attention(layer, self._norm(x, w["norm1"]), rows), w["out"], w.get("out_bias"))
        normed = self._norm(x, w["norm2"])
        if isinstance(ffn, MoE):
            _, weights, chosen = ffn.gate(normed)
            taken.append(chosen)
            gate_up, down = (cast(Tensor, w[name]) for name in ("expert_gate_up", "expert_down"))
            x = x + grouped_experts(normed.to(self.dtype), weights, chosen, gate_up, down)
        if "gate_up" in w:
            gate, up = self._product(normed, w["gate_up"]).chunk(2, dim=-1)
            x = x + self._product(F.silu(gate) * up, w["down"])
        return x

    def _product(self, x: Tensor, weight: Matrix, bias: Matrix | None = None) -> Tensor:
        out = weight.product(x.to(self.dtype)) if isinstance(weight, Fp8Matrix) else F.linear(x.to(self.dtype), weight)
        return out if bias is None else out + cast(Tensor, bias)

    def _norm(self, x: Tensor, weight: Matrix) -> Tensor:
        assert isinstance(weight, Tensor)
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.config.rms_norm_eps)

    def _store(self, layer: int, values: Tensor, rows: Rows) -> None:
        cache = self.caches[layer]
        cache.view(-1, cache.shape[2]).index_copy_(0, rows.slots(self.size).long(), values.to(cache.dtype))

    def _paged(self, layer: int, query: Tensor, rows: Rows) -> Tensor:
        """Rows outside of long spans, (N', H, K) -> (N', H, V)."""
        cache, lengths = self.caches[layer], rows.positions[rows.short] + 1
        return paged_attention(query.to(cache.dtype), cache, rows.tables[rows.short], lengths, self.scale, self.layout)

    def _visible(self, layer: int, rows: Rows, first: int, visible: int) -> Tensor:
        """(S, W) of the sequence that row `first` belongs to."""
        pages = rows.tables[first, : -(-visible // self.size)].long()
        return self.caches[layer][pages].flatten(0, 1)[:visible]

    def _latent(self, layer: int, x: Tensor, rows: Rows) -> Tensor:
        """MLA: absorbed for short spans, expanded for long ones; (N, D) -> (N, H * V)."""
        w, c, turn = self.weights[layer], self.config, self.turns[rows.positions]
        assert c.kv_lora_rank is not None
        heads, latent, nope = c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim
        query, fresh = self._product(x, w["qkv"]).tensor_split([-latent - c.qk_rope_head_dim], dim=-1)
        if "q_b" in w:
            query = self._product(self._norm(query, w["q_norm"]), w["q_b"])
        query_nhq = rotate_tail_(query.float().unflatten(-1, (heads, -1)).contiguous(), turn[:, None])
        own = [self._norm(fresh[:, :latent], w["kv_norm"]), rotate_interleaved(fresh[:, latent:], turn)]
        self._store(layer, torch.cat(own, dim=-1), rows)

        out_nhv = x.new_empty(len(x), heads, c.v_head_dim, dtype=self.dtype)
        for first, end, visible in rows.spans:
            seen = self._visible(layer, rows, first, visible)
            up_shx = self._product(seen[:, :latent], w["kv_b"]).unflatten(-1, (heads, -1))
            shared = seen[:, None, latent:].expand(-1, heads, -1).to(self.dtype)
            key, value = torch.cat([up_shx[..., :nope], shared], dim=-1), up_shx[..., nope:]
            value = F.pad(value, (0, key.shape[-1] - c.v_head_dim))  # flash kernels want equal widths
            out_nhv[first:end] = self._whole(query_nhq[first:end], key, value)[..., : c.v_head_dim]
        short_nhq = query_nhq[rows.short]
        if len(short_nhq):
            up_hxc = cast(Tensor, w["kv_b"]).unflatten(0, (heads, -1))
            absorbed_hnc = torch.bmm(short_nhq[..., :nope].transpose(0, 1).to(self.dtype), up_hxc[:, :nope])
            queries = torch.cat([absorbed_hnc.transpose(0, 1).float(), short_nhq[..., nope:]], dim=-1)
            seen_hnc = self._paged(layer, queries, rows).transpose(0, 1).to(self.dtype)
            out_nhv[rows.short] = torch.bmm(seen_hnc, up_hxc[:, nope:].transpose(1, 2)).transpose(0, 1)
        return out_nhv.flatten(1)

    def _grouped(self, layer: int, x: Tensor, rows: Rows) -> Tensor:
        """GQA: (N, D) -> (N, H * V)."""
        w, c, turn = self.weights[layer], self.config, self.turns[rows.positions][:, None]
        heads, shared = c.num_attention_heads, c.num_key_value_heads
        qkv_nhd = self._product(x, w["qkv"], w.get("qkv_bias")).unflatten(-1, (heads + 2 * shared, -1))
        query, key, value = qkv_nhd.split([heads, shared, shared], dim=1)
        query = rotate_halves(query, turn)
        self._store(layer, torch.cat([rotate_halves(key, turn), value.float()], dim=1).flatten(1), rows)

        out_nhv = torch.empty_like(query, dtype=self.dtype)
        for first, end, visible in rows.spans:
            seen = self.layout.split(self._visible(layer, rows, first, visible))
            out_nhv[first:end] = self._whole(query[first:end], *seen)
        short = query[rows.short]
        if len(short):
            out_nhv[rows.short] = self._paged(layer, short, rows).to(self.dtype)
        return out_nhv.flatten(1)

    def _whole(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The last T of S tokens attend to all before them: (T, H, Q), (S, G, Q), (S, G, V) -> (T, H, V)."""
        tokens, visible = len(query), len(key)
        bias = None
        if tokens < visible:
            hidden = torch.ones(tokens, visible, dtype=torch.bool, device=query.device).triu(visible - tokens + 1)
            bias = torch.zeros(hidden.shape, device=query.device).masked_fill_(hidden, float("-inf"))
        query, key, value = (each.transpose(0, 1)[None] for each in (query.to(key.dtype), key, value))
        return attend(query, key, value, self.scale, bias)[0].transpose(0, 1)


class _Step:
    """A step of `size` rows whose tensors never move; on a GPU, captured."""

    def __init__(self, runner: GpuRunner, size: int) -> None:
        ids, positions = (torch.zeros(size, dtype=torch.long, device=runner.device) for _ in range(2))
        tables = torch.full((size, runner.pages), runner.spare, dtype=torch.int32, device=runner.device)
        self.runner, self.rows = runner, Rows(ids, positions, tables)
        self.graph: torch.cuda.CUDAGraph | None = None
        if runner.device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles kernels and sets up cuBLAS, which may not happen in a capture
            self.runner.trunk(self.rows)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.runner.pool):
            self.out = self.runner.trunk(self.rows)
        self.runner.pool = self.graph.pool()

    def run(self, rows: Rows) -> tuple[Tensor, list[Tensor]]:
        """As `trunk`; rows after the given ones mean nothing. The next run overwrites all."""
        own, (count, pages) = self.rows, rows.tables.shape
        own.ids[:count], own.positions[:count], own.tables[:count, :pages] = rows.ids, rows.positions, rows.tables
        own.ids[count:], own.positions[count:], own.tables[count:, 0] = 0, 0, self.runner.spare
        if self.graph is None:
            return self.runner.trunk(own)
        self.graph.replay()
        return self.out


def _used_weights(block: DecoderLayer) -> list[tuple[str, Tensor]]:
    return [(name, weight) for name, weight in layer_weights(block).items() if name not in NOT_HERE]
