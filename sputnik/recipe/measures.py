"""Two small measuring stages, for claims that no score tells.

    speed         a checkpoint answers questions one after another, with and without its MTP modules guessing ahead
                  STAGE/speed.json: acceptance, tokens per second both ways, speed-up (V3 5.4.3)
    readability   of the answers an evaluation has kept, how many can a person read?
                  STAGE/readability.json: share of readable thoughts and of words in the language (R1 2.3.1, 2.3.2)

Speed is that of one reader: one sequence at a time, the two ways in turn, medians of the rounds, so that a neighbour on
the machine disturbs both. Left out: batches, where guessing pays less.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sputnik.config import from_dict
from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.errors import ConfigError, DataError
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.recipe.evidence import read_jsonl
from sputnik.recipe.runner import StageContext
from sputnik.tasks.base import load_task
from sputnik.text.quality import Readable, is_readable, language_share
from sputnik.train.state import write_json


@dataclass(frozen=True)
class SpeedConfig:
    """The parent answers `questions` of the test split, `rounds` times in each way."""

    task: str = "arithmetic"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    questions: int = 40
    rounds: int = 5
    guesses: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 96
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.questions, self.rounds, self.guesses) < 1:
            raise ConfigError("speed: questions, rounds and guesses must be at least 1")


def run_speed(config: SpeedConfig, context: StageContext) -> dict[str, Any]:
    """Measure the parent's checkpoint."""
    if context.parent is None:
        raise ConfigError("a speed stage needs a parent with a checkpoint; write parent = NAME")
    found = find_checkpoint(str(context.parent / "checkpoint"))
    plain = LLM(found.path, precision=config.precision)
    guessing = LLM(found.path, precision=config.precision, guesses=config.guesses, adaptive=False)
    if guessing.engine.speculation is None:
        raise ConfigError(f"{found.path}: this model has no MTP modules to guess with; set num_nextn_predict_layers")
    problems = load_task(config.task, config.task_options).problems("test", config.questions, config.seed)
    prompts = [problem.prompt for problem in problems]
    rates: dict[str, list[float]] = {"plain": [], "guessing": []}
    texts: dict[str, list[list[int]]] = {}
    for _ in range(config.rounds):
        for name, llm in (("plain", plain), ("guessing", guessing)):
            rate, texts[name] = _round(llm, prompts, config)
            rates[name].append(rate)
    metrics = guessing.engine.metrics.read()
    equal = fmean(a == b for a, b in zip(texts["plain"], texts["guessing"], strict=True))
    figures = {
        "acceptance": metrics["acceptance_1"],
        "plain_tokens_per_s": median(rates["plain"]),
        "tokens_per_s": median(rates["guessing"]),
        "speed_up": median(rates["guessing"]) / median(rates["plain"]),
        "equal_answers": equal,
    }
    write_json(context.directory / "speed.json", {**figures, "rounds": rates})
    return figures


def _round(llm: LLM, prompts: list[str], config: SpeedConfig) -> tuple[float, list[list[int]]]:
    """(tokens per second of the engine's own time, ids of each answer); nothing is left in the prefix cache before."""
    llm.engine.scheduler.forget()
    metrics = llm.engine.metrics
    tokens, seconds = metrics.drawn_tokens, metrics.busy_seconds
    answers = []
    for place, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens, seed=config.seed + place
        )
        answers.append(llm.chat([{"role": "user", "content": prompt}], params).outputs[0].ids)
    return (metrics.drawn_tokens - tokens) / (metrics.busy_seconds - seconds), answers


@dataclass(frozen=True)
class ReadabilityConfig:
    """`readable` changes fields of `Readable` (text/quality.py)."""

    language: str = "en"
    readable: Mapping[str, Any] = field(default_factory=dict)


def run_readability(config: ReadabilityConfig, context: StageContext) -> dict[str, Any]:
    """Read the answers of the parent, an evaluation."""
    samples = context.parent / "samples.jsonl" if context.parent else Path()
    if not samples.is_file():
        raise ConfigError("a readability stage needs an eval stage as its parent; write parent = NAME")
    rules = from_dict(Readable, {"language": config.language, **config.readable}, "readable")
    thoughts = [line["thinking"] for line in read_jsonl(samples) if line.get("finish") == "stop"]
    if not thoughts:
        raise DataError(f"{samples}: no answer came to an end, so there is nothing to read")
    reasons = Counter(reason for thought in thoughts if (reason := is_readable(thought, rules)) is not None)
    figures = {
        "readable": 1 - reasons.total() / len(thoughts),
        "language": fmean(language_share(thought, config.language) for thought in thoughts),
        "thoughts": len(thoughts),
    }
    write_json(context.directory / "readability.json", {**figures, "reasons": dict(reasons.most_common())})
    return figures
