"""Training of reward models (R1 3.1): pairwise by Bradley and Terry for helpfulness, pointwise for safety.

    figures = train_reward_model(RewardModelConfig(form="pairwise"), parent, [Path("pairs.jsonl")], out, meter)

Pairwise loss: -log sigmoid(score of the chosen - score of the rejected answer), on pairs balanced so that length says
nothing. Pointwise: binary cross-entropy. Prompts held out by their hash give the accuracy in STAGE/scores.json, beside
what length alone would get; docs/reward-models.md explains it. The model is train/scorer.py, its data
train/reward_data.py.

Left out: judging by another model, which the report has V3 do; training of the MTP modules, which stay the parent's.
"""

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from sputnik.config import to_dict
from sputnik.cost import Meter, forward_flops_per_token, training_flops_per_token
from sputnik.errors import ConfigError
from sputnik.eval.judging import label_report, pair_report
from sputnik.eval.stats import Interval
from sputnik.text.preferences import Kind
from sputnik.text.templates import check_template
from sputnik.train.examples import Policy, digest
from sputnik.train.guards import Guard, GuardConfig, first_non_finite
from sputnik.train.loop import Loop, Read
from sputnik.train.optim import adamw, clip_gradients, load_optimizer_tensors, optimizer_tensors, set_lr
from sputnik.train.reward_data import Data, Unit, gather
from sputnik.train.schedule import cosine, warmup_steps
from sputnik.train.scorer import Card, RewardModel, cut
from sputnik.train.state import derive_seed, load_module_tensors, module_tensors, write_json

__all__ = ["RewardModel", "RewardModelConfig", "train_reward_model"]

OUTCOME_FREE = ("save_seconds",)
GRAD_SPIKE = 1000.0
"""Times the median: once nearly all is judged rightly, a single mistake makes a step of 30 times that, and no harm."""
SCALE_SAMPLE = 1024
"""Training items whose scores give mean and standard deviation."""
SHOWN = 12
"""Mistakes in scores.json, and lines that could not be read."""


@dataclass(frozen=True)
class RewardModelConfig:
    """The published run: 66,000 pairs or 106,000 labels, batch 256, lr 6e-6, one epoch, 8,192 tokens."""

    form: Kind = "pairwise"
    """pairwise: from preference pairs, for helpfulness; pointwise: from safety labels."""
    data: tuple[str, ...] = ()
    """JSONL files beside those of the stage's inputs; see docs/reward-models.md."""
    template: str = "chat"
    epochs: float = 1.0
    batch: int = 32
    """Pairs or labels in a step."""
    lr: float = 5e-4
    """The published 6e-6 is for 671 billion parameters; smaller models want more."""
    weight_decay: float = 0.1
    max_tokens: int = 512
    """A longer dialogue, prompt included, is left out and counted."""
    balance_lengths: bool = True
    """Drop pairs until length says nothing about which answer was chosen."""
    held_out: float = 0.1
    """Share of the prompts that are scored and not trained on, where no held-out files are given."""
    bad_lines: Policy = "refuse"
    """refuse a file with a line that cannot be read, or drop and count such lines."""
    evaluations: int = 4
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    save_seconds: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_template(self.template)
        for name in ("epochs", "batch", "lr", "max_tokens", "evaluations"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: set it above 0")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out = {self.held_out}: choose a share between 0 and 1")


