"""Supervised fine-tuning on dialogues: cold start, the second SFT of R1, distillation (R1 B.3, B.4.3).

    figures = train_sft(SFTConfig(epochs=2), parent_checkpoint, [Path("traces.jsonl")], out, meter)

Loss falls on what the assistant writes, end of text included (train/examples.py). A step reads `batch` examples, packed
into rows without padding in which each sees only itself (train/rows.py): that changes speed and no number. Per step:
cross-entropy, mean over the tokens of the batch that carry loss, + lambda x MTP loss on the same tokens + alpha x
sequence balance loss, norm clipped to 1, AdamW, then the routing biases move, all as in pre-training; cosine to a tenth
of the learning rate (R1 B.4.3). The MTP modules learn the dialogues too and go on drafting well.

    OUT/checkpoint/   OUT/metrics.jsonl   OUT/samples.md (what is trained on, as read)   OUT/data.json (counts)

Left out: several processes, FP8, adapters.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sputnik.config import to_dict
from sputnik.cost import Meter, device_hours, parameters, training_flops_per_token
from sputnik.engine.sampler import autocast
from sputnik.errors import ConfigError
from sputnik.files import write_whole
from sputnik.hardware import resolve_precision
from sputnik.model.checkpoint import check_tokenizer, load_model, save_model
from sputnik.model.head import IGNORE, head_loss
from sputnik.model.kernels import fused
from sputnik.model.moe import Route, update_bias
from sputnik.model.transformer import Transformer
from sputnik.text.corpus import bits_per_byte, byte_lengths
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.examples import Data, Example, Policy, digest, preview, read_examples, shown, split, weights_digest
from sputnik.train.guards import Action, Guard, GuardConfig, first_non_finite
from sputnik.train.loop import Loop, Read
from sputnik.train.optim import adamw, clip_gradients, load_optimizer_tensors, optimizer_tensors, set_lr
from sputnik.train.pretrain import Sums, load_figures, load_shares
from sputnik.train.rows import Rows, lay_out, target_counts
from sputnik.train.schedule import FIRST_TAIL, bias_speed, cosine, warmup_steps
from sputnik.train.state import derive_seed, load_module_tensors, module_tensors, read_jsonl, write_json

OUTCOME_FREE = ("save_seconds",)
SHOWN = 8
"""Examples in samples.md."""


@dataclass(frozen=True)
class SFTConfig:
    """Everything else (steps, warm-up, decay) follows from these and the data, and is printed at the start."""

    data: tuple[str, ...] = ()
    """JSONL files of examples, beside those of the stages it reads (docs/sft.md)."""
    repeats: Mapping[str, int] = field(default_factory=dict)
    """How often the examples of a file, or of a stage it reads, come in each epoch; once if it is not named here."""
    template: str = "chat"
    """chat, zero, or own: the one that the model's tokenizer brings."""
    length: int | None = None
    """Longest example in tokens; default: the model's context."""
    too_long: Policy = "refuse"
    """What to do with longer ones; they are never cut."""
    bad_lines: Policy = "refuse"
    """What to do with lines that are no examples."""
    held_out: float = 0.02
    """Share of the questions that are not trained on but scored."""
    epochs: int = 2
    batch: int = 64
    """Examples in a step."""
    micro_tokens: int = 4096
    """Tokens that go through the model at once: lower it when memory runs out. The sum is the same."""
    lr: float = 5e-4
    """Peak learning rate. The published 5e-5 is for 671 billion parameters, 1e-4 for 1.5."""
    weight_decay: float = 0.1
    mtp_weight: float = 0.1
    """Lambda, as at the end of pre-training; 0 leaves the MTP modules as they are."""
    balance_alpha: float = 1e-4
    """Weight of the sequence balance loss."""
    bias_gamma: float = 1e-3
    """Step of the routing biases; 0 after 97 % of the run."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    evaluations: int = 10
    """Evenly spaced over the run, the last one after the last step; there is one before the first as well."""
    save_seconds: float = 300.0
    on_spike: Action = "warn"
    """When the loss jumps by more than a nat: off, warn, pause or rollback."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "micro_tokens", "lr", "evaluations"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: set it above 0")
        for name in ("weight_decay", "mtp_weight", "balance_alpha", "bias_gamma"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: set it to 0 or more")
        if self.length is not None and self.length < 2:
            raise ConfigError(f"length = {self.length}: set it above 1, or leave it out")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out = {self.held_out}: set it to at least 0 and below 1")
        for name, times in self.repeats.items():
            if times < 1:
                raise ConfigError(f"repeats: {name} = {times}: set it above 0")


class FineTuning:
    """The stage that `Loop` drives."""

    def __init__(
        self,
        config: SFTConfig,
        model: Transformer,
        tok: Tokenizer,
        training: Sequence[Example],
        held_out: Sequence[Example],
    ) -> None:
        self.config = config
        self.precision = resolve_precision(config.precision)
        self.model = model
        self.training = training
        self.held_out = held_out
        self.packed = fused.usable(model.lm_head.weight)
        self.depths = len(model.mtp) if config.mtp_weight else 0
        self.per_epoch = -(-len(training) // config.batch)
        self.steps = config.epochs * self.per_epoch
        self.warmup = warmup_steps(self.steps)
        self.optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
        self.gates = {layer: gate for layer, gate in model.gates().items() if gate.e_score_correction_bias is not None}
        self._byte_lengths = torch.from_numpy(byte_lengths(tok))
        self._flops = cache(lambda tokens: training_flops_per_token(model.config, tokens, mtp=bool(self.depths)))
        self._order = cache(self._shuffled)
        self._batch: list[Example] = []

    # --- what the loop calls ---

    def before(self) -> dict[str, Any]:
        return self.evaluate()

    def step(self, step: int, loop: Loop) -> dict[str, Any]:
        began = time.perf_counter()
        self._batch = self.batch_of(loop.data_step(step))
        sums = self.accumulate(self._batch)
        non_finite, grad_norm = self._update(sums, step)
        tokens, flops = sum(len(example.ids) for example in self._batch), self.flops(self._batch)
        loop.meter.add(tokens=tokens, flops=flops)
        seconds = time.perf_counter() - began
        metrics: dict[str, Any] = {
            "epoch": step / self.per_epoch,
            "tokens": loop.meter.total.tokens,
            "trained_tokens": target_counts(self._batch, 0)[0],
            "loss": float(sums.loss),
            "mtp_loss": float(sums.mtp),
            "balance_loss": float(sums.balance),
            "lr": self.lr(step),
            "grad_norm": grad_norm,
            "tokens_per_s": tokens / seconds,
            "flops_per_s": flops / seconds,
            "peak_share": flops / seconds / loop.meter.total.peak,
            **load_figures(sums.load),
        }
        if non_finite is not None:
            metrics["non_finite"] = non_finite
        if self._evaluates_at(step):
            metrics |= self.evaluate() | ({"expert_load": load_shares(sums.load)} if sums.load else {})
        return metrics

    def batch(self) -> dict[str, Tensor]:
        rows = next(lay_out(self._batch, 2**62, 0, packed=False))
        return {"ids": rows.ids, "targets": rows.targets[0]}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        return {"model": module_tensors(self.model), "optimizer": optimizer_tensors(self.optimizer, self.model)}, {}

    def load(self, read: Read, plain: Mapping[str, Any]) -> None:
        load_module_tensors(self.model, read("model"))
        load_optimizer_tensors(self.optimizer, self.model, read("optimizer"))

    # --- one step ---

    def batch_of(self, step: int) -> list[Example]:
        """Every example once an epoch, in parts of nearly equal size."""
        epoch, part = divmod(step - 1, self.per_epoch)
        order = self._order(epoch)
        start, end = (len(order) * number // self.per_epoch for number in (part, part + 1))
        return [self.training[place] for place in order[start:end]]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "order", epoch))
        return torch.randperm(len(self.training), generator=generator).tolist()

    def lr(self, step: int) -> float:
        """Linear warm-up, cosine to a tenth."""
        done = (step - 1) / max(1, self.steps - 1)
        return cosine(done, self.config.lr, FIRST_TAIL * self.config.lr) * min(1.0, step / self.warmup)

    def flops(self, examples: Sequence[Example]) -> float:
        lengths = [len(example.ids) - 1 for example in examples]
        return sum(length * self._flops(length) for length in lengths)

    def accumulate(self, batch: Sequence[Example]) -> Sums:
        """Gradients of a batch, some rows after the other. Every part is divided by the size of the whole batch, so
        the cut into rows changes memory and not the sum."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        counts, zero = target_counts(batch, self.depths), torch.zeros(())
        sums = Sums(zero, zero, zero, {})
        for rows in lay_out(batch, self.config.micro_tokens, self.depths, self.packed):
            with autocast(self.precision):
                part = self._losses(rows, counts, share=rows.examples / len(batch))
            total = part.loss + self.config.mtp_weight * part.mtp
            if part.load:
                total = total + self.config.balance_alpha * part.balance
            total.backward()  # type: ignore[no-untyped-call]
            sums.loss, sums.mtp = sums.loss + part.loss.detach(), sums.mtp + part.mtp.detach()
            sums.balance = sums.balance + part.balance.detach()
            for layer, load in part.load.items():
                sums.load[layer] = sums.load.get(layer, torch.zeros_like(load)) + load
        sums.balance = sums.balance / max(1, len(sums.load))  # reported per layer: 1 is perfect balance
        return sums

    def _losses(self, rows: Rows, counts: Sequence[int], share: float) -> Sums:
        """Losses of some rows: sums over `counts` tokens of the batch at each depth; the balance weighs by `share`."""
        found, routes = self._nats(rows)
        first, *others = (nats / max(1, count) for nats, count in zip(found, counts, strict=True))
        mtp = torch.stack(others).mean() if others else torch.zeros(())
        balance = [route.balance_loss for route in routes if route.balance_loss is not None]
        even = torch.stack(balance).sum() * share if balance else torch.zeros(())
        return Sums(first, mtp, even, {route.layer: route.load for route in routes})

    def _nats(self, rows: Rows) -> tuple[list[Tensor], list[Route]]:
        """Summed loss at each depth that the rows have targets for."""
        trunk = self.model.trunk(rows.ids, token_mask=rows.valid, segments=rows.segments)
        hidden, routes = [trunk.hidden], trunk.routes
        if len(rows.targets) > 1:
            ahead = self.model.mtp_hidden(trunk.residual, rows.ids, rows.valid, rows.segments)
            hidden, routes = [trunk.hidden, *ahead.hidden], [*trunk.routes, *ahead.routes]
        found = []
        for states, deeper in zip(hidden, rows.targets, strict=True):
            targets = deeper[:, : states.shape[1]].flatten()  # a padded row has fewer states further on
            places = (targets != IGNORE).nonzero().squeeze(1)
            learned = states.flatten(0, 1).index_select(0, places)
            found.append(head_loss(learned, self.model.lm_head.weight, targets[places]))
        return found, routes

    def _update(self, sums: Sums, step: int) -> tuple[str | None, float]:
        """The optimiser step and the routing biases; nothing at all if a loss or a gradient is not finite, and then
        its name. Returns that and the gradient norm."""
        grad_norm = clip_gradients(self.model)
        losses = {"loss": sums.loss, "mtp_loss": sums.mtp, "balance_loss": sums.balance}
        if not bool(torch.isfinite(torch.stack([*losses.values(), torch.tensor(grad_norm)])).all()):
            return first_non_finite(self.model, losses), grad_norm
        set_lr(self.optimizer, self.lr(step))
        self.optimizer.step()
        gamma = bias_speed(step - 1, self.steps, self.config.bias_gamma)
        for layer, load in sums.load.items():
            if layer in self.gates:
                update_bias(self.gates[layer], load, gamma)
        return None, grad_norm

    # --- evaluation ---

    def _evaluates_at(self, step: int) -> bool:
        """At the end of each of `evaluations` equal parts of the run."""
        parts = min(self.config.evaluations, self.steps)
        return step * parts // self.steps > (step - 1) * parts // self.steps

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss on the answers to held-out questions, in nats per token and in bits per byte of text (the end of text
        is predicted, not counted as bytes), and that of the MTP modules; nothing if no question is held out."""
        if not self.held_out:
            return {}
        self.model.eval()
        depths, text_bytes = len(self.model.mtp), 0
        nats = torch.zeros(depths + 1, dtype=torch.float64)
        for rows in lay_out(self.held_out, self.config.micro_tokens, depths, self.packed):
            with autocast(self.precision):
                nats += torch.stack(self._nats(rows)[0])
            text_bytes += int(self._byte_lengths[rows.targets[0][rows.targets[0] != IGNORE]].sum())
        first, *others = (nats / torch.tensor(target_counts(self.held_out, depths)).clamp(min=1)).tolist()
        figures = {"val_loss": first, "bits_per_byte": bits_per_byte(float(nats[0]), max(1, text_bytes))}
        return {**figures, "val_mtp_loss": fmean(others)} if others else figures


def describe(stage: FineTuning, data: Data, tok: Tokenizer, meter: Meter) -> Table:
    """Everything derived, before anything runs."""
    config, shape = stage.config, stage.model.config
    count = parameters(shape)
    every = [*stage.training, *stage.held_out]
    tokens, learned = (sum(sizes) for sizes in zip(*((len(e.ids), int(e.mask.sum())) for e in every), strict=True))
    ended = sum(bool(example.mask[-1]) and example.ids[-1] == tok.eos_id for example in every)
    work = config.epochs * stage.flops(stage.training)
    hours = device_hours(work, meter.device, peak_share=0.3) / meter.count
    table = Table(title="fine-tuning, derived from the settings", title_justify="left", show_header=False)
    for key, value in (
        ("model", f"{count.total:,} parameters, {count.active:,} active, MTP {count.mtp if stage.depths else 0:,}"),
        ("data", f"{data.lines:,} lines, {len(every):,} examples, {tokens:,} tokens, {learned:,} carry loss"),
        ("left out", f"{len(data.bad):,} bad lines, {len(data.long):,} too long"),
        ("end of text", f"carries loss in {ended:,} of {len(every):,} examples"),
        ("held out", f"{len(stage.held_out):,} examples"),
        ("steps", f"{stage.steps}: {config.epochs} epochs of {stage.per_epoch}, up to {config.batch} examples each"),
        ("layout", "packed, each example sees only itself" if stage.packed else "padded: no kernels on this machine"),
        ("lr", f"{stage.warmup} steps to {config.lr:g}, cosine to {config.lr * FIRST_TAIL:g}"),
        ("work", f"{work:.3g} FLOP; {hours:.2g} h and ${hours * meter.usd_per_hour:.2g} at 30 % of peak"),
    ):
        table.add_row(key, value)
    return table


def train_sft(
    config: SFTConfig,
    parent: Path,
    data_files: Sequence[Path],
    out: Path,
    meter: Meter,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train the model of checkpoint `parent` on `data_files` and those of the settings into `out`, or go on where a
    killed call was; a call after the last step changes nothing. Returns where the metrics ended."""
    sources = [*data_files, *map(Path, config.data)]
    if not sources:
        raise ConfigError("no data: name JSONL files in data, or stages that make some in inputs")
    files = _repeated(sources, config.repeats)
    tok, console = Tokenizer.load(parent), console or Console()
    model = load_model(parent)
    check_tokenizer(model.config, tok.vocab_size, parent)
    room = model.config.max_position_embeddings
    if (config.length or 0) > room:
        raise ConfigError(f"length = {config.length} is over the model's context of {room}: lower it")
    data = read_examples(
        files, tok, longest=config.length or room, template=config.template, bad_lines=config.bad_lines,
        too_long=config.too_long,
    )  # fmt: skip
    training, held_out = split(data.examples, config.held_out, config.seed)
    stage = FineTuning(config, model, tok, training, held_out)
    loop = Loop(
        out,
        steps=stage.steps,
        identity=_identity(stage, files, parent),
        meter=meter,
        guard=lambda: Guard(GuardConfig(spike=config.on_spike)),
        headline=("loss", "val_loss", "tokens_per_s"),
        save_seconds=config.save_seconds,
    )
    _announce(stage, data, tok, out, meter, console)
    loop.run(stage)
    checkpoint = out / "checkpoint"
    if not checkpoint.exists():  # it appears whole or not at all
        save_model(model, checkpoint, tokenizer=tok)
    last = read_jsonl(out / "metrics.jsonl")[-1]
    named = ("tokens", "loss", "mtp_loss", "val_loss", "val_mtp_loss", "bits_per_byte")
    return {"examples": len(training), **{key: last[key] for key in named if key in last}}


def _repeated(files: Sequence[Path], repeats: Mapping[str, int]) -> list[Path]:
    """Each file as often as it is to be read."""
    unknown = sorted(set(repeats) - set(map(str, files)))
    if unknown:
        raise ConfigError(f"repeats: {unknown[0]} is not among the data; choose of {', '.join(map(str, files))}")
    return [file for file in files for _ in range(repeats.get(str(file), 1))]


def _announce(stage: FineTuning, data: Data, tok: Tokenizer, out: Path, meter: Meter, console: Console) -> None:
    """Say what will be trained on, and leave it in the directory."""
    for reason in itertools.islice(itertools.chain(data.bad, data.long), 5):
        console.print(f"left out: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not stage.held_out and stage.config.held_out:
        console.print("one question alone: nothing is held out", style="yellow")
    console.print(describe(stage, data, tok, meter))
    if (out / "metrics.jsonl").exists():
        return
    console.print(shown(stage.training[0], tok))
    out.mkdir(parents=True, exist_ok=True)
    counts = {"lines": data.lines, "examples": len(stage.training), "held_out": len(stage.held_out)}
    learned = target_counts(stage.training, 0)[0]
    counts |= {"tokens": sum(len(example.ids) for example in stage.training), "trained_tokens": learned}
    write_json(out / "data.json", {**counts, "bad_lines": data.bad, "too_long": data.long})
    write_whole(out / "samples.md", preview(stage.training[:SHOWN], tok))


def _identity(stage: FineTuning, files: Sequence[Path], parent: Path) -> dict[str, Any]:
    """Everything the result depends on."""
    by_files = ("data", "repeats")  # their digest says it
    settings = {key: value for key, value in to_dict(stage.config).items() if key not in (*OUTCOME_FREE, *by_files)}
    settings["precision"] = stage.precision  # another day's measurement may decide otherwise
    return {**settings, "examples": digest(files), "parent": weights_digest(parent)}
