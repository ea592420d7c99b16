"""One training step of a small DeepSeek-V3, ours and transformers', in trained tokens a second.

    python benchmarks/train_step.py [--dtype auto|bf16|fp32] [--rounds 15] [--threads 2] [--json]

The preset `mini` (59 million parameters, 26 million active) in both libraries, from the same weights on the same batch
of 8 x 256 tokens: forward pass, loss, backward pass, fused AdamW. bf16 is autocast on both sides; auto, the default, is
the type this CPU multiplies faster, again on both sides. Rounds alternate inside one process, so what else the machine
does hits both, and change places; `ratio` is the median of the paired ratios. Before anything is timed the two losses
and gradients must agree in fp32; `losses` shows where both are after training on the same batches.

The matrix products are the same on both sides, so the ratio depends on how fast the CPU multiplies: what is saved is
memory passes around them, and under bf16 also the experts, which transformers leaves in fp32 (autocast does not know
grouped products). `cpu_ratio` compares CPU seconds and bears a busy machine better than `ratio`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sputnik.engine.sampler import autocast
from sputnik.hardware import resolve_precision
from sputnik.model import kernels
from sputnik.model.config import ModelConfig
from sputnik.model.head import head_loss
from sputnik.model.transformer import Transformer

BATCH, LENGTH, GOAL, LR = 8, 256, 1.5, 1e-4


@dataclass(frozen=True)
class Round:
    """One step of one side, in seconds; `cpu` adds up all threads."""

    wall: float
    cpu: float
    loss: float


class Side:
    """A model, its loss and its optimiser."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor]) -> None:
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step(self, ids: Tensor, dtype: str) -> Round:
        wall, cpu = time.perf_counter(), time.process_time()
        with autocast(dtype):
            loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Round(time.perf_counter() - wall, time.process_time() - cpu, loss.item())


def make_sides() -> tuple[Side, Side]:
    """(ours, theirs) with the same weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = ModelConfig.preset("mini")
    ours = Transformer(config).init_weights(torch.Generator().manual_seed(0)).train()
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**config.to_hf())).train()
    theirs.load_state_dict(ours.state_dict())

    def our_loss(ids: Tensor) -> Tensor:
        hidden = ours.trunk(ids).hidden[:, :-1].flatten(0, 1)
        return head_loss(hidden, ours.lm_head.weight, ids[:, 1:].flatten()) / len(hidden)

    return Side(ours, our_loss), Side(theirs, lambda ids: theirs(input_ids=ids, labels=ids, use_cache=False).loss)


def batch(number: int) -> Tensor:
    """Random tokens of a few hundred kinds, so that there is something to learn."""
    return torch.randint(3, 500, (BATCH, LENGTH), generator=torch.Generator().manual_seed(number))


def check_equal(ours: Side, theirs: Side) -> float:
    """Largest relative difference of a gradient in fp32; raises if the two are not the same function."""
    ids, gradients = batch(0)[:2], []
    losses = []
    for side in (ours, theirs):
        loss = side.loss(ids)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in side.model.named_parameters() if p.grad is not None})
        side.model.zero_grad(set_to_none=True)
    if abs(losses[0] - losses[1]) > 1e-4 or gradients[0].keys() != gradients[1].keys():
        raise SystemExit(f"the two models differ: losses {losses}")
    difference = max(float((g - gradients[1][n]).norm() / g.norm()) for n, g in gradients[0].items())
    if difference > 1e-3:
        raise SystemExit(f"the two models differ: gradients by {difference:.1e} of their norm")
    return difference


def compare(dtype: str, rounds: int, report: Callable[[str], None]) -> dict[str, Any]:
    """`rounds` timed steps of each side after one that warms up; returns the JSON line."""
    import transformers

    ours, theirs = make_sides()
    difference = check_equal(ours, theirs)
    done: dict[Side, list[Round]] = {ours: [], theirs: []}
    for number in range(rounds + 1):
        ids = batch(number)
        for side in (ours, theirs) if number % 2 else (theirs, ours):
            done[side].append(side.step(ids, dtype))
        report(f"round {number}: ours {done[ours][-1].wall:.2f} s, theirs {done[theirs][-1].wall:.2f} s")
    mine, peer = done[ours][1:], done[theirs][1:]
    ratios = sorted(t.wall / m.wall for m, t in zip(mine, peer, strict=True))
    wall = [statistics.median(r.wall for r in side) for side in (mine, peer)]
    cpu = [statistics.median(r.cpu for r in side) for side in (mine, peer)]
    return {
        "case": "train_step", "peer": f"transformers {transformers.__version__}", "dtype": dtype,
        "ours": round(BATCH * LENGTH / wall[0], 1), "theirs": round(BATCH * LENGTH / wall[1], 1),
        "ratio": round(statistics.median(ratios), 2), "goal": GOAL, "unit": "tok/s",
        "ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)], "cpu_ratio": round(cpu[1] / cpu[0], 2),
        "step_s": [round(w, 3) for w in wall], "losses": [round(mine[-1].loss, 4), round(peer[-1].loss, 4)],
        "gradient_difference": float(f"{difference:.1e}"), "rounds": rounds, "threads": torch.get_num_threads(),
        "kernels": kernels.load(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON line, no progress on stderr")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: at least 1, after one that warms up")
    torch.set_num_threads(args.threads)
    quiet = args.json
    dtype = resolve_precision(args.dtype)
    print(json.dumps(compare(dtype, args.rounds, lambda text: None if quiet else print(text, file=sys.stderr))))


if __name__ == "__main__":
    main()
