"""`sputnik reward-model MODEL`: train a judge of answers on your pairs or labels, or let one score a file.

    sputnik reward-model runs/mine --pairs pairs.jsonl --out judges/helpful
    sputnik reward-model runs/mine --labels labels.jsonl --out judges/safe
    sputnik reward-model judges/helpful --score answers.jsonl --out scored.jsonl

The formats are those of sputnik/text/preferences.py. Training goes on where a killed call was. A file to be scored has
"response" in its lines, or "chosen" and "rejected"; the lines come back in order with "scores" beside what they had,
and the file is there whole or not at all.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from sputnik.cli.console import Console
from sputnik.config import refuse_changed
from sputnik.cost import Meter
from sputnik.errors import ConfigError, DataError
from sputnik.eval.judging import sigmoid
from sputnik.eval.stats import Interval
from sputnik.files import write_whole
from sputnik.hardware import fleet
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.text.preferences import conversation
from sputnik.train.examples import Policy, read_records
from sputnik.train.reward_model import RewardModel, RewardModelConfig, train_reward_model

ANSWERS = ("response", "chosen", "rejected")
SCALES = ("standard_scores", "safe_chances")


@dataclass(frozen=True)
class JudgeConfig:
    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A checkpoint, a run, or a run's name to start from; with --score, the directory of a reward model."""
    out: Path
    """A directory for a reward model, a file for scores."""
    pairs: UseAppendAction[tuple[str, ...]] = ()
    """JSONL file of {"prompt", "chosen", "rejected"}; may be repeated."""
    labels: UseAppendAction[tuple[str, ...]] = ()
    """JSONL file of {"prompt", "response", "safe"}; may be repeated."""
    score: Path | None = None
    """JSONL file of answers to be scored."""
    test: UseAppendAction[tuple[str, ...]] = ()
    """File of held-out lines; without one a share of the prompts is held out."""
    held_out: float = 0.1
    template: str | None = None
    """chat or zero; default: the one the model was trained with."""
    epochs: float = 1.0
    batch: int = 32
    lr: float = 5e-4
    max_tokens: int = 512
    """A longer dialogue is left out and counted."""
    balance_lengths: bool = True
    """Drop pairs until length says nothing about which answer was chosen."""
    bad_lines: Policy = "refuse"
    """drop: leave lines out that cannot be read, and count them."""
    precision: str = "auto"
    hardware: str = "cpu"
    """Whose price is counted."""
    seed: int = 0


def main(config: JudgeConfig) -> None:
    if sum(map(bool, (config.pairs, config.labels, config.score))) != 1:
        raise ConfigError("give one of --pairs FILE, --labels FILE and --score FILE")
    if config.score is not None:
        training = [field.name for field in fields(config) if field.name not in ("model", "out", "score", "precision")]
        refuse_changed(config, training, "is for training: leave it out, or --score")
        score_file(Path(config.model), config.score, config.out, config.precision)
    else:
        _train(config)


def _train(config: JudgeConfig) -> None:
    found = find_checkpoint(config.model)
    settings = RewardModelConfig(
        form="pairwise" if config.pairs else "pointwise",
        template=config.template or found.template,
        epochs=config.epochs,
        batch=config.batch,
        lr=config.lr,
        max_tokens=config.max_tokens,
        balance_lengths=config.balance_lengths,
        held_out=config.held_out,
        bad_lines=config.bad_lines,
        precision=config.precision,  # type: ignore[arg-type]
        seed=config.seed,
    )
    console, meter = Console(), Meter(*fleet(config.hardware))
    files, test = ([Path(file) for file in names] for names in (config.pairs or config.labels, config.test))
    train_reward_model(settings, found.path, files, config.out, meter, console, test)
    scores = json.loads((config.out / "scores.json").read_text(encoding="utf-8"))
    console.print(score_table(scores, str(config.out / "checkpoint")))


def score_table(scores: Mapping[str, Any], title: str) -> Table:
    """The held-out accuracy and what to compare it with."""
    table = Table(title=title, title_justify="left", show_header=False)
    rows = [("held-out accuracy", str(Interval(**scores["accuracy"])))]
    if scores["kind"] == "pairwise":
        rows.append(("the longer one wins", str(Interval(**scores["longer_wins"]))))
    else:
        calibration = scores["calibration"]
        rows += [
            ("the commoner label", f"{100 * scores['majority']:.1f} %"),
            (
                "unsafe caught, safe passed",
                ", ".join(_percent(scores[name]) for name in ("unsafe_caught", "safe_passed")),
            ),
            ("calibration error", f"{100 * calibration['expected_error']:.1f} %, Brier {calibration['brier']:.3f}"),
        ]
    correlation = scores["length_correlation"]
    rows.append(("score with length", "length does not vary" if correlation is None else f"r = {correlation:.2f}"))
    rows += [(f"  {name}", str(Interval(**score))) for name, score in scores["groups"].items()]
    for row in rows:
        table.add_row(*row)
    return table


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"


def score_file(model: Path, answers: Path, out: Path, precision: str = "auto") -> None:
    """Write the lines of `answers` to `out` with their scores: raw, and standardised or as the chance of being safe."""
    judge = RewardModel.load(model, precision)
    records = [record for _, record in read_records([answers], _to_score).kept]
    places = [(place, name) for place, record in enumerate(records) for name in ANSWERS if name in record]
    conversations = [conversation(records[place]) for place, _ in places]
    found = judge.score_texts(conversations, [records[place][name] for place, name in places])
    second = list(map(sigmoid, found)) if judge.card.kind == "pointwise" else judge.standardised(found)
    extra = SCALES[judge.card.kind == "pointwise"]
    for (place, name), raw, more in zip(places, found, second):
        records[place].setdefault("scores", {})[name] = raw
        records[place].setdefault(extra, {})[name] = more
    write_whole(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    print(f"{len(found)} answers scored: {out}")


def _to_score(record: dict[str, Any]) -> dict[str, Any]:
    conversation(record)
    present = [name for name in ANSWERS if name in record]
    if not present or not all(isinstance(record[name], str) for name in present):
        raise DataError('has no text "response" to score, nor "chosen" and "rejected"')
    return {key: value for key, value in record.items() if key not in ("scores", *SCALES)}
