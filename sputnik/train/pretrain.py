"""Pre-training as in the V3 report, sections 2 and 4: one dial, `tokens`; the published schedule is scaled to it.

    figures = pretrain(PretrainConfig(tokens=3_000_000), model_config, tok, corpus, held_out, out, meter)
    pretrain(PretrainConfig(tokens=1_000_000, lr=1e-3), model_config, tok, others, held_out, out2, meter,
             start=out / "checkpoint")                                    # trained on, on other data

Per step: cross-entropy + lambda x MTP loss + alpha x sequence balance loss over all micro-batches, gradient norm
clipped to 1, AdamW, then the routing biases move by gamma after the load of the whole batch, then the moving average of
the weights. STAGE/checkpoint is written at the end; after a kill the same call goes on, see train/loop.py.

Left out: several processes, the speed of FP8 (its rounding is there: model/fp8_products.py), and context extension
(V3 4.3).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sputnik.config import to_dict
from sputnik.cost import Meter, device_hours, kv_bytes_per_token, parameters, training_flops_per_token
from sputnik.engine.sampler import autocast
from sputnik.errors import ConfigError
from sputnik.hardware import resolve_precision
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.fp8_products import emulate
from sputnik.model.head import head_loss
from sputnik.model.moe import Route, update_bias
from sputnik.model.transformer import Transformer
from sputnik.text.corpus import PackedCorpus, bits_per_byte, byte_lengths
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.examples import weights_digest
from sputnik.train.guards import Action, Guard, GuardConfig, first_non_finite
from sputnik.train.loop import Loop, Read
from sputnik.train.optim import Ema, adamw, clip_gradients, load_optimizer_tensors, optimizer_tensors, set_lr
from sputnik.train.schedule import (
    BATCH_RAMP,
    BIAS_SWITCH,
    CONSTANT_UNTIL,
    COSINE_UNTIL,
    FIRST_TAIL,
    FIRST_TAIL_UNTIL,
    MTP_SWITCH,
    SECOND_TAIL,
    Plan,
)
from sputnik.train.state import derive_seed, load_module_tensors, module_tensors, read_jsonl

OUTCOME_FREE = ("save_seconds", "save_steps")  # settings that change nothing about the result


@dataclass(frozen=True)
class PretrainConfig:
    """Everything else (steps, warm-up, decay, ramps, switches) follows from these and is printed at the start."""

    tokens: int = 3_000_000
    """The dial: training tokens in all. The published run had 14.8e12."""
    length: int = 256
    """Tokens in a sequence."""
    batch: int = 32
    """Sequences in a step once the ramp is over; it starts at a fifth of this."""
    micro_batch: int = 16
    """Sequences that go through the model at once: lower it when memory runs out. The sum is the same."""
    lr: float = 2e-3
    """Peak learning rate. The published 2.2e-4 is for a width of 7168; smaller models want more."""
    weight_decay: float = 0.1
    mtp_weight: float = 0.3
    """Lambda; a third of it after 68 % of the run."""
    balance_alpha: float = 1e-4
    """Weight of the sequence balance loss."""
    bias_gamma: float = 1e-3
    """Step of the routing biases; 0 after 97 % of the run."""
    ema_decay: float = 0.99
    """Moving average of the weights, per step."""
    release: Literal["raw", "ema"] = "raw"
    """Which weights the checkpoint holds."""
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    """bf16: matrix products under autocast; weights, router and loss stay in FP32. auto: the faster of the two here.
    fp8: what the report's FP8 products would round, on top of FP32; slower than either."""
    evaluations: int = 10
    """Evenly spaced over the run, the last one after the last step."""
    held_out_rows: int = 32
    """Held-out sequences read by each evaluation."""
    save_seconds: float = 300.0
    save_steps: int = 0
    """Also save every so many steps; 0: by time alone."""
    on_spike: Action = "warn"
    """When the loss jumps by more than a nat: off, warn, pause or rollback."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "batch", "micro_batch", "lr", "evaluations", "held_out_rows"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: set it above 0")
        if self.tokens < self.length * self.batch:
            raise ConfigError(
                f"tokens = {self.tokens} is less than one batch of {self.batch} x {self.length}: raise it"
            )
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay = {self.ema_decay}: set it to at least 0 and below 1")


@dataclass
class Sums:
    """What the micro-batches of one step add up to."""

    loss: Tensor
    mtp: Tensor
    balance: Tensor
    load: dict[int, Tensor]
    """Layer -> tokens per expert."""


class Pretraining:
    """The stage that `Loop` drives."""

    def __init__(
        self, config: PretrainConfig, model: Transformer, tok: Tokenizer, corpus: PackedCorpus, held_out: PackedCorpus
    ) -> None:
        self.config = config
        self.precision = "fp32" if config.precision == "fp8" else resolve_precision(config.precision)
        self.model = emulate(model) if config.precision == "fp8" else model
        self.plan = Plan.make(config.tokens // config.length, config.batch)
        self.corpus = corpus
        self.optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
        self.ema = Ema(model, config.ema_decay)
        self.gates = {layer: gate for layer, gate in model.gates().items() if gate.e_score_correction_bias is not None}
        self.flops_per_token = training_flops_per_token(model.config, config.length, mtp=bool(len(model.mtp)))
        self._held_out = torch.from_numpy(held_out.batch(0, min(config.held_out_rows, held_out.rows_per_epoch)))
        self._byte_lengths = torch.from_numpy(byte_lengths(tok))
        self._ids = torch.empty(0, config.length + 1, dtype=torch.long)

    # --- what the loop calls ---

    def before(self) -> dict[str, Any]:
        return {}

    def step(self, step: int, loop: Loop) -> dict[str, Any]:
        began = time.perf_counter()
        rows, start = self.plan.rows[step - 1], self.plan.starts[step - 1]
        position = start + (loop.data_step(step) - step) * self.config.batch  # after a rollback: past all that was seen
        self._ids = torch.from_numpy(self.corpus.batch(position, rows))
        sums = self.accumulate(self._ids, self.plan.mtp_weight(step, self.config.mtp_weight))
        non_finite, grad_norm = self._update(sums, step)
        tokens = rows * self.config.length
        loop.meter.add(tokens=tokens, flops=tokens * self.flops_per_token)
        seconds = time.perf_counter() - began
        flops_per_s = tokens * self.flops_per_token / seconds
        metrics: dict[str, Any] = {
            "tokens": self.plan.starts[step] * self.config.length,
            "loss": float(sums.loss),
            "mtp_loss": float(sums.mtp),
            "balance_loss": float(sums.balance),
            "lr": self.plan.lr(step, self.config.lr),
            "grad_norm": grad_norm,
            "tokens_per_s": tokens / seconds,
            "flops_per_s": flops_per_s,
            "peak_share": flops_per_s / loop.meter.total.peak,
            **load_figures(sums.load),
        }
        if non_finite is not None:
            metrics["non_finite"] = non_finite
        if self._evaluates_at(step):
            metrics |= self.evaluate() | {"expert_load": load_shares(sums.load)}
        return metrics

    def batch(self) -> dict[str, Tensor]:
        return {"ids": self._ids}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        optimizer = optimizer_tensors(self.optimizer, self.model)
        return {"model": module_tensors(self.model), "optimizer": optimizer, "ema": self.ema.weights}, {}

    def load(self, read: Read, plain: Mapping[str, Any]) -> None:
        load_module_tensors(self.model, read("model"))
        load_optimizer_tensors(self.optimizer, self.model, read("optimizer"))
        self.ema.load(read("ema"))

    # --- one step ---

    def accumulate(self, ids: Tensor, mtp_share: float) -> Sums:
        """Gradients of the whole batch (rows, length + 1), one micro-batch after another. Every part is divided by the
        size of the whole batch, so the cut into micro-batches changes memory and not the sum."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        zero = torch.zeros(())
        sums = Sums(zero, zero, zero, {})
        for rows in torch.split(ids, self.config.micro_batch):
            with autocast(self.precision):
                part = self._losses(rows, share=len(rows) / len(ids))
            total = part.loss + mtp_share * part.mtp
            if part.load:
                total = total + self.config.balance_alpha * part.balance
            total.backward()  # type: ignore[no-untyped-call]
            sums.loss, sums.mtp = sums.loss + part.loss.detach(), sums.mtp + part.mtp.detach()
            sums.balance = sums.balance + part.balance.detach()
            for layer, load in part.load.items():
                sums.load[layer] = sums.load.get(layer, torch.zeros_like(load)) + load
        sums.balance = sums.balance / max(1, len(sums.load))  # reported per layer: 1 is perfect balance
        return sums

    def _losses(self, rows: Tensor, share: float) -> Sums:
        """Mean losses of some rows, weighed by their `share` of the batch."""
        inputs, targets = rows[:, :-1], rows[:, 1:]
        weight = self.model.lm_head.weight
        trunk = self.model.trunk(inputs)
        loss = head_loss(trunk.hidden.flatten(0, 1), weight, targets.flatten()) * (share / targets.numel())
        ahead = self.model.mtp_hidden(trunk.residual, inputs)
        mtp = torch.zeros(())
        for depth, hidden in enumerate(ahead.hidden, start=1):
            further = targets[:, depth:].flatten()
            mtp = mtp + head_loss(hidden.flatten(0, 1), weight, further) * (share / further.numel())
        routes = [*trunk.routes, *ahead.routes]
        return Sums(loss, mtp / max(1, len(ahead.hidden)), _balance(routes, share), {r.layer: r.load for r in routes})

    def _update(self, sums: Sums, step: int) -> tuple[str | None, float]:
        """The optimiser step and what follows it; nothing at all if a loss or a gradient is not finite, and then its
        name. Returns that and the gradient norm."""
        grad_norm = clip_gradients(self.model)
        losses = {"loss": sums.loss, "mtp_loss": sums.mtp, "balance_loss": sums.balance}
        finite = bool(torch.isfinite(torch.stack([*losses.values(), torch.tensor(grad_norm)])).all())
        if not finite:
            return first_non_finite(self.model, losses), grad_norm
        set_lr(self.optimizer, self.plan.lr(step, self.config.lr))
        self.optimizer.step()
        gamma = self.plan.bias_speed(step, self.config.bias_gamma)
        for layer, gate in self.gates.items():
            update_bias(gate, sums.load[layer], gamma)
        self.ema.update(self.model, step)
        return None, grad_norm

    # --- evaluation ---

    def _evaluates_at(self, step: int) -> bool:
        """At the end of each of `evaluations` equal parts of the run."""
        parts, steps = min(self.config.evaluations, self.plan.steps), self.plan.steps
        return step * parts // steps > (step - 1) * parts // steps

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss on held-out text in nats per token and in bits per byte of text (control tokens predicted, not counted
        as bytes)."""
        self.model.eval()
        nats = 0.0
        with autocast(self.precision):
            for rows in torch.split(self._held_out, self.config.micro_batch):
                hidden = self.model.trunk(rows[:, :-1]).hidden.flatten(0, 1)
                nats += float(head_loss(hidden, self.model.lm_head.weight, rows[:, 1:].flatten()))
        targets = self._held_out[:, 1:]
        text_bytes = int(self._byte_lengths[targets].sum())
        return {"val_loss": nats / targets.numel(), "bits_per_byte": bits_per_byte(nats, text_bytes)}


def _balance(routes: list[Route], share: float) -> Tensor:
    losses = [route.balance_loss for route in routes if route.balance_loss is not None]
    return torch.stack(losses).sum() * share if losses else torch.zeros(())


def load_figures(load: Mapping[int, Tensor]) -> dict[str, float]:
    """The worst layer's busiest expert over the mean, and how many experts got no token at all."""
    if not load:
        return {}
    worst = max(float(each.max() / each.mean()) for each in load.values())
    return {"expert_imbalance": worst, "dead_experts": sum(int((each == 0).sum()) for each in load.values())}


