"""What a row of benchmarks/serve.py says: are the outputs those of one function, how fast is each side, how close to
the machine's limits.

A case is prompts that run together and tokens after each. Prompts are random and new for every call, so that no cache
can know them. Decode is the time of all tokens less that of the first.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.files import CONFIGS
from benchmarks.serving.side import Absent, Busy, Side
from sputnik.cost import forward_flops_per_token, parameters, step_bytes
from sputnik.hardware import CpuSpeed

BITS: Mapping[str, float] = {"bf16": 16, "fp32": 32, "q4_1": 5.85, "q4_0": 5.45}
"""Per weight; of the 4-bit files the average over all tensors, the 8-bit embedding included."""
BOUNDS: Mapping[str, tuple[float, float]] = {"smollm2": (0.93, 0.01), "mini": (0.8, 0.03), "tiny": (0.8, 0.03)}
"""The least share of our tokens that are the peer's choice too, and the most nats they may lie behind it on average.

What bf16 alone does: 99 % and 0.0002 for SmolLM2; 84 to 92 % and 0.005 to 0.02 for random V3 weights, whose best tokens
are close. A gate with softmax in place of sigmoid, or experts chosen without groups: 41 % and 0.1.
"""
SETTLE = 0.5
"""Seconds before a side's turn: threads of the one before may look for work for a while (OpenMP's for 0.2 s)."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `prompt` tokens each; new > 1 times what follows the first new token, new = 1 the prompts."""

    name: str
    model: str
    weights: str
    batch: int
    prompt: int
    new: int
    goal: float
    stretch: float
    peers: tuple[str, ...]
    """NAME, or NAME:WEIGHTS where the peer runs other weights than we do."""

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.batch * (self.new - 1 if self.new > 1 else self.prompt)


@dataclass(frozen=True)
class Bench:
    """What every row needs: the machine, how often to repeat, where to say how far we are."""

    speed: CpuSpeed
    rounds: int
    dice: random.Random
    report: Callable[[str], None]

    def prompts(self, model: str, count: int, length: int) -> list[list[int]]:
        vocabulary = CONFIGS[model].vocab_size
        return [[self.dice.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]

    def compare(self, case: Case, ours: Side | None, theirs: Side | None, their_weights: str = "") -> Row:
        """The figures of a row; either side may be missing, and the peer may run other weights."""
        sides = [side for side in (ours, theirs) if side]
        rates: dict[Side, list[float]] = {side: [] for side in sides}
        for number in range(self.rounds + 1):
            if number == 1:  # round 0 warms up
                busy = Busy(sides)
            for side in sides if number % 2 else sides[::-1]:
                rates[side].append(self.rate(case, side))
            self.report(f"{case.name} round {number}: " + ", ".join(f"{s.name} {rates[s][-1]:.1f}" for s in sides))
        mine, peer = ([] if side is None else rates[side][1:] for side in (ours, theirs))
        figures = summary(mine, peer) | {"start_s": [side and round(side.start_s, 1) for side in (ours, theirs)]}
        pairs = (figures["ours"], case.weights), (figures["theirs"], their_weights or case.weights)
        figures["bandwidth_share"] = [rate and self.bandwidth_share(case, rate, weights) for rate, weights in pairs]
        figures["gemm_share"] = [rate and self.gemm_share(case, rate) for rate, _ in pairs]
        return figures | {"other_cores": round(busy.others(), 2)}

    def rate(self, case: Case, side: Side) -> float:
        """Tokens a second, of threads that are awake. The prompts of all calls differ, or a prefix cache would make the
        later ones free."""
        time.sleep(SETTLE)
        asked = [1, case.new] if case.new == 1 else [1, case.new, 1]
        _, seconds, *first = (
            side.ask("generate", prompts=self.prompts(case.model, case.batch, case.prompt), new=new)[0] for new in asked
        )
        return case.tokens / (seconds - sum(first))

    def check(self, case: Case, ours: Side, judge: Side) -> str:
        """How our greedy tokens stand with the judge, who reads them as a prompt; raises Absent when they stand badly.

        Decode is checked with as many sequences at once as are timed, from short prompts, so that the model reads
        mostly its own words; of long prompts the first eight tokens after them are.
        """
        length, new, count = (4, 64, max(4, case.batch)) if case.new > 1 else (case.prompt, 8, 16)
        prompts, answers = self.prompts(case.model, count, length), []
        for i in range(0, count, case.batch):
            answers += ours.ask("generate", prompts=prompts[i : i + case.batch], new=new)[1]
        if [len(ids) for ids in answers] != [new] * count:
            raise Absent(f"outputs differ: {new} tokens wanted, {sorted({len(ids) for ids in answers})} came")
        sequences = [prompt + ids for prompt, ids in zip(prompts, answers, strict=True)]
        gaps = [gap for row in judge.ask("score", sequences=sequences, start=length)[1] for gap in row]
        return verdict(gaps, *BOUNDS[case.model])

    # --- limits ------------------------------------------------------------------------------------------------------

    def bandwidth_share(self, case: Case, rate: float, weights: str) -> float:
        """Share of the measured read bandwidth that weights and cache take at this rate."""
        tokens, context = case.batch * case.prompt, 0
        if case.new > 1:
            tokens, context = case.batch, case.batch * (case.prompt + case.new // 2)
        read = step_bytes(CONFIGS[case.model], tokens, context, BITS[weights] / 8, 2)
        return round(rate / tokens * read / self.speed.bandwidth, 3)

    def gemm_share(self, case: Case, rate: float) -> float:
        """Share of the faster of the measured bf16 and fp32 matrix products."""
        config = CONFIGS[case.model]
        flops = forward_flops_per_token(config, case.prompt + case.new)
        if case.new == 1:
            flops -= 2 * parameters(config).embedding * (1 - case.batch / case.tokens)  # logits of last tokens only
        return round(rate * flops / max(self.speed.bf16, self.speed.fp32), 3)


def verdict(gaps: Sequence[float], least_share: float, most_behind: float) -> str:
    """`gaps`: log-probability of the judge's choice less that of our token, for each token."""
    share, mean = sum(gap == 0 for gap in gaps) / len(gaps), statistics.mean(gaps)
    behind = f"mean {mean:.4f}, max {max(gaps):.2f} nats behind"
    found = f"{share:.1%} of {len(gaps)} greedy tokens are the peer's choice too; {behind}"
    bounds = f"bounds {least_share:.0%} and {most_behind}"
    if share < least_share or mean > most_behind:
        raise Absent(f"outputs differ: {found}; {bounds}")
    return f"{found}; {bounds}"


def summary(ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """Medians, ranges, and the median and range of the ratios of rounds that ran side by side."""
    paired = sorted(o / t for o, t in zip(ours, theirs, strict=True)) if ours and theirs else []
    return {
        "ours": middle(ours), "theirs": middle(theirs), "ratio": middle(paired, 2),
        "ratio_range": [round(paired[0], 2), round(paired[-1], 2)] if paired else None,
        "ranges": [[round(min(rates), 1), round(max(rates), 1)] if rates else None for rates in (ours, theirs)],
    }  # fmt: skip


def middle(values: Sequence[float], digits: int = 1) -> float | None:
    return round(statistics.median(values), digits) if values else None