class RewardTraining:
    """The stage that `Loop` drives."""

    def __init__(self, config: RewardModelConfig, model: RewardModel, data: Data) -> None:
        self.config = config
        self.model = model
        self.data = data
        self.steps = math.ceil(len(data.train) * config.epochs / config.batch)
        self.optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
        self._last: list[Unit] = []

    # --- what the loop calls ---

    def before(self) -> dict[str, Any]:
        return {}

    def step(self, step: int, loop: Loop) -> dict[str, Any]:
        began = time.perf_counter()
        self._last = self.units(loop.data_step(step))
        loss, right = self.accumulate(self._last)
        grad_norm = clip_gradients(self.model)
        lr = self.lr(step)
        metrics: dict[str, Any] = {"loss": loss, "accuracy": right, "grad_norm": grad_norm, "lr": lr}
        if math.isfinite(loss) and math.isfinite(grad_norm):
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        else:
            metrics["non_finite"] = first_non_finite(self.model, {"loss": torch.tensor(loss)})
        dialogues = [len(dialogue) for unit in self._last for dialogue in unit.dialogues]
        shape = self.model.backbone.config
        loop.meter.add(tokens=sum(dialogues), flops=sum(n * training_flops_per_token(shape, n) for n in dialogues))
        metrics["tokens_per_s"] = sum(dialogues) / (time.perf_counter() - began)
        if step * self.config.evaluations // self.steps > (step - 1) * self.config.evaluations // self.steps:
            report = self.report(loop.meter)
            metrics |= {"validation": report["accuracy"], "val_loss": report["loss"]}
        return metrics

    def batch(self) -> dict[str, Tensor]:
        rows = [torch.tensor(dialogue.ids) for unit in self._last for dialogue in unit.dialogues]
        return {f"{number}.ids": ids for number, ids in enumerate(rows)}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        return {"model": module_tensors(self.model), "optimizer": optimizer_tensors(self.optimizer, self.model)}, {}

    def load(self, read: Read, plain: Mapping[str, Any]) -> None:
        load_module_tensors(self.model, read("model"))
        load_optimizer_tensors(self.optimizer, self.model, read("optimizer"))

    # --- one step ---

    def units(self, data_step: int) -> list[Unit]:
        """The batch of a step: the training items in an order of their own for each epoch, end to end."""
        count, found = len(self.data.train), list[Unit]()
        for place in range((data_step - 1) * self.config.batch, data_step * self.config.batch):
            found.append(self.data.train[self._order(place // count)[place % count]])
        return found

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.data.train)))
        random.Random(derive_seed(self.config.seed, "order", epoch)).shuffle(order)
        return order

    def lr(self, step: int) -> float:
        """Warm-up, then a cosine to a tenth, as the report fine-tunes."""
        warmup = min(1.0, step / warmup_steps(self.steps))
        return warmup * cosine((step - 1) / self.steps, self.config.lr, self.config.lr / 10)

    def accumulate(self, units: Sequence[Unit]) -> tuple[float, float]:
        """Gradients of the mean loss over all units, one micro-batch after another; returns it and the share right."""
        self.optimizer.zero_grad(set_to_none=True)
        total, right = 0.0, 0.0
        lengths = [unit.longest for unit in units]
        for places in cut(sorted(range(len(units)), key=lengths.__getitem__), lengths):
            part = [units[place] for place in places]
            losses, correct = self.losses(part, self.model([each for unit in part for each in unit.dialogues]))
            (losses.sum() / len(units)).backward()  # type: ignore[no-untyped-call]
            total += float(losses.detach().sum())
            right += float(correct.sum())
        return total / len(units), right / len(units)

    def losses(self, units: Sequence[Unit], scores: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) losses of the units, and whether each is judged rightly (1/2 for a tie)."""
        if self.config.form == "pairwise":
            chosen, rejected = scores.view(-1, 2).unbind(1)
            gap = chosen - rejected
        else:
            gap = scores * torch.tensor([1.0 if unit.source.safe else -1.0 for unit in units])
        return F.softplus(-gap), (gap.detach().sign() + 1) / 2

    # --- looking at it ---

    def scores(self, units: Sequence[Unit], meter: Meter) -> list[tuple[float, ...]]:
        """Of each answer of each unit."""
        flat = [dialogue for unit in units for dialogue in unit.dialogues]
        found = iter(self.model.score_dialogues(flat))
        shape = self.model.backbone.config
        meter.add(flops=sum(len(each) * forward_flops_per_token(shape, len(each)) for each in flat))
        return [tuple(next(found) for _ in unit.dialogues) for unit in units]

    def report(self, meter: Meter) -> dict[str, Any]:
        """Accuracy and what belongs to it, on the held-out units; `mistakes` are the gravest."""
        units = self.data.held_out
        scores = self.scores(units, meter)
        keys, groups = [unit.source.key for unit in units], [unit.source.group for unit in units]
        if self.config.form == "pairwise":
            gaps = [chosen - rejected for chosen, rejected in scores]
            lengths = [unit.lengths for unit in units]
            found = pair_report(scores, lengths, keys, groups)  # type: ignore[arg-type]
        else:
            gaps = [each[0] if unit.source.safe else -each[0] for unit, each in zip(units, scores)]
            safe = [unit.source.safe for unit in units]
            found = label_report([s for (s,) in scores], safe, [unit.lengths[0] for unit in units], keys, groups)
        worst = sorted((gap, place) for place, gap in enumerate(gaps) if gap < 0)[:SHOWN]
        found["mistakes"] = [{**asdict(units[place].source), "scores": scores[place]} for _, place in worst]
        return found

    def card(self, meter: Meter) -> Card:
        """With mean and spread of the scores of training answers."""
        places = range(len(self.data.train))
        sample = random.Random(self.config.seed).sample(places, min(SCALE_SAMPLE, len(places)))
        values = [score for unit in self.scores([self.data.train[i] for i in sample], meter) for score in unit]
        return replace(self.model.card, mean=fmean(values), std=pstdev(values) or 1.0)


def describe(config: RewardModelConfig, stage: RewardTraining) -> Table:
    """Everything derived, before anything runs."""
    table = Table(title="reward model, derived from the settings", title_justify="left", show_header=False)
    data = stage.data
    for key, value in (
        ("judges", "the final answer, in pairs" if config.form == "pairwise" else "the whole output: safe or not"),
        ("data", ", ".join(f"{name} {count}" for name, count in data.counts.items())),
        ("steps", f"{stage.steps} of {config.batch}"),
        ("learning rate", f"{config.lr:g}, cosine to {config.lr / 10:g}, warm-up {warmup_steps(stage.steps)} steps"),
    ):
        table.add_row(key, value)
    return table


def train_reward_model(
    config: RewardModelConfig,
    parent: Path,
    files: Sequence[Path],
    out: Path,
    meter: Meter,
    console: Console | None = None,
    held_out: Sequence[Path] = (),
) -> dict[str, Any]:
    """Train on `files` and `config.data` into `out` (metrics, saves, checkpoint, scores.json), or go on where a killed
    call was. Without `held_out` files a share of the prompts is set aside. Returns the figures of the lineage."""
    if not files and not config.data:
        raise ConfigError(f"a {config.form} reward model needs data: JSONL files, or a stage that makes them as input")
    model = RewardModel.of(parent, config.form, config.template, config.precision)
    data = gather(
        model, [*files, *map(Path, config.data)], held_out, share=config.held_out, max_tokens=config.max_tokens,
        balanced=config.balance_lengths, bad_lines=config.bad_lines, seed=config.seed,
    )  # fmt: skip
    stage = RewardTraining(config, model, data)
    loop = Loop(
        out,
        steps=stage.steps,
        identity=_identity(config, stage, parent),
        meter=meter,
        guard=lambda: Guard(GuardConfig(grad_spike=GRAD_SPIKE)),
        headline=("loss", "accuracy", "tokens_per_s"),
        save_seconds=config.save_seconds,
    )
    console = console or Console()
    console.print(describe(config, stage))
    for line in data.bad[:SHOWN]:
        console.print(f"    left out: {line}", style="yellow", markup=False)
    loop.run(stage)
    if not ((out / "checkpoint").exists() and (out / "scores.json").exists()):
        card = stage.card(meter)
        scores = stage.report(meter) | {"mean": card.mean, "std": card.std}
        model.save(out / "checkpoint", card)
        write_json(out / "scores.json", {"kind": config.form, "counts": dict(data.counts), **scores})
    return figures(json.loads((out / "scores.json").read_text(encoding="utf-8")))


def figures(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The few of scores.json that a reader wants first: accuracy, and what a judge gets that reads nothing."""
    found = {"accuracy": str(Interval(**scores["accuracy"]))}
    if scores["kind"] == "pairwise":
        return found | {"length_baseline": scores["length_baseline"], "loss": scores["loss"]}
    error = scores["calibration"]["expected_error"]
    return found | {"majority": scores["majority"], "calibration_error": error, "loss": scores["loss"]}


def _identity(config: RewardModelConfig, stage: RewardTraining, parent: Path) -> dict[str, Any]:
    """Everything the result depends on; where the data lie is no part of it."""
    settings = {key: value for key, value in to_dict(config).items() if key not in (*OUTCOME_FREE, "data")}
    settings["precision"] = stage.model.precision  # another day's measurement may decide otherwise
    files_of = parent.iterdir() if parent.is_dir() else [parent]
    weights = sorted(file for file in files_of if file.suffix in (".safetensors", ".gguf"))
    return {**settings, "data": stage.data.digest, "parent": digest(weights)}
