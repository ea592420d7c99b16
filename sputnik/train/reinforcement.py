"""The stage of reinforcement learning with GRPO (R1 2.1-2.3): what happens in a step.

Some questions, a group of answers to each from the current policy (train/rollout.py), what each answer earns
(train/rewards.py), advantages within the group, then `optimizer_steps` updates of the objective (train/learner.py,
train/losses.py) on random parts of the rollout, as the report does with its 8,192 answers in 16 parts. The reference
policy of the KL term is replaced by the policy every so many steps. Questions, samples and the cut into parts are pure
functions of (seed, step), so a killed run goes on exactly (train/loop.py). The MTP modules follow the policy on its own
answers (train/drafts.py). `train_rl` (train/rl.py) is the way in. Left out: asynchronous rollouts.
"""

import copy
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sputnik.config import from_dict
from sputnik.cost import decode_flops_per_token, forward_flops_per_token, training_flops_per_token
from sputnik.engine.params import SamplingParams
from sputnik.engine.rollouts import Rollouts
from sputnik.errors import ConfigError, TaskError
from sputnik.eval.harness import evaluate
from sputnik.model.transformer import Transformer
from sputnik.tasks.base import Problem, Task, best_constant
from sputnik.tasks.verify import VerifierPool
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.drafts import Listener, acceptance
from sputnik.train.guards import SEVERITY, Action, GuardConfig, first_non_finite
from sputnik.train.health import rollout_metrics
from sputnik.train.learner import Learner, MicroBatch, UpdateStats, pack
from sputnik.train.loop import Loop, Read
from sputnik.train.losses import Objective
from sputnik.train.optim import adamw, load_optimizer_tensors, optimizer_tensors, set_lr
from sputnik.train.rewards import Judges, OpenPrompt, RewardConfig
from sputnik.train.rollout import Group, RolloutWorker, Sample, is_useful
from sputnik.train.state import derive_seed, load_module_tensors, module_tensors

WARMUP_STEPS = 5
MICRO_TOKENS = 16_384
"""Padded tokens that go through the model at once while training."""
STORED_GROUPS = 4
"""Groups per step written to rollouts.jsonl."""
MAX_ROUNDS = 3
"""Dynamic sampling asks this many times for questions that split their group, then trains on what there is."""
PROBED = 32
"""Questions that the untrained policy answers four times each before step 1."""
TRUNCATION_LIMIT = 0.5
"""The probe refuses a token limit that cuts off more than this share of the base model's answers."""


