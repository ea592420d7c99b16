"""From a batch of token ids to logits, over a paged cache: the one place where the engine touches tensors.

    runner = make_runner(model, blocks=1024, size=16)
    hidden = runner.forward(batch); logits = runner.head(hidden)

`NativeRunner` is our C++ (model/kernels), `TorchRunner` its slow twin: the Transformer itself over gathered pages, for
machines without the library; a model on a GPU gets gpu_runner.py. What a batch is and what every runner does stands in
flat.py.
N tokens, S sequences, R wanted rows, D hidden, W cached width.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from sputnik.engine.flat import FlatBatch as FlatBatch
from sputnik.engine.flat import Runner, copy_blocks, layer_weights, new_caches
from sputnik.engine.gpu_runner import GpuRunner
from sputnik.errors import ConfigError
from sputnik.model import kernels
from sputnik.model.cache import Append, Cache
from sputnik.model.config import ModelConfig
from sputnik.model.mtp import MTPModule
from sputnik.model.rope import softmax_scale
from sputnik.model.transformer import DecoderLayer, Transformer

FORMATS = ("fp32", "bf16", "int8", "int4")
WHOLE_PREFILL = 8
"""Spans of more tokens than this are attended to as a whole (kernels/prefill.cpp), shorter ones token by token."""


def make_runner(
    model: Transformer, blocks: int, size: int, precision: str = "fp32", weights: str | None = None, exact: bool = False
) -> Runner:
    """The fastest runner there is here. `precision` is the cache's type and, unless `weights` says int8, int4 or fp8,
    that of the matrices. `exact`: a token's numbers depend neither on the rest of the batch nor on how prompts are cut.
    """
    if weights not in (None, "int8", "int4", "fp8"):
        raise ConfigError(f"weights = {weights!r}: choose int8, int4, fp8 (on a GPU) or nothing")
    device = model.lm_head.weight.device
    if device.type == "cuda":
        _check_gpu(device, weights, exact)
        return GpuRunner(model, blocks, size, precision, weights)
    if weights == "fp8":
        raise ConfigError("fp8 weights need a GPU: choose int8 or int4 here")
    if kernels.load() and device.type == "cpu":
        return NativeRunner(model, blocks, size, precision, weights or precision, exact)
    if weights is not None:
        raise ConfigError(
            f"{weights} weights need our kernels: run `python -m sputnik.model.kernels`, which says what is missing"
        )
    return TorchRunner(model, blocks, size, precision, exact)


def _check_gpu(device: torch.device, weights: str | None, exact: bool) -> None:
    if exact:
        raise ConfigError("exact = true is not there for GPUs: leave it out, or move the model to the CPU")
    if weights in ("int8", "int4"):
        raise ConfigError(f"{weights} weights are for the CPU: choose fp8 or nothing on a GPU")
    if weights == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError("this GPU does not multiply fp8 (compute capability 8.9 does): leave weights out")


class NativeRunner:
    """The C++ forward pass. Weights are packed, so an optimizer step shows after `refresh`."""

    def __init__(self, model: Transformer, blocks: int, size: int, precision: str, weights: str, exact: bool) -> None:
        if not kernels.load():
            raise ConfigError("the kernels are not built: run `python -m sputnik.model.kernels`")
        self.model, self.weights, self.exact = model, weights, exact
        self.caches = new_caches(model.config, blocks, size, precision)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        model, config = self.model, self.model.config
        table = torch.view_as_real(model.rope.table(256, torch.device("cpu"))).flatten(1)
        self.native = torch.classes.sputnik.Runner(_numbers(config, self._whole), table, self.weights)
        for layer in [*model.model.layers, *(module.block for module in model.mtp)]:
            self.native.add_layer(layer_weights(cast(DecoderLayer, layer)))
        for each in model.mtp:
            module = cast(MTPModule, each)
            norms = {"enorm": module.enorm.weight, "hnorm": module.hnorm.weight, "norm": module.norm.weight}
            self.native.add_module(norms | {"join": module.eh_proj.weight})
        self.native.set_ends(model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight)
        self.native.set_caches(self.caches)
        self.native.set_main_layers(config.num_hidden_layers)
        self.rope_length = len(table)

    @property
    def _whole(self) -> int:
        return 1 << 40 if self.exact else WHOLE_PREFILL

    def release(self) -> None:
        self.model.to("meta")

    @torch.no_grad()
    def forward(self, batch: FlatBatch) -> Tensor:
        self._reach(batch)
        return self.native.forward(batch.ids, batch.positions, batch.starts, batch.tables, batch.wanted)

    @torch.no_grad()
    def ahead(self, batch: FlatBatch, next_ids: Tensor, module: int = 0, hidden: Tensor | None = None) -> Tensor:
        return self.native.ahead(module, next_ids, hidden, batch.positions, batch.starts, batch.tables, batch.wanted)

    @torch.no_grad()
    def head(self, hidden: Tensor, keep: bool = True) -> Tensor:
        return self.native.logits(hidden, keep)

    @torch.no_grad()
    def stride(
        self, batch: FlatBatch, rows: tuple[Tensor, Tensor, Tensor], draws: Sequence[Tensor], scored: bool,
        record: bool, steps: int, idle: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Several decoding steps at once, for `stride.py`; the batch's ids and positions are (R, T)."""
        self._reach(batch)
        return self.native.stride(
            batch.ids, batch.positions, batch.starts, batch.tables, *rows, list(draws), scored, record, steps, idle
        )

    def routes(self) -> Tensor | None:
        return self.native.routes() if self.model.config.n_routed_experts else None

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        copy_blocks(self.caches, pairs)

    def _reach(self, batch: FlatBatch) -> None:
        longest = batch.tables.shape[1] * self.caches[0].shape[1]
        if longest > self.rope_length:
            table = torch.view_as_real(self.model.rope.table(longest, torch.device("cpu"))).flatten(1)
            self.native.set_rope(table)
            self.rope_length = len(table)


