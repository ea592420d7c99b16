"""From what a user types to a model: a checkpoint directory, a GGUF file, a stage, a run, the name of a run or a model.

A checkpoint inside a run directory also knows the template it was taught with, from the lineage of its ancestors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sputnik.errors import CheckpointError
from sputnik.recipe.lineage import Lineage
from sputnik.text.gguf_header import gguf_file
from sputnik.text.named_models import find_model
from sputnik.text.preferences import CARD


@dataclass(frozen=True)
class Found:
    path: Path
    template: str


def find_checkpoint(spec: str, runs: Path = Path("runs")) -> Found:
    """The model meant by `spec`; of a run, the one of its last stage that has a checkpoint."""
    path = runs / spec if (runs / spec).exists() and not Path(spec).exists() else find_model(spec)
    if not path.exists():
        names = sorted(run.name for run in runs.glob("*") if run.is_dir())
        fix = f"runs here: {', '.join(names)}" if names else "make one with `sputnik quickstart`"
        raise CheckpointError(f"{spec}: neither a checkpoint directory nor a run; {fix}")
    judge: Path | None = None
    for candidate in _candidates(path):
        if (candidate / CARD).is_file():
            judge = candidate
        elif (candidate / "config.json").is_file() or gguf_file(candidate) is not None:
            return Found(candidate, _template(candidate))
    if judge is not None:
        raise CheckpointError(
            f"{judge}: a reward model writes no answers; let it score some: sputnik reward-model --score"
        )
    raise CheckpointError(f"{path}: no checkpoint in there yet (a folder with config.json and model.safetensors)")


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    yield path / "checkpoint"
    if (path / "lineage.json").is_file():
        for name in reversed(Lineage(path).records):
            yield path / name / "checkpoint"


def _template(checkpoint: Path) -> str:
    """What the nearest ancestor with a `template` setting used; "chat" for a model from elsewhere."""
    stage = checkpoint.resolve().parent
    if not (stage.parent / "lineage.json").is_file():
        return "chat"
    records = Lineage(stage.parent).records
    record = records.get(stage.name)
    while record is not None:
        if "template" in record.settings:
            return str(record.settings["template"])
        record = records.get(record.parent or "")
    return "chat"