def load_shares(load: Mapping[int, Tensor]) -> list[list[float]]:
    """Per expert layer, each expert's share of the tokens routed."""
    return [(each / each.sum()).tolist() for each in load.values()]


def describe(config: PretrainConfig, model_config: ModelConfig, plan: Plan, meter: Meter) -> Table:
    """Everything derived, before anything runs."""
    flops = training_flops_per_token(model_config, config.length, mtp=bool(model_config.num_nextn_predict_layers))
    total = plan.total * config.length * flops
    hours = device_hours(total, meter.device, peak_share=0.3) / meter.count
    count = parameters(model_config)

    def at(share: float) -> str:
        return f"{share * plan.total * config.length:,.0f} tokens"

    table = Table(title="pre-training, derived from the settings", title_justify="left", show_header=False)
    for key, value in (
        ("model", f"{count.total:,} parameters, {count.active:,} active, MTP {count.mtp:,}"),
        ("steps", f"{plan.steps} ({plan.total:,} sequences of {config.length})"),
        ("batch", f"{plan.rows[0]} -> {plan.rows[-1]} sequences over the first {at(BATCH_RAMP)}"),
        ("warm-up", f"{plan.warmup} steps to {config.lr:g}"),
        ("decay", f"cosine from {at(CONSTANT_UNTIL)} to {at(COSINE_UNTIL)}, down to {config.lr * FIRST_TAIL:g}"),
        ("tail", f"{config.lr * SECOND_TAIL:.3g} from {at(FIRST_TAIL_UNTIL)}"),
        ("MTP weight", f"{config.mtp_weight:g}, {config.mtp_weight / 3:g} from {at(MTP_SWITCH)}"),
        ("bias speed", f"{config.bias_gamma:g}, 0 from {at(BIAS_SWITCH)}"),
        ("work", f"{total:.3g} FLOP; {hours:.2g} h and ${hours * meter.usd_per_hour:.2g} at 30 % of peak"),
    ):
        table.add_row(key, value)
    return table