@dataclass(frozen=True)
class RLConfig:
    """Everything else follows from these and is printed at the start. Tables change single settings of their kind."""

    task: str = "arithmetic"
    """A name, `gym:NAME`, `math:FILE` or a Python file of your own (docs/tasks.md)."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    template: str = "chat"
    """"chat" starts inside the thought; "zero" is the report's plain-text template."""
    rewards: Mapping[str, Any] = field(default_factory=dict)
    """Weights of the parts and when open prompts take part: `RewardConfig` in train/rewards.py."""
    steps: int = 100
    prompts_per_step: int = 16
    samples_per_prompt: int = 16
    """G, the size of a group."""
    optimizer_steps: int = 4
    """Updates per rollout, each on a random part of its groups."""
    max_tokens: int = 128
    """Limit of an answer, thought included."""
    temperature: float = 1.0
    lr: float = 5e-4
    """The published 3e-6 is for 671 billion parameters; smaller models want more."""
    objective: str = "grpo"
    """grpo, dr_grpo, dapo or gspo."""
    switches: Mapping[str, Any] = field(default_factory=dict)
    """Single switches of the objective that differ from the named one (train/losses.py)."""
    eval_every: int = 20
    eval_questions: int = 128
    eval_samples: int = 4
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    on_collapse: Action | Mapping[str, Any] = "pause"
    """When entropy or length collapse or a reward is constant: off, warn, pause or rollback. Steps that are not finite
    are never applied; several in a row pause the run, or roll it back where this says so. A table may set single
    actions and limits beside its `action`: { action = "rollback", window = 10 } (train/guards.py)."""
    save_seconds: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        above_zero = ("steps", "prompts_per_step", "optimizer_steps", "max_tokens", "lr", "temperature")
        for name in (*above_zero, "eval_every", "eval_questions", "eval_samples"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: set it above 0")
        if self.samples_per_prompt < 2:
            raise ConfigError(f"samples_per_prompt = {self.samples_per_prompt}: a group needs at least 2 answers")
        if self.prompts_per_step < self.optimizer_steps:
            raise ConfigError(
                f"optimizer_steps = {self.optimizer_steps} parts of prompts_per_step = {self.prompts_per_step} groups: "
                "lower the first or raise the second"
            )
        Objective.named(self.objective, self.switches)
        self.reward_config()
        self.guard_config()

    def reward_config(self) -> RewardConfig:
        return from_dict(RewardConfig, self.rewards, "rewards")

    def guard_config(self) -> GuardConfig:
        told = {"action": self.on_collapse} if isinstance(self.on_collapse, str) else dict(self.on_collapse)
        action = told.pop("action", "pause")
        if action not in SEVERITY:
            raise ConfigError(f"on_collapse = {action!r}: choose one of {', '.join(SEVERITY)}")
        non_finite: Action = "rollback" if action == "rollback" else "pause"
        usual = GuardConfig(non_finite=non_finite, entropy=action, length=action, constant_reward=action)
        checked = from_dict(GuardConfig, told, "on_collapse")
        return replace(usual, **{key: getattr(checked, key) for key in told})


class Reinforcement:
    """The stage that `Loop` drives."""

    def __init__(
        self,
        config: RLConfig,
        model: Transformer,
        tok: Tokenizer,
        task: Task,
        pool: VerifierPool,
        judges: Judges | None = None,
        open_prompts: Sequence[OpenPrompt] = (),
    ) -> None:
        self.config = config
        self.model = model.eval()  # no dropout anywhere; training mode would only add the balance loss
        self.tok = tok
        self.task = task
        self.pool = pool
        self.objective = Objective.named(config.objective, config.switches)
        self.optimizer = adamw(model, config.lr, weight_decay=0.0)
        self.reference = copy.deepcopy(model).requires_grad_(False) if self.objective.kl_beta else None
        self.sampler = Rollouts(model, tok.eos_id, config.precision, self.objective.replay_routes)
        self.rewards = config.reward_config()
        self.judges = judges or Judges([])
        self.open_prompts = open_prompts
        self.worker = RolloutWorker(
            self.sampler, tok, task, pool, config.template, self.objective, self.rewards, self.judges
        )
        self.learner = Learner(
            model, self.optimizer, self.objective, config.temperature, config.precision,
            train_mtp=self.objective.train_mtp,
        )  # fmt: skip
        self.validation = task.problems("validation", config.eval_questions, config.seed)
        self.baseline = best_constant(self.validation, pool.verify)
        self._last: list[MicroBatch] = []

    # --- what the loop calls ---

    def before(self) -> dict[str, Any]:
        return {"validation": self.validate(0)}

    def step(self, step: int, loop: Loop) -> dict[str, Any]:
        began = time.perf_counter()
        groups, drawn, seconds = self._gather(step, loop.data_step(step))
        trained = time.perf_counter()
        figures = self._learn(groups, step, loop.data_step(step))
        seconds["train_s"] = time.perf_counter() - trained
        tokens = sum(len(sample.generation.ids) for group in drawn for sample in group)
        loop.meter.add(tokens=tokens, flops=self._flops(drawn, groups))
        metrics = {**rollout_metrics(drawn, self.task, self.tok), **figures, **seconds}
        metrics["tokens_per_s"] = tokens / (time.perf_counter() - began)
        for sample in _shown(groups):
            loop.log("rollouts", {"step": step, **sample.record(self.tok)})
        if step % self.config.eval_every == 0 or step == loop.steps:
            metrics["validation"] = self.validate(step)
        return metrics

    def batch(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for number, batch in enumerate(self._last):
            policy = batch.policy
            tensors |= {
                f"{number}.ids": batch.ids,
                f"{number}.mask": policy.mask.to(torch.uint8),
                f"{number}.advantages": policy.advantages.contiguous(),
                f"{number}.old": (policy.sampler if policy.old is None else policy.old).contiguous(),
            }
        return tensors

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        tensors = {"model": module_tensors(self.model), "optimizer": optimizer_tensors(self.optimizer, self.model)}
        if self.reference is not None:
            tensors["reference"] = module_tensors(self.reference)
        return tensors, {}

    def load(self, read: Read, plain: Mapping[str, Any]) -> None:
        load_module_tensors(self.model, read("model"))
        load_optimizer_tensors(self.optimizer, self.model, read("optimizer"))
        if self.reference is not None:
            load_module_tensors(self.reference, read("reference"))

    # --- one step ---

    def _gather(self, step: int, data_step: int) -> tuple[list[Group], list[Group], dict[str, float]]:
        """The rollout of a step, all groups that were drawn for it (dynamic sampling drops some: metrics of the others
        alone would not be the policy's), and the seconds its phases took."""
        config = self.config
        groups, drawn = list[Group](), list[Group]()
        seconds = {"generate_s": 0.0, "verify_s": 0.0}
        for attempt in range(MAX_ROUNDS if self.objective.dynamic_sampling else 1):
            problems = self._questions(step, data_step, attempt)
            params = SamplingParams(
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                seed=derive_seed(config.seed, "rollout", data_step, attempt),
            )
            fresh = self.worker.collect(problems, config.samples_per_prompt, params)
            seconds["generate_s"] += self.worker.generate_s
            seconds["verify_s"] += self.worker.verify_s
            drawn += fresh
            useful = [group for group in fresh if is_useful(group)] if self.objective.dynamic_sampling else fresh
            groups = [*groups, *useful][: config.prompts_per_step]
            if len(groups) == config.prompts_per_step:
                break
        groups = groups or fresh
        if not any(sample.judged for group in groups for sample in group):
            detail = groups[0][0].judgement.detail or "no reason given"
            raise TaskError(f"step {step}: no answer could be judged ({detail}); mend the verifier or the reward model")
        return groups, drawn, seconds

    def _questions(self, step: int, data_step: int, attempt: int) -> list[Problem]:
        """Of the task, and behind them open prompts."""
        count = self.config.prompts_per_step
        open_ones = self.rewards.open_prompts(step, count)
        seed = derive_seed(self.config.seed, "questions", data_step, attempt)
        rng = random.Random(derive_seed(self.config.seed, "open", data_step, attempt))
        return [*self.task.problems("train", count - open_ones, seed), *rng.sample(self.open_prompts, open_ones)]

    def _learn(self, groups: Sequence[Group], step: int, data_step: int) -> dict[str, Any]:
        """All updates on one rollout."""
        config = self.config
        lr = config.lr * min(1.0, step / WARMUP_STEPS)
        set_lr(self.optimizer, lr)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "parts", data_step))
        order = torch.randperm(len(groups), generator=generator).tolist()
        parts = [[groups[i] for i in order[k :: config.optimizer_steps]] for k in range(config.optimizer_steps)]
        packed = (self._pack([sample for group in part for sample in group]) for part in parts if part)
        batches = [part for part in packed if part]  # of groups that teach nothing there may be nothing to train on
        self._score(batches, check=step == 1)
        stats: list[UpdateStats] = []
        non_finite = None
        for part in batches:
            self._last = part
            stats.append(self.learner.update(part, with_mtp=not stats))
            if not stats[-1].finite:
                non_finite = first_non_finite(self.model, {})
                break
        if self.reference is not None and step % self.objective.reference_refresh == 0:
            load_module_tensors(self.reference, module_tensors(self.model))
        figures = {**_over_updates(stats), **_mismatch(batches), "lr": lr}
        if step == 1:
            figures["ratio_first"] = stats[0].ratio_error if stats else 0.0
        return figures if non_finite is None else {**figures, "non_finite": non_finite}

    def _pack(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        return pack(samples, self.objective, self.config.max_tokens, MICRO_TOKENS)

    def _score(self, parts: Sequence[Sequence[MicroBatch]], check: bool) -> None:
        """Fill in the reference, and pi_old where updates come before; with `check` everywhere, so that the first
        update shows whether scoring and training are one computation."""
        for number, part in enumerate(parts):
            for batch in part:
                old = self.learner.score(batch, self.model) if check or number else None
                reference = None if self.reference is None else self.learner.score(batch, self.reference)
                batch.policy = replace(batch.policy, old=old, reference=reference)

    def _flops(self, drawn: Sequence[Group], groups: Sequence[Group]) -> float:
        """Work of the step: prompts read once a group, answers drawn; of `groups` scored by policy and reference, and
        trained on."""
        shape = self.model.config
        passes = 1 - 1 / self.config.optimizer_steps + (self.reference is not None)  # the first update scores itself
        total, kept = 0.0, set(map(id, groups))
        for group in drawn:
            prompt = len(group[0].generation.prompt)
            total += prompt * forward_flops_per_token(shape, prompt)
            for sample in group:
                length = prompt + len(sample.generation.ids)
                total += len(sample.generation.ids) * decode_flops_per_token(shape, length)
                if sample.open:
                    total += sum(length * forward_flops_per_token(shape, length) for shape in self.judges.shapes)
                if id(group) in kept and (sample.advantage or self.objective.kl_beta):
                    trained = training_flops_per_token(shape, length)
                    if self.learner.drafts is not None:  # in the first update
                        both = training_flops_per_token(shape, length, mtp=True)
                        trained += (both - trained) / self.config.optimizer_steps
                    total += length * (passes * forward_flops_per_token(shape, length) + trained)
        return total

    # --- looking at it ---

    def validate(self, step: int) -> dict[str, Any]:
        """pass@1 on questions that are never trained on, at the rollout temperature; and how many tokens of these
        answers the MTP modules would have guessed, by depth."""
        config = self.config
        params = SamplingParams(
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            seed=derive_seed(config.seed, "validation", step),
        )
        listener = Listener(self.sampler)
        result = evaluate(
            listener,
            self.tok,
            self.task,
            self.pool,
            self.validation,
            k=config.eval_samples,
            params=params,
            template=config.template,
            baseline=self.baseline,
        )
        score = result.pass_at_1
        found: dict[str, Any] = {"mean": score.mean, "low": score.low, "high": score.high, "n": result.n, "k": result.k}
        if len(self.model.mtp):
            found["acceptance"] = acceptance(self.model, listener.heard, self.learner.precision)
        return found

    def probe(self) -> dict[str, float]:
        """Draw from the untrained policy: how long are its answers, and how many does the limit cut off?"""
        config, seed = self.config, derive_seed(self.config.seed, "probe")
        params = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=seed)
        try:
            problems = self.task.problems("train", PROBED, seed)
        except TaskError:  # a family with fewer may well have enough for a step
            problems = self.task.problems("train", config.prompts_per_step, seed)
        groups = self.worker.collect(problems, 4, params)
        figures = rollout_metrics(groups, self.task, self.tok)
        if figures["truncated"] > TRUNCATION_LIMIT:
            raise ConfigError(
                f"max_tokens = {config.max_tokens} cuts off {figures['truncated']:.0%} of the base model's answers; "
                f"raise it, or train the base model longer"
            )
        told = {name: figures[name] for name in ("length", "truncated", "accuracy_reward", "format_reward")}
        return {"answers": 4 * len(problems), **told}


