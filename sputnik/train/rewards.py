"""What an answer earns: parts that are simply added up, each named in metrics and rollouts.

| part | of | value |
|---|---|---|
| accuracy | questions of a task | 1 if the verifier says CORRECT (R1 2.2) |
| format | all | 1 for the template's form (R1 2.2) |
| language | all, if weighed | share of the thought's words that are of the target language (R1 2.3.2) |
| overlong | all, if the objective asks | DAPO's penalty near the length limit |
| helpful, safe | open prompts | score of a reward model, in standard deviations of its training answers (R1 B.2) |

Parts are unweighted where they are shown; `RewardConfig` has the weights. R1-Zero is accuracy + format. Open prompts
have no gold answer and take part only from a late step on, as in R1's last RL stage: longer leads to reward hacking.
Helpfulness is judged on the final answer, safety on the whole output (train/scorer.py sees to both).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sputnik.errors import CheckpointError, ConfigError, DataError
from sputnik.eval.harness import Answer
from sputnik.model.config import ModelConfig
from sputnik.tasks.base import Problem, hash_of
from sputnik.text.preferences import conversation
from sputnik.text.quality import language_share
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.examples import read_records
from sputnik.train.scorer import RewardModel

PART_OF: Mapping[str, str] = {"pairwise": "helpful", "pointwise": "safe"}
"""Kind of reward model -> part of the reward."""


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the parts, and when open prompts take part."""

    accuracy: float = 1.0
    format: float = 1.0
    language: float = 0.0
    """R1's second and last RL stages add the language part with weight 1."""
    target: str = "en"
    """Language of the thoughts; see `sputnik/text/quality.py`."""
    helpful: float = 1.0
    safe: float = 1.0
    general_from: int = 0
    """First step with open prompts, 0 for none. R1: the last 400 of 1,700 steps."""
    general_share: float = 0.25
    """Of the questions of such a step."""

    def __post_init__(self) -> None:
        language_share("", self.target)  # a language nobody can tell is refused now
        for name in ("accuracy", "format", "language", "helpful", "safe", "general_from"):
            if getattr(self, name) < 0:
                raise ConfigError(f"rewards: {name} = {getattr(self, name)}: it must not be negative")
        if not 0 < self.general_share <= 1:
            raise ConfigError(f"rewards: general_share = {self.general_share}: choose a share above 0, at most 1")

    def total(self, parts: Mapping[str, float]) -> float:
        weights = {"accuracy": self.accuracy, "format": self.format, "language": self.language}
        weights |= {"helpful": self.helpful, "safe": self.safe, "overlong": 1.0}
        return sum(weights[name] * value for name, value in parts.items())

    def open_prompts(self, step: int, questions: int) -> int:
        """How many of the questions of `step` are open prompts."""
        if not self.general_from or step < self.general_from:
            return 0
        return max(1, round(self.general_share * questions))


def rule_parts(answer: Answer, config: RewardConfig, max_tokens: int, overlong_share: float) -> dict[str, float]:
    """The parts that rules give. A thought that is empty is of no language."""
    parts = {"format": float(answer.completion.well_formed)}
    if not isinstance(answer.problem, OpenPrompt):
        parts = {"accuracy": float(answer.correct), **parts}
    if config.language:
        thought = answer.completion.thinking
        parts["language"] = language_share(thought, config.target) if thought else 0.0
    if overlong_share:
        parts["overlong"] = overlong_penalty(len(answer.generation.ids), max_tokens, overlong_share)
    return parts


def overlong_penalty(length: int, max_tokens: int, share: float) -> float:
    """DAPO's soft punishment: 0 up to the last `share` of the limit, then linearly down to -1 at the limit."""
    buffer = share * max_tokens
    return -min(1.0, max(0.0, (length - (max_tokens - buffer)) / buffer)) if buffer else 0.0


# --- open prompts ---


@dataclass(frozen=True, kw_only=True)
class OpenPrompt(Problem):
    """A question without a gold answer: nothing verifies what is said to it, reward models judge it."""

    gold: str = ""


def read_prompts(files: Sequence[Path]) -> list[OpenPrompt]:
    """The lines {"prompt": TEXT, "kind"?: TEXT} of the files, each prompt once; the first that is none is an error."""
    found = read_records(files, _open_prompt, "drop")
    if found.bad:
        raise DataError(f'{found.bad[0]}; an open prompt is {{"prompt": TEXT}}')
    once: dict[str, OpenPrompt] = {}
    for _, prompt in found.kept:
        once.setdefault(prompt.id, prompt)
    return list(once.values())


def _open_prompt(record: Mapping[str, Any]) -> OpenPrompt:
    prompt = conversation({"prompt": record.get("prompt")})[0]["content"]
    meta = {"kind": str(record["kind"])} if "kind" in record else {}
    return OpenPrompt(prompt=prompt, meta=meta, id=f"{hash_of(prompt):016x}")


class Judges:
    """The reward models of a run, at most one for each part."""

    def __init__(self, models: Sequence[RewardModel]) -> None:
        self.models = {PART_OF[model.card.kind]: model for model in models}
        if len(self.models) < len(models):
            kinds = " and ".join(model.card.kind for model in models)
            raise ConfigError(f"reward models: {kinds}; give at most one of each kind")

    @property
    def shapes(self) -> list[ModelConfig]:
        """Of the models that read each answer."""
        return [model.backbone.config for model in self.models.values()]

    @classmethod
    def load(cls, paths: Sequence[Path], tok: Tokenizer, template: str, precision: str) -> "Judges":
        """ConfigError or CheckpointError where one could not read what this policy writes."""
        judges = cls([RewardModel.load(path, precision) for path in paths])
        for path, model in zip(paths, judges.models.values(), strict=True):
            if model.tok.vocab_size != tok.vocab_size or any(
                model.tok.token_bytes((id,)) != tok.token_bytes((id,)) for id in range(tok.vocab_size)
            ):
                raise CheckpointError(f"{path}: its tokenizer is not the policy's; train it on a model of this family")
            if model.card.template != template:
                raise ConfigError(f"{path}: reads template {model.card.template!r}, but the policy writes {template!r}")
        return judges

    def parts(self, answers: Sequence[Answer]) -> list[dict[str, float]]:
        """Scores of each answer. One that says nothing (cut off, no final answer) is as little help as the least
        helpful of these: not finishing must never pay."""
        found: list[dict[str, float]] = [{} for _ in answers]
        for name, model in self.models.items():
            places = [i for i, answer in enumerate(answers) if name == "safe" or _says_something(answer)]
            if not places:
                continue
            asked = [answers[i].generation for i in places]
            scores = model.standardised(model.score([each.prompt for each in asked], [each.ids for each in asked]))
            least = min(filter(math.isfinite, scores), default=0.0)
            for parts in found:
                parts[name] = least
            for place, score in zip(places, scores, strict=True):
                found[place][name] = score
        return found


def _says_something(answer: Answer) -> bool:
    completion = answer.completion
    return not completion.truncated and completion.closed and bool(completion.answer)