class TorchRunner:
    """The Transformer over pages gathered into rows, one sequence length at a time."""

    def __init__(self, model: Transformer, blocks: int, size: int, precision: str, exact: bool) -> None:
        self.model, self.precision, self.exact = model, precision, exact
        self._routes: Tensor | None = None
        self.caches = new_caches(model.config, blocks, size, precision)
        self.refresh()

    def refresh(self) -> None:
        self.frozen = self.model.lowered(torch.bfloat16) if self.precision == "bf16" else self.model

    def release(self) -> None:
        if self.frozen is not self.model:
            self.model.to("meta")

    @torch.no_grad()
    def forward(self, batch: FlatBatch) -> Tensor:
        hidden = torch.empty(len(batch.ids), self.model.config.hidden_size)
        self.residual, self._routes = torch.empty_like(hidden), None
        for tokens_bt, pages in self._groups(batch):
            trunk = self.frozen.trunk(batch.ids[tokens_bt], cache=pages)
            hidden[tokens_bt], self.residual[tokens_bt] = trunk.hidden.float(), trunk.residual.float()
            if trunk.routes:
                chosen = torch.stack([route.chosen for route in trunk.routes])
                if self._routes is None:
                    self._routes = chosen.new_empty(len(chosen), len(batch.ids), chosen.shape[2])
                self._routes[:, tokens_bt.flatten()] = chosen
        return hidden[batch.wanted]

    def routes(self) -> Tensor | None:
        return self._routes

    @torch.no_grad()
    def ahead(self, batch: FlatBatch, next_ids: Tensor, module: int = 0, hidden: Tensor | None = None) -> Tensor:
        before = self.frozen.model.norm(self.residual) if hidden is None else hidden
        out = torch.empty_like(before)
        for tokens_bt, pages in self._groups(batch):
            embedded = self.frozen.model.embed_tokens(next_ids[tokens_bt])
            out[tokens_bt] = self.frozen.mtp[module](
                embedded, before[tokens_bt], self.frozen._pass(tokens_bt.shape[1], embedded.device, pages), None
            )[0].float()
        return out[batch.wanted]

    def _groups(self, batch: FlatBatch) -> Iterator[tuple[Tensor, Cache]]:
        """(B, T) indices into the flat batch of sequences with equally many tokens, and their pages; exact: one token
        of one sequence at a time."""
        starts = batch.starts.tolist()
        groups: dict[tuple[int, int], list[int]] = {}
        for sequence, (start, end) in enumerate(pairwise(starts)):
            groups.setdefault((end - start, sequence if self.exact else 0), []).append(sequence)
        for (length, _), members in groups.items():
            tokens = torch.tensor([[starts[s] + i for i in range(length)] for s in members])
            for part in tokens.split(1, dim=1) if self.exact else [tokens]:
                pages = _Pages(self.caches, batch.tables[members].long(), batch.positions[part])
                yield part, cast(Cache, pages)

    @torch.no_grad()
    def head(self, hidden: Tensor, keep: bool = True) -> Tensor:
        return torch.cat([self.frozen.head(row) for row in hidden.split(1)]) if self.exact else self.frozen.head(hidden)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        copy_blocks(self.caches, pairs)


class _Pages:
    """Stands in for model/cache.py's Cache in one forward pass: appends to pages and returns them gathered."""

    def __init__(self, caches: list[Tensor], tables_bp: Tensor, positions_bt: Tensor) -> None:
        size = caches[0].shape[1]
        self.caches = caches
        self.positions = positions_bt
        visible = int(positions_bt.max()) + 1
        self.pages = tables_bp[:, : -(-visible // size)]
        self.visible = visible
        block = tables_bp.gather(1, positions_bt // size)
        self.slots = (block * size + positions_bt % size).flatten()

    def plan(self, tokens: int) -> Append:
        hidden = torch.arange(self.visible) > self.positions[:, :, None]
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        return Append(self.positions, self.slots, self.visible, bias)

    def append(self, layer: int, values: Tensor, plan: Append) -> Tensor:
        cache = self.caches[layer]
        cache.view(-1, cache.shape[2]).index_copy_(0, plan.slots, values.flatten(0, 1).to(cache.dtype))
        return cache[self.pages].flatten(1, 2)[:, : plan.visible]

    def advance(self, tokens: int, lengths: Tensor | None) -> None:
        """Lengths are the scheduler's business."""


def _numbers(config: ModelConfig, whole_prefill: int) -> dict[str, float]:
    """The shape as runner.h reads it."""
    mla, moe = config.is_mla, config.n_routed_experts is not None
    return {
        "hidden": config.hidden_size, "heads": config.num_attention_heads, "key_heads": config.num_key_value_heads,
        "width": 0 if mla else config.gqa_head_dim, "nope": config.qk_nope_head_dim, "rope": config.qk_rope_head_dim,
        "value": config.v_head_dim, "latent": config.kv_lora_rank or 0, "experts": config.n_routed_experts or 0,
        "chosen": config.num_experts_per_tok, "groups": config.n_group, "kept_groups": config.topk_group,
        "whole_prefill": whole_prefill, "sigmoid": config.scoring_func == "sigmoid",
        "normalise": config.norm_topk_prob, "two_best": config.topk_method == "noaux_tc",
        "by_group": moe and config.topk_method != "greedy" and config.topk_group < config.n_group,
        "interleaved": mla, "eps": config.rms_norm_eps, "scale": softmax_scale(config),
        "routed_scale": config.routed_scaling_factor,
    }  # fmt: skip
