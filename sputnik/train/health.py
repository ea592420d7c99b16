"""What a step's answers look like: the figures by which one sees reinforcement learning go well or wrong.

Wrong, cut off and not judgeable are counted apart; lengths are told for right and wrong answers too, for answers that
grow because wrong ones do are no thinking. Figures of the task leave open prompts out, whose own begin with `general_`.
Those of the updates (entropy, KL, clipping, distance between sampler and trainer) come from train/learner.py; what is
made of all of them from train/guards.py.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sputnik.tasks.base import Task
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.rollout import Group, Sample, is_useful


def rollout_metrics(groups: Sequence[Group], task: Task, tok: Tokenizer) -> dict[str, Any]:
    """Parts of the reward are told as shares, whatever their weights: `accuracy_reward`, `format_reward`, ..."""
    every = [sample for group in groups for sample in group]
    samples = [sample for sample in every if not sample.open]
    if not every:
        return {"verdicts": {}, "useful_groups": 0.0}
    shared = {
        "useful_groups": mean(is_useful(group) for group in groups),
        "unjudged_groups": mean(sum(sample.judged for sample in group) < 2 for group in groups),
    }
    return {**_of_task(samples, task, tok), **shared, **_of_open([sample for sample in every if sample.open])}


def _of_task(samples: Sequence[Sample], task: Task, tok: Tokenizer) -> dict[str, Any]:
    if not samples:
        return {"verdicts": {}}
    finished = [sample for sample in samples if sample.generation.finish == "stop"]
    return {
        "reward": mean(sample.reward for sample in samples),
        **_parts(samples),
        "verdicts": dict(Counter(sample.judgement.verdict.value for sample in samples)),
        "length": _length(samples),
        "length_finished": _length(finished),
        **_lengths_by_verdict(samples),
        "thinking_length": mean(sample.thinking_length(tok) for sample in samples),
        "truncated": 1 - len(finished) / len(samples),
        "self_check": mean(task.task_of(sample.problem).self_checks(sample.completion.thinking) for sample in samples),
        **_families(samples),
    }


def _parts(samples: Sequence[Sample]) -> dict[str, float]:
    names = dict.fromkeys(name for sample in samples for name in sample.rewards)
    penalties = {"overlong"}  # a punishment nobody needs is constantly 0, which is no fault
    return {
        f"{name}_{'penalty' if name in penalties else 'reward'}": mean(sample.rewards[name] for sample in samples)
        for name in names
    }


def _lengths_by_verdict(samples: Sequence[Sample]) -> dict[str, float]:
    """Left out where there is none of a sort."""
    sorts = {"length_right": [s for s in samples if s.correct], "length_wrong": [s for s in samples if not s.correct]}
    return {name: _length(found) for name, found in sorts.items() if found}


def _families(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Accuracy by family, where the task is a mixture of several."""
    by_family: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        if "family" in sample.problem.meta:
            by_family[str(sample.problem.meta["family"])].append(sample.correct)
    return {"families": {name: mean(right) for name, right in sorted(by_family.items())}} if by_family else {}


def _of_open(samples: Sequence[Sample]) -> dict[str, float]:
    """Scores are in standard deviations of the reward model's training answers."""
    if not samples:
        return {}
    judged = [sample for sample in samples if sample.judged]
    names = dict.fromkeys(name for sample in judged for name in sample.rewards)
    return {
        "general_answers": len(samples),
        "general_unjudged": len(samples) - len(judged),
        "general_length": _length(samples),
        **{f"general_{name}": mean(sample.rewards[name] for sample in judged) for name in names},
    }


def _length(samples: Sequence[Sample]) -> float:
    return mean(len(sample.generation.ids) for sample in samples)


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