def pretrain(
    config: PretrainConfig,
    model_config: ModelConfig,
    tok: Tokenizer,
    corpus: Path,
    held_out: Path,
    out: Path,
    meter: Meter,
    console: Console | None = None,
    start: Path | None = None,
) -> dict[str, Any]:
    """Train a model into `out` (metrics, saves, checkpoint), or go on where a killed call was; a call after the last
    step changes nothing. `corpus` and `held_out` are folders of token shards. `start` is a checkpoint of the same
    shape that is trained on, with a schedule and optimiser states of its own; else the weights are drawn. Returns
    where the metrics ended, and sizes; the cache's bytes are BF16's."""
    training = PackedCorpus(corpus, config.length, config.seed)
    validation = PackedCorpus(held_out, config.length, config.seed)
    _require_fit(config, model_config, tok, training, validation)
    model = _first_weights(config, model_config, start)
    stage = Pretraining(config, model, tok, training, validation)
    loop = Loop(
        out,
        steps=stage.plan.steps,
        identity=_identity(stage, training, validation, start),
        meter=meter,
        guard=lambda: Guard(GuardConfig(spike=config.on_spike)),
        headline=("loss", "bits_per_byte", "tokens_per_s"),
        save_seconds=config.save_seconds,
        save_steps=config.save_steps,
    )
    (console or Console()).print(describe(config, model_config, stage.plan, meter))
    loop.run(stage)
    checkpoint = out / "checkpoint"
    if not checkpoint.exists():  # it appears whole or not at all
        if config.release == "ema":
            stage.ema.copy_to(model)
        save_model(model, checkpoint, tokenizer=tok)
    last = read_jsonl(out / "metrics.jsonl")[-1]
    count = parameters(model_config)
    return {
        **{key: last[key] for key in ("tokens", "loss", "val_loss", "bits_per_byte")},
        "parameters": count.total,
        "active_parameters": count.active,
        "cache_bytes_per_token": kv_bytes_per_token(model_config),
        "flops_per_token": stage.flops_per_token,
    }


