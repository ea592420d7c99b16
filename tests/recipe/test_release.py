"""What a release reads of a run; a whole one is in test_whole_run.py."""

from dataclasses import asdict
from pathlib import Path

from sputnik.config import to_dict
from sputnik.recipe.evaluation import EvalConfig
from sputnik.recipe.evidence import Stage
from sputnik.recipe.release import settings_of


def test_a_model_scored_on_a_task_of_ones_own_can_be_released() -> None:
    config = EvalConfig(task="mine.py", task_options={"largest": 9}, samples=4, scaling=True, budgets=(8, 16))
    settings = {**to_dict(config), "file mine.py": "0123456789abcdef"}
    found = settings_of(Stage("zero-eval", "eval", Path("runs/x/zero-eval"), {"settings": settings}))
    assert asdict(found) == asdict(config) | {"scaling": False, "budgets": ()}