def _shown(groups: Sequence[Group]) -> list[Sample]:
    """What goes into rollouts.jsonl: some groups, of both sorts where there are both."""
    closed, opened = ([group for group in groups if group[0].open == wanted] for wanted in (False, True))
    half = STORED_GROUPS // 2 if opened and closed else STORED_GROUPS
    return [sample for group in [*closed[:half], *opened[:half]] for sample in group]


def _over_updates(stats: Sequence[UpdateStats]) -> dict[str, float]:
    """Token-weighted means over the updates of a step; the MTP modules take part in the first alone."""
    tokens = sum(each.tokens for each in stats) or 1
    means = {
        name: float(sum(getattr(each, name) * each.tokens for each in stats) / tokens)
        for name in ("entropy", "kl", "clip_share")
    }
    drafts = [each.mtp_loss for each in stats if each.mtp_loss is not None]
    return {
        "loss": sum(each.loss for each in stats) / max(1, len(stats)),
        **means,
        **({"mtp_loss": drafts[0]} if drafts else {}),
        "grad_norm": float(torch.tensor([0.0, *(each.grad_norm for each in stats)]).max()),  # Python's loses a NaN
    }


def _mismatch(parts: Sequence[Sequence[MicroBatch]]) -> dict[str, float]:
    """How far pi_old is from what the sampler saw, after the updates have filled it in."""
    policies = [batch.policy for part in parts for batch in part]
    gaps = [(policy.old - policy.sampler)[policy.mask].abs() for policy in policies if policy.old is not None]
    gap = torch.cat(gaps) if gaps else torch.zeros(1)
    return {"mismatch_mean": float(gap.mean()), "mismatch_p99": float(gap.quantile(0.99))}
