"""The reward-model stage: a judge on the parent's backbone, from the pairs or labels that its input stages made.

What its inputs hold out is held out here too; a user's own files are named by `data`. The training itself is
sputnik/train/reward_model.py.
"""

from typing import Any

from sputnik.cost import Meter
from sputnik.errors import ConfigError
from sputnik.hardware import fleet
from sputnik.recipe.general import HELD_OUT
from sputnik.recipe.runner import StageContext
from sputnik.train.reward_model import RewardModelConfig, train_reward_model


def run_reward_model(config: RewardModelConfig, context: StageContext) -> dict[str, Any]:
    """Train on the files of the inputs and of `config.data`."""
    if context.parent is None:
        raise ConfigError("a reward-model stage needs a parent with a checkpoint; write parent = NAME")
    name = {"pairwise": "pairs.jsonl", "pointwise": "labels.jsonl"}[config.form]
    files = [path for folder in context.inputs.values() if (path := folder / name).is_file()]
    if not files and not config.data:
        raise ConfigError(f'a {config.form} reward-model needs a stage that makes {name}; write inputs = ["NAME"]')
    held_out = [path for file in files if (path := file.parent / HELD_OUT / name).is_file()]
    return train_reward_model(
        config,
        context.parent / "checkpoint",
        files,
        context.directory,
        Meter(*fleet(context.recipe.hardware)),
        context.console,
        held_out,
    )
