"""The rows of benchmarks/serve.py that compare us with ourselves: prefix reuse, rollouts, memory, speculation."""

from pathlib import Path
from typing import Any

from benchmarks.serving.files import CONFIGS, Files
from benchmarks.serving.measure import BOUNDS, Bench, Row, summary, verdict
from benchmarks.serving.side import Absent, Side
from sputnik.cost import kv_bytes_per_token
from sputnik.hardware import resolve_precision

SHARED, QUESTION = 2000, 16
PROMPTS, SAMPLES, NEW = 64, 8, 256
REQUESTS = 10_000
MAX_GROWTH = 4 * 2**20
"""Bytes: half a kilobyte for each of the 8,000 requests between the two readings."""
MTP_PROMPTS = 32
MTP_TASK: dict[str, Any] = {"non_negative": True, "terms": (4, 8)}
"""What recipes/deep.toml's model has read: sums worked out at length, as a reasoning model answers."""


def prefix(bench: Bench, files: Files) -> Row:
    """Milliseconds to the first token of a prompt whose first 2,000 tokens are cached, against the same uncached."""
    with files.open("ours", "smollm2", "bf16") as ours:
        long, question = (bench.prompts("smollm2", 1, length)[0] for length in (SHARED, QUESTION))
        cold, hit = (ours.ask("generate", prompts=[long + question], new=32)[1] for _ in range(2))
        if cold != hit:
            raise Absent(f"outputs differ: cold {cold[0][:8]}..., from the cache {hit[0][:8]}...")
        seconds: tuple[list[float], list[float]] = [], []
        for number in range(bench.rounds + 1):
            long, *questions = bench.prompts("smollm2", 1, SHARED) + bench.prompts("smollm2", 2, QUESTION)
            for times, question in zip(seconds, questions, strict=True):
                times.append(ours.ask("generate", prompts=[long + question], new=1)[0])
            bench.report(f"prefix_hit round {number}: cold {seconds[0][-1]:.3f} s, hit {seconds[1][-1]:.4f} s")
    cold_ms, hit_ms = ([1000 * second for second in times[1:]] for times in seconds)
    ratios = summary(cold_ms, hit_ms)
    own = {"ours": ratios["theirs"], "theirs": ratios["ours"], "ranges": ratios["ranges"][::-1]}
    return ratios | own | {"outputs": "32 of 32 greedy tokens equal, cold and from the cache"}


def rollouts(bench: Bench, files: Files) -> Row:
    """Tokens a second of 64 prompts x 8 samples x 256 tokens, against the contiguous sampler."""
    weights = resolve_precision("auto")
    with files.open("rollouts", "tiny", weights) as ours, files.open("twin", "tiny", weights) as twin:
        prompts = bench.prompts("tiny", PROMPTS, 32)
        answers = ours.ask("generate", prompts=prompts, new=64)[1]
        scores = twin.ask("score", sequences=[p + ids for p, ids in zip(prompts, answers, strict=True)], start=32)[1]
        outputs = verdict([gap for row in scores for gap in row], *BOUNDS["tiny"])
        rates: dict[Side, list[float]] = {ours: [], twin: []}
        for number in range(bench.rounds + 1):
            prompts = bench.prompts("tiny", PROMPTS, 32)
            for side in (ours, twin) if number % 2 else (twin, ours):
                seconds, drawn = side.ask("sample", prompts=prompts, n=SAMPLES, new=NEW, seed=number)
                if drawn != PROMPTS * SAMPLES * NEW:
                    raise Absent(f"{side.name} drew {drawn} tokens, not {PROMPTS * SAMPLES * NEW}")
                rates[side].append(drawn / seconds)
            bench.report(f"rollouts round {number}: ours {rates[ours][-1]:.0f}, sampler {rates[twin][-1]:.0f}")
    return summary(rates[ours][1:], rates[twin][1:]) | {"weights": weights, "outputs": outputs}


def memory(bench: Bench, files: Files) -> Row:
    """Cache bytes per token against the formula, and what the process grows by over 10,000 requests."""
    formula = kv_bytes_per_token(CONFIGS["tiny"])
    with files.open("ours", "tiny", "bf16", 64) as ours:
        found = ours.ask("memory", requests=REQUESTS, seed=0)[1]
    growth = found["most"] - found["start"]
    row: Row = {"ours": found["per_token"], "theirs": formula, "ratio": round(found["per_token"] / formula, 4)}
    row["growth_bytes"] = growth
    return row | {"met": found["per_token"] == formula and growth <= MAX_GROWTH, "growth_bound": MAX_GROWTH}


def mtp(bench: Bench, files: Files, model: Path | None) -> Row:
    """Tokens a second with speculation against without, one request at a time, on questions of the model's own kind."""
    if model is None:
        raise Absent("no model: give --mtp FOLDER, a model trained here with its prediction module")
    prompts = _questions(model)
    with (
        files.open("ours", str(model), "bf16", 1, guesses=1) as fast,
        files.open("ours", str(model), "bf16", 1) as slow,
    ):
        rates: dict[Side, list[float]] = {fast: [], slow: []}
        for number in range(bench.rounds + 1):
            answers = []
            for side in (fast, slow) if number % 2 else (slow, fast):
                seconds, ids = side.ask("answer", prompts=prompts, most=256)
                rates[side].append(sum(map(len, ids)) / seconds)
                answers.append(ids)
            if answers[0] != answers[1]:
                raise Absent("outputs differ: greedy answers with and without speculation")
            bench.report(f"mtp round {number}: with {rates[fast][-1]:.1f}, without {rates[slow][-1]:.1f}")
        acceptance = fast.ask("acceptance")[1]
    row = summary(rates[fast][1:], rates[slow][1:])
    outputs = f"{len(prompts)} greedy answers equal, with and without speculation"
    return row | {"acceptance": round(acceptance, 3), "acceptance_goal": 0.8, "outputs": outputs}


def _questions(model: Path) -> list[list[int]]:
    from sputnik.tasks.base import load_task
    from sputnik.text.chat import render
    from sputnik.text.tokenizer import Tokenizer

    tok = Tokenizer.load(model)
    problems = load_task("arithmetic", MTP_TASK).problems("test", MTP_PROMPTS)
    return [list(render(tok, [{"role": "user", "content": problem.prompt}]).ids) for problem in problems]
