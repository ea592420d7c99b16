"""Make a model of a finished run ready for others: bf16 weights with tokenizer and template, scored again, and a card.

    release(Path("runs/r1"), Path("r1-mini"), read_words(Path("recipes/cards/r1.toml")), "r1")

    OUT/config.json, model.safetensors, tokenizer ...   what transformers, vLLM and `sputnik chat OUT` read
    OUT/README.md                                        the card, for people
    OUT/card.json                                        the same facts, for programs

The scores on the card are those of the weights that are written, taken with the settings of the stage's own evaluation;
stages, data, time and price are what the run has on record. What the model is for and what it cannot do is said by its
makers in a small TOML file. Left out: uploading.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sputnik.config import from_dict, load_toml
from sputnik.cost import parameters
from sputnik.errors import ConfigError, DataError
from sputnik.eval.results import EvalResult
from sputnik.files import replace_directory
from sputnik.model.checkpoint import open_weights
from sputnik.model.config import ModelConfig
from sputnik.model.hf_out import write_hf
from sputnik.recipe.evaluation import EvalConfig, evaluate_checkpoint
from sputnik.recipe.evidence import Run, Stage, read_json, read_run
from sputnik.recipe.report import estimate, gather
from sputnik.tasks.base import Verdict
from sputnik.text.named_models import EMBEDDED, MODELS
from sputnik.text.tokenizer import Tokenizer

Facts = dict[str, Any]
UNKNOWN = "as its owner says"
SHOWN = 3
"""Answers on the card: two right ones and a wrong one, where there are."""


@dataclass(frozen=True)
class Words:
    """What only the makers of a model can say of it."""

    title: str
    summary: str
    cannot: tuple[str, ...]
    """What it cannot do, a sentence each."""
    licence: str = "MIT"
    language: str = "en"
    recipe: str = ""
    """The command that makes it again."""

    def __post_init__(self) -> None:
        if not self.cannot:
            raise ConfigError("a card says what the model cannot do: give `cannot` at least one sentence")


def read_words(path: Path) -> Words:
    return from_dict(Words, load_toml(path), str(path))


def release(
    path: Path, out: Path, words: Words, stage: str | None = None, *, most_mb: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Facts:  # fmt: skip
    """Write the model of `stage` (None: the last one that was evaluated) to the directory `out`; returns the card's
    facts. ConfigError if the stage has no model or no evaluation, or the weights are larger than `most_mb`."""
    run = read_run(path)
    model = _model(run, stage)
    settings = settings_of(run.evaluations(model)[0])
    checkpoint = model.path / "checkpoint"
    weights = open_weights(checkpoint)
    if out.exists() and not (out / "card.json").is_file():
        raise ConfigError(f"{out}: is there and no released model; give another name")
    with replace_directory(out) as draft:
        write_hf(weights, draft, torch.bfloat16, tokenizer=Tokenizer.load(checkpoint))
        size = sum(file.stat().st_size for file in draft.glob("*.safetensors"))
        if most_mb is not None and size > most_mb * 1e6:
            raise ConfigError(f"{model.name}: {size / 1e6:.1f} MB of weights, and {most_mb:g} MB are allowed")
        result = evaluate_checkpoint(draft, settings, on_progress=on_progress)
        facts = _facts(run, model, weights.config, words, result) | {
            "bytes": size,
            "settings": dataclasses.asdict(settings),
        }
        (draft / "card.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (draft / "README.md").write_text(render_card(facts), encoding="utf-8")
    return facts


def _model(run: Run, name: str | None) -> Stage:
    scored = [stage for stage in run.stages if stage.kind != "eval" and run.evaluations(stage)]
    found = [stage for stage in scored if name in (None, stage.name)]
    if not found:
        known = ", ".join(stage.name for stage in scored) or "none yet"
        raise ConfigError(f"{run.path}: no evaluated model {name or ''}; evaluated: {known}".replace("  ", " "))
    return found[-1]


def settings_of(evaluation: Stage) -> EvalConfig:
    """How it was taken, without scaling. The lineage holds the hashes of files, too, which are no settings."""
    kept = {key: value for key, value in evaluation.record["settings"].items() if not key.startswith("file ")}
    settings = from_dict(EvalConfig, kept, f"{evaluation.path}: its settings in the lineage")
    return dataclasses.replace(settings, scaling=False, budgets=())


def _facts(run: Run, model: Stage, config: ModelConfig, words: Words, result: EvalResult) -> Facts:
    """Of the stages only those that the model stands on: a student made from it is no part of its price."""
    report, needed = gather(run), _below(run, model)
    made_of = [stage for stage in run.stages if stage.name in needed]
    count = parameters(config)
    scores = {stage.name: each for stage in run.stages for each in run.evaluations(stage)[:1]}
    spent = [stage for stage in report["stages"] if stage["name"] in needed]
    return {
        "words": dataclasses.asdict(words),
        "run": run.name,
        "model": model.name,
        "hash": model.record["hash"],
        "code": model.record["code"],
        "parameters": {"total": count.total, "active": count.active, "mtp": count.mtp},
        "shape": {
            "model_type": config.model_type,
            "layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "vocab_size": config.vocab_size,
            "n_routed_experts": config.n_routed_experts, "context": config.max_position_embeddings,
        },
        "score": _score(result),
        "others": [_other(each, run.evaluations(model)[0]) for each in run.evaluations(model)[1:]],
        "stages": [
            {key: each[key] for key in ("name", "kind", "parent")} | {"pass_at_1": estimate(scores.get(each["name"]))}
            for each in spent
        ],
        "seconds": sum(each["seconds"] or 0.0 for each in spent),
        "usd": sum(each["usd"] or 0.0 for each in spent),
        "hardware": report["versions"].get("cpu") or report["hardware"],
        "data": data_read(made_of),
        "foreign": stands_on_others(made_of),
        "samples": _samples(result),
    }  # fmt: skip


def _below(run: Run, model: Stage) -> set[str]:
    """Names of all stages that `model` was made from, its own and the evaluations among them included."""
    records = {stage.name: stage.record for stage in run.stages}
    found, open_ones = set[str](), [model.name]
    while open_ones:
        name = open_ones.pop()
        if name not in found:
            found.add(name)
            open_ones += [each for each in (records[name].get("parent"), *records[name].get("inputs", ())) if each]
    return found | {stage.name for stage in run.stages if stage.kind == "eval" and stage.parent in found}


def _score(result: EvalResult) -> Facts:
    whole = dataclasses.asdict(result)
    keys = ("task", "n", "k", "decoding", "pass_at_1", "cons_at_k", "families", "best_constant", "length")
    return {key: whole[key] for key in (*keys, "truncated", "well_formed", "self_check")}


def _other(evaluation: Stage, first: Stage) -> Facts:
    """Another evaluation of the same model, as the run has it: how it differs from the one on the card."""
    ours, theirs = ({**each.record["settings"]} for each in (evaluation, first))
    inner, outer = (each.pop("task_options", {}) for each in (ours, theirs))
    changed = {key: value for key, value in (ours | inner).items() if (theirs | outer).get(key) != value}
    changed = {key: value for key, value in changed.items() if key not in ("scaling", "budgets")}
    return {"name": evaluation.name, "changed": changed, "pass_at_1": estimate(evaluation)}


def data_read(stages: list[Stage]) -> list[Facts]:
    """Every source of text with its licence and owner, and what was made here."""
    found: dict[str, Facts] = {}
    for stage in stages:
        for name in ("corpus.json", "manifest.json"):
            told = read_json(stage.path / name) or {}
            for source, about in told.get("sources", {}).items():
                found.setdefault(source, {"source": source, **{k: about[k] for k in ("licence", "attribution")}})
        for source, licence, owner in _named(stage.kind, stage.record["settings"]):
            found.setdefault(source, {"source": source, "licence": licence, "attribution": owner})
    if not found:
        raise DataError("no stage below the model says what texts it has read: make the run again")
    return list(found.values())


def _named(kind: str | None, settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Source, licence and owner of what a stage's settings name: a pretrained model, a teacher, files of one's own."""
    if kind == "pretrained":
        name = settings["source"]
        own = ("MIT", "the Sputnik project; its card says what it has read")
        told = {EMBEDDED: own} | {each: (model.licence, model.owner) for each, model in MODELS.items()}
        yield f"the model {name}", *told.get(name, (UNKNOWN, "see its own card"))
    if settings.get("url"):
        teacher = settings.get("endpoint", {}).get("model") or "the model"
        yield f"answers of {teacher} behind {settings['url']}", "as its provider says", ""
    for file in (*settings.get("data", ()), settings.get("examples")):
        if isinstance(file, str) and file:
            yield file, UNKNOWN, ""


def stands_on_others(stages: list[Stage]) -> bool:
    """Whether other makers' models stand below this one or taught it."""
    settings = [stage.record["settings"] for stage in stages]
    return any(each.get("url") or each.get("source", EMBEDDED) != EMBEDDED for each in settings)


def _samples(result: EvalResult) -> list[Facts]:
    """The first right answers, each of another family where there are some, and the first wrong one."""
    right: dict[str, Facts] = {}
    for each in result.samples:
        if each["verdict"] == Verdict.CORRECT:
            right.setdefault(each["family"], each)
    wrong = [each for each in result.samples if each["verdict"] == Verdict.WRONG]
    return [
        {key: each[key] for key in ("prompt", "thinking", "answer", "verdict")}
        for each in (*list(right.values())[: SHOWN - 1], *wrong[:1])
    ]


def render_card(facts: Mapping[str, Any]) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent / "templates")
    pages = Environment(
        loader=folder, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    pages.filters["percent"] = lambda each: "{:.1f} % [{:.1f}, {:.1f}]".format(
        *(100 * each[key] for key in ("mean", "low", "high"))
    )
    return pages.get_template("card.md.jinja").render(facts)
