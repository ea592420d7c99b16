"""Rollouts: questions in, judged groups of answers out.

One group is G answers of the current policy to one question. Each answer is parsed into thought and answer and judged:
by the task's verifier in a worker process, or by reward models if the question is an open prompt. What it earns stands
in train/rewards.py. Nothing here changes weights.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sputnik.engine.params import SamplingParams
from sputnik.engine.rollouts import Rollouts
from sputnik.engine.sampler import Generation, Sampler
from sputnik.eval.harness import Answer, judge_generations
from sputnik.tasks.base import Judgement, Problem, Task, Verdict
from sputnik.tasks.verify import VerifierPool
from sputnik.text.chat import Prompt, parse, render
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.losses import Objective, group_advantages
from sputnik.train.rewards import Judges, OpenPrompt, RewardConfig, rule_parts

UNJUDGED = (Verdict.BAD_GOLD, Verdict.ERROR)
"""The fault is not the policy's: such an answer takes no part in its group's mean nor in training, and is counted."""
NOT_VERIFIED = Judgement(Verdict.UNPARSEABLE, "an open prompt: there is nothing to verify")


@dataclass(frozen=True)
class Sample(Answer):
    """A judged answer, as in evaluation, with what it earned and its group advantage."""

    rewards: dict[str, float] = field(default_factory=dict)
    """Part -> value, unweighted."""
    reward: float = 0.0
    advantage: float = 0.0

    @property
    def judged(self) -> bool:
        return self.judgement.verdict not in UNJUDGED

    @property
    def open(self) -> bool:
        return isinstance(self.problem, OpenPrompt)

    def record(self, tok: Tokenizer) -> dict[str, Any]:
        """The line of `rollouts.jsonl`, without the step."""
        found = {**super().record(tok), "rewards": self.rewards, "advantage": round(self.advantage, 4)}
        return {**found, "verdict": "open", "detail": ""} if self.open and self.judged else found


Group = list[Sample]


class RolloutWorker:
    """Asks, judges and rewards with the current weights of `sampler.model`."""

    def __init__(
        self,
        sampler: Rollouts | Sampler,
        tok: Tokenizer,
        task: Task,
        pool: VerifierPool,
        template: str,
        objective: Objective,
        rewards: RewardConfig | None = None,
        judges: Judges | None = None,
    ) -> None:
        self.sampler = sampler
        self.tok = tok
        self.task = task
        self.pool = pool
        self.template = template
        self.objective = objective
        self.rewards = rewards or RewardConfig()
        self.judges = judges or Judges([])
        self.generate_s = 0.0
        self.verify_s = 0.0
        """Wall seconds of the last `collect`, by phase."""

    def collect(self, problems: Sequence[Problem], group_size: int, params: SamplingParams) -> list[Group]:
        """One group per problem, advantages filled in; open prompts stand behind the questions of the task."""
        started = time.perf_counter()
        messages = [[{"role": "user", "content": problem.prompt}] for problem in problems]
        prompts = [render(self.tok, message, template=self.template) for message in messages]
        drawn = self.sampler.generate([prompt.ids for prompt in prompts], params, n=group_size)
        self.generate_s = time.perf_counter() - started
        started = time.perf_counter()
        closed = sum(not isinstance(problem, OpenPrompt) for problem in problems)
        judged = judge_generations(
            self.tok, self.pool, problems[:closed], prompts[:closed], drawn[:closed], self.template
        )
        groups = [[self._rewarded(answer, params.max_tokens) for answer in answers] for answers in judged]
        groups += self._open_groups(problems[closed:], prompts[closed:], drawn[closed:], params.max_tokens)
        self.verify_s = time.perf_counter() - started
        return [with_advantages(group, self.objective.std_normalised) for group in groups]

    def _rewarded(self, answer: Answer, max_tokens: int, preferences: dict[str, float] | None = None) -> Sample:
        parts = rule_parts(answer, self.rewards, max_tokens, self.objective.overlong_share) | (preferences or {})
        return Sample(
            answer.problem, answer.generation, answer.completion, answer.judgement, parts, self.rewards.total(parts)
        )

    def _open_groups(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[Prompt],
        drawn: Sequence[Sequence[Generation]],
        max_tokens: int,
    ) -> list[Group]:
        """All answers to open prompts are scored together; a score that is no number is a fault of ours."""
        answers = [
            [self._open_answer(problem, prompt, each) for each in generations]
            for problem, prompt, generations in zip(problems, prompts, drawn, strict=True)
        ]
        scored = iter(self.judges.parts([answer for group in answers for answer in group]))
        groups: list[Group] = []
        for group in answers:
            groups.append([])
            for answer in group:
                parts = next(scored)
                if broken := [name for name, value in parts.items() if not math.isfinite(value)]:
                    fault = Judgement(Verdict.ERROR, f"the score of {broken[0]!r} is not a number")
                    answer, parts = replace(answer, judgement=fault), dict.fromkeys(parts, 0.0)
                groups[-1].append(self._rewarded(answer, max_tokens, parts))
        return groups

    def _open_answer(self, problem: Problem, prompt: Prompt, generation: Generation) -> Answer:
        finished = generation.finish == "stop"
        completion = parse(
            self.tok, generation.ids, in_thought=prompt.in_thought, finished=finished, template=self.template
        )
        return Answer(problem, generation, completion, NOT_VERIFIED)


def with_advantages(group: Group, std_normalised: bool) -> Group:
    """Fill in the group advantages. Answers nobody could judge keep 0, and so do groups with fewer than two others."""
    judged = [sample for sample in group if sample.judged]
    if len(judged) < 2:
        return group
    rewards = torch.tensor([[sample.reward for sample in judged]])
    advantages = iter(group_advantages(rewards, std_normalised)[0].tolist())
    return [replace(sample, advantage=next(advantages)) if sample.judged else sample for sample in group]


def is_useful(group: Group) -> bool:
    """A group teaches only if its answers were rewarded differently."""
    return any(sample.advantage != 0 for sample in group)
