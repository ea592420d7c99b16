"""Reinforcement learning with verifiable rewards, from a checkpoint to a checkpoint (R1 2.1-2.3).

    figures = train_rl(RLConfig(task="arithmetic", steps=100), parent_checkpoint, out, meter)

On a base model that is R1-Zero; with a language reward on a fine-tuned one R1's first RL stage; with reward models and
open prompts its last; on a dense student the control that distillation is compared with. A step is told in
train/reinforcement.py, what an answer earns in train/rewards.py.

Before step 1 the task checks its own gold answers, a labelled set (if there is one) says how often the verifier errs, a
probe shows how many answers the length limit would cut off, and validation gives the learning curve its first point, at
step 0.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sputnik.config import to_dict
from sputnik.cost import Meter
from sputnik.errors import ConfigError, DataError
from sputnik.hardware import resolve_precision
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.transformer import Transformer
from sputnik.tasks.base import Task, load_task, self_check
from sputnik.tasks.verify import VerifierPool
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.audit import audit, audit_table, labelled_set
from sputnik.train.examples import digest, weights_digest
from sputnik.train.guards import Guard
from sputnik.train.loop import Loop
from sputnik.train.losses import Objective
from sputnik.train.reinforcement import Reinforcement, RLConfig
from sputnik.train.rewards import Judges, OpenPrompt, RewardConfig, read_prompts
from sputnik.train.state import read_jsonl, write_json

__all__ = ["OUTCOME_FREE", "RLConfig", "train_rl"]

OUTCOME_FREE = ("save_seconds",)


def train_rl(
    config: RLConfig,
    parent: Path,
    out: Path,
    meter: Meter,
    console: Console | None = None,
    *,
    judges: Sequence[Path] = (),
    prompts: Sequence[Path] = (),
    labelled: Path | None = None,
) -> dict[str, Any]:
    """Train the model of checkpoint `parent` into `out` (metrics, rollouts, saves, checkpoint), or go on where a killed
    call was. Returns the last line of the metrics.

    `judges` are checkpoints of reward models and `prompts` files of open prompts, for the steps that
    `rewards.general_from` names; `labelled` is a file to audit the verifier with instead of the task's own."""
    task = load_task(config.task, config.task_options)
    tok = Tokenizer.load(parent)
    model = load_model(parent)
    console = console or Console()
    open_prompts = _open_prompts(config, judges, prompts)
    with VerifierPool(config.task, config.task_options) as pool:
        self_check(task, verify=pool.verify)
        models = Judges.load(judges, tok, config.template, config.precision)
        stage = Reinforcement(config, model, tok, task, pool, models, open_prompts)
        guard = config.guard_config()
        loop = Loop(
            out,
            steps=config.steps,
            identity=_identity(config, task, parent, judges, prompts),
            meter=meter,
            guard=lambda: Guard(guard),
            logs=("rollouts",),
            headline=("accuracy_reward", "length", "useful_groups"),
            save_seconds=config.save_seconds,
        )
        if not read_jsonl(out / "metrics.jsonl"):
            found = labelled or labelled_set(config.task, task)
            report = None if found is None else audit(task, pool, found)
            console.print(describe(config, stage.probe(), model))
            if report is not None:
                console.print(audit_table(report))
                out.mkdir(parents=True, exist_ok=True)
                write_json(out / "audit.json", to_dict(report))
        loop.run(stage)
        checkpoint = out / "checkpoint"
        if not checkpoint.exists():  # it appears whole or not at all
            save_model(model, checkpoint, tokenizer=tok)
    return read_jsonl(out / "metrics.jsonl")[-1]


def _open_prompts(config: RLConfig, judges: Sequence[Path], files: Sequence[Path]) -> list[OpenPrompt]:
    """The open prompts, or none; reward models, prompts and `general_from` only make sense together."""
    rewards = config.reward_config()
    if not (judges or files or rewards.general_from):
        return []
    for missing, fix in (
        (not judges, "give a reward model: it is what judges open prompts"),
        (not files, "give a file of open prompts for the reward models to judge"),
        (not rewards.general_from, "set rewards.general_from to the first step with open prompts, late in the run"),
        (rewards.general_from > config.steps, f"general_from = {rewards.general_from} lies behind the last step"),
    ):
        if missing:
            raise ConfigError(f"preference rewards: {fix}")
    prompts = read_prompts(files)
    needed = rewards.open_prompts(config.steps, config.prompts_per_step)
    if len(prompts) < needed:
        raise DataError(f"{files[0]}: {len(prompts)} open prompts, and a step asks {needed}; add some")
    return prompts


def describe(config: RLConfig, probe: Mapping[str, float], model: Transformer) -> Table:
    """Everything derived, and what the probe saw, before anything is trained."""
    answers = config.prompts_per_step * config.samples_per_prompt
    objective = Objective.named(config.objective, config.switches)
    modules = "trained too" if objective.train_mtp else "kept as they are"
    table = Table(title="reinforcement learning, derived from the settings", title_justify="left", show_header=False)
    for key, value in (
        ("rollout", f"{config.prompts_per_step} questions x {config.samples_per_prompt} answers = {answers} a step"),
        ("updates", f"{config.optimizer_steps} a step on {answers // config.optimizer_steps} answers each"),
        ("in all", f"{config.steps} steps, {config.steps * answers:,} answers of at most {config.max_tokens} tokens"),
        ("rewards", _rewards_line(config.reward_config(), config)),
        ("objective", f"{config.objective}: " + ", ".join(f"{k} {v}" for k, v in to_dict(objective).items())),
        (
            "reference",
            f"replaced every {objective.reference_refresh} steps" if objective.kl_beta else "none, kl_beta is 0",
        ),
        ("MTP modules", f"{len(model.mtp)}, {modules}"),
        (f"probe of {probe['answers']:.0f} answers", f"{probe['length']:.1f} tokens, {probe['truncated']:.1%} cut off"),
        ("before", f"accuracy {probe['accuracy_reward']:.1%}, format {probe['format_reward']:.1%}"),
    ):
        table.add_row(key, value)
    return table


def _rewards_line(rewards: RewardConfig, config: RLConfig) -> str:
    parts = [f"{rewards.accuracy:g} accuracy", f"{rewards.format:g} format"]
    if rewards.language:
        parts.append(f"{rewards.language:g} language ({rewards.target})")
    line = " + ".join(parts)
    if not rewards.general_from:
        return line
    count = rewards.open_prompts(rewards.general_from, config.prompts_per_step)
    return f"{line}; from step {rewards.general_from} on {count} open prompts a step, judged by reward models"


def _identity(
    config: RLConfig, task: Task, parent: Path, judges: Sequence[Path], prompts: Sequence[Path]
) -> dict[str, Any]:
    """Everything the result depends on."""
    settings = {key: value for key, value in to_dict(config).items() if key not in OUTCOME_FREE}
    settings["precision"] = resolve_precision(config.precision)  # another day's measurement may decide otherwise
    found = {**settings, "task_version": task.version, "parent": weights_digest(parent)}
    if judges:
        found |= {"judges": [weights_digest(path) for path in judges], "prompts": digest(prompts)}
    return found