def _first_weights(config: PretrainConfig, shape: ModelConfig, start: Path | None) -> Transformer:
    if start is None:
        return Transformer(shape).init_weights(torch.Generator().manual_seed(derive_seed(config.seed, "init")))
    model = load_model(start)
    theirs, ours = to_dict(model.config), to_dict(shape)
    if other := [f"{key} = {theirs[key]}, here {ours[key]}" for key in ours if theirs[key] != ours[key]]:
        raise ConfigError(f"{start} is of another shape ({', '.join(other)}): it is trained on as it is")
    return model


def _identity(stage: Pretraining, corpus: PackedCorpus, held_out: PackedCorpus, start: Path | None) -> dict[str, Any]:
    """Everything the result depends on; "auto" is written out, since another day's measurement may decide otherwise."""
    settings = {key: value for key, value in to_dict(stage.config).items() if key not in OUTCOME_FREE}
    if stage.config.precision == "auto":
        settings["precision"] = stage.precision
    model = {f"model.{key}": value for key, value in to_dict(stage.model.config).items()}
    begun = {} if start is None else {"start": weights_digest(start)}
    return {**settings, **model, "corpus": corpus.info.sha256, "held_out": held_out.info.sha256, **begun}


def _require_fit(config: PretrainConfig, model_config: ModelConfig, tok: Tokenizer, *corpora: PackedCorpus) -> None:
    if config.length > model_config.max_position_embeddings:
        raise ConfigError(
            f"length = {config.length} is over the model's max_position_embeddings = "
            f"{model_config.max_position_embeddings}: lower one or raise the other"
        )
    for corpus in corpora:
        if not corpus.info.vocab_size == tok.vocab_size <= model_config.vocab_size:
            raise ConfigError(
                f"vocab_size of corpus {corpus.info.vocab_size}, tokenizer {tok.vocab_size} and model "
                f"{model_config.vocab_size} do not fit: tokenise the corpus with this tokenizer and set the model's"
            )
