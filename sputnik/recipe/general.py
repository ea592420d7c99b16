"""The general stage: what the later stages of R1 need beside problems, made here from plain words and fetched texts.

    STAGE/data.jsonl      examples for fine-tuning       STAGE/prompts.jsonl   open prompts for the last phase of RL
    STAGE/pairs.jsonl     chosen and rejected answers    STAGE/labels.jsonl    whole outputs, safe or unsafe
    STAGE/held_out/       the same four files            STAGE/manifest.json   sources, licences, counts, shortages

A prompt and what belongs with it is on one side of the split, by a hash. Wording is in sputnik/tasks/general_*.toml,
who answers what in sputnik/tasks/general.py, the defects of rejected answers in sputnik/tasks/defects.py. It needs no
model and no network: without one the articles are Python's help. docs/general-data.md has examples.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table

from sputnik.config import config_hash
from sputnik.errors import ConfigError
from sputnik.recipe.runner import StageContext
from sputnik.tasks.base import hash_of
from sputnik.tasks.defects import Output, Pair, make_outputs, make_pairs
from sputnik.tasks.general import MAKERS, Article, Item, Words, first_sentence, make_items, read_definitions
from sputnik.text.preferences import join_thought, share_of
from sputnik.text.sources import FALLBACK, SOURCES, Document, load_documents, read_text
from sputnik.train.state import read_jsonl, write_json

Record = dict[str, Any]
HELD_OUT = "held_out"
PROMPTS: Mapping[str, int] = {
    "smalltalk": 800, "self": 600, "facts": 300, "define": 300, "about": 1000, "unknown": 200, "unsafe": 400,
    "howto": 300, "lookalike": 300,
}  # fmt: skip
FOREIGN_SENTENCES = 2000


@dataclass(frozen=True)
class GeneralConfig:
    """Sizes are wishes: what a kind or file has less of is printed and stands in the manifest."""

    kinds: Mapping[str, int] = field(default_factory=dict)
    """Different prompts of a kind, where it is to differ from the default; 0 leaves the kind out."""
    pairs: int = 4000
    labels: int = 4000
    prompts: int = 2000
    """Open prompts for reinforcement learning, drawn from those of the examples."""
    texts: tuple[str, ...] = ("wiki-en",)
    """Articles for "who or what is X": names of sputnik/text/sources.py, files, folders or patterns."""
    foreign_texts: tuple[str, ...] = ("wiki-es", "wiki-fr")
    """For answers in the wrong language; without a network the few sentences among the words do."""
    dictionary: str = ""
    """A file of lines WORD, a tab and its definition, beside the few words that come along."""
    language: str = "en"
    model_name: str = "Sputnik"
    """What the model is called."""
    skills: tuple[str, ...] = ("sums", "small puzzles")
    """What it says it can do: name what it is trained for."""
    direct: float = 0.3
    """Share of the examples taught with thinking switched off."""
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, count in self.kinds.items():
            if kind not in MAKERS or count < 0:
                raise ConfigError(f"kinds: {kind} = {count}: at least 0 prompts of {', '.join(MAKERS)}")
        if min(self.pairs, self.labels, self.prompts) < 0 or not self.skills or not self.model_name.strip():
            raise ConfigError("general: pairs, labels and prompts are at least 0; model_name and skills are not empty")
        if not (0 <= self.direct <= 1 and 0 < self.held_out < 1):
            raise ConfigError("general: need 0 <= direct <= 1 and 0 < held_out < 1")


def build_general(config: GeneralConfig, context: StageContext) -> dict[str, Any]:
    """Write all files into the stage's directory."""
    out = context.directory
    words = Words.load(config.language, config.model_name, config.skills)
    wanted = {**PROMPTS, **config.kinds}
    documents = load_documents(config.texts) if wanted["about"] else []
    articles = [Article(each.title, each.text, each.source) for each in documents]
    items = make_items(words, wanted, articles, _definitions(config), config.seed)
    foreign_documents = load_documents(config.foreign_texts) if config.pairs and config.foreign_texts else []
    foreign = [*words["defects"]["foreign"], *_sentences(foreign_documents)]

    counts: dict[str, dict[str, dict[str, int]]] = {}
    held = [share_of(item.key) < config.held_out for item in items]
    for side, folder, share in (("train", out, 1.0), (HELD_OUT, out / HELD_OUT, config.held_out)):
        own = [item for item, outside in zip(items, held) if outside == (side == HELD_OUT)]
        sizes = {name: round(share * getattr(config, name)) for name in ("pairs", "labels", "prompts")}
        made = _files(config, words, own, foreign, sizes, f"{side}/{config.seed}")
        folder.mkdir(exist_ok=True)
        for name, records in made.items():
            _write_lines(folder / f"{name}.jsonl", records)
            counts.setdefault(name, {})[side] = dict(Counter(_group(record) for record in records))
    used = Counter(item.source for item in items)
    shortages = _shortages(wanted, items) | _short_files(config, counts)
    manifest = {"sources": _sources(config, [*documents, *foreign_documents], used), "counts": counts}
    write_json(out / "manifest.json", {**manifest, "shortages": shortages})
    context.console.print(_table(counts))
    for name, told in shortages.items():
        context.console.print(f"    {name}: {told}")
    figures = {name: sum(sides["train"].values()) for name, sides in counts.items()}
    return {**figures, "longer_wins": _longer_wins(out / "pairs.jsonl"), "hash": config_hash(_digests(out))}


def _definitions(config: GeneralConfig) -> dict[str, str]:
    if not config.dictionary:
        return {}
    return read_definitions(read_text(Path(config.dictionary)).split("\n"), config.dictionary)


def _sentences(documents: Sequence[Document]) -> list[str]:
    articles = (Article(each.title, each.text, each.source) for each in documents if each.source != FALLBACK)
    return list(islice(filter(None, map(first_sentence, articles)), FOREIGN_SENTENCES))


def _files(
    config: GeneralConfig,
    words: Words,
    items: Sequence[Item],
    foreign: Sequence[str],
    sizes: Mapping[str, int],
    seed: str,
) -> dict[str, list[Record]]:
    """The lines of the four files of one side."""
    rng = random.Random(f"examples/{seed}")
    data = [_example(item, config.direct, rng) for item in rng.sample(items, len(items))]
    open_ones = rng.sample(items, min(len(items), sizes["prompts"]))
    number = hash_of(seed)
    return {
        "data": data,
        "pairs": [_pair(pair) for pair in make_pairs(words, items, sizes["pairs"], foreign, number)],
        "labels": [_label(output) for output in make_outputs(words, items, sizes["labels"], number)],
        "prompts": [{"prompt": item.prompt, "kind": item.kind, "id": item.id} for item in open_ones],
    }


def _example(item: Item, direct: float, rng: random.Random) -> Record:
    """With an empty thought where none is needed; without the key it is taught with thinking switched off."""
    thought = {} if rng.random() < direct else {"thinking": item.thinking}
    return {"prompt": item.prompt, **thought, "answer": rng.choice(item.answers), **_about(item)}


def _pair(pair: Pair) -> Record:
    judged = {"chosen": pair.chosen, "rejected": pair.rejected, "defect": pair.defect}
    return {"prompt": pair.item.prompt, **judged, **_about(pair.item)}


def _label(output: Output) -> Record:
    response = join_thought(output.thinking, output.answer)
    return {"prompt": output.item.prompt, "response": response, "safe": output.safe, "why": output.why} | _about(
        output.item
    )


def _about(item: Item) -> Record:
    return {"kind": item.kind, "id": item.id, **({"source": item.source} if item.source else {})}


def _group(record: Record) -> str:
    return str(record.get("defect") or record.get("why") or record["kind"])


def _write_lines(path: Path, records: Iterable[Record]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


# --- what a reader has to know ---


def _shortages(wanted: Mapping[str, int], items: Sequence[Item]) -> dict[str, str]:
    found = Counter(item.kind for item in items)
    return {
        kind: f"only {found[kind]} different prompts of {count}"
        for kind, count in wanted.items()
        if found[kind] < count
    }


def _short_files(config: GeneralConfig, counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, str]:
    made = {name: sum(counts[name]["train"].values()) for name in ("pairs", "labels", "prompts")}
    return {
        name: f"only {count} different lines of {getattr(config, name)}"
        for name, count in made.items()
        if count < getattr(config, name)
    }


def _sources(config: GeneralConfig, documents: Sequence[Document], used: Mapping[str, int]) -> dict[str, Any]:
    """Licence and attribution of every text, and how many prompts were made from it."""
    attribution = {source.name: source.attribution for source in SOURCES}
    name = f"general_{config.language}.toml"
    words = (files("sputnik.tasks") / name).read_bytes()
    found: dict[str, Any] = {
        name: {
            "licence": "MIT",
            "attribution": "the Sputnik project",
            "sha256": hashlib.sha256(words).hexdigest(),
            "prompts": used[""],
        }
    }
    if config.dictionary:
        told = {"licence": "as its owner says", "attribution": config.dictionary, "prompts": used["dictionary"]}
        found["dictionary"] = told
    for document in documents:
        if document.source not in found:
            told = {"licence": document.licence, "attribution": attribution.get(document.source, "")}
            found[document.source] = {**told, "prompts": used[document.source]}
    return found


def _table(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Table:
    table = Table(title="general data, lines of each kind: train + held out", title_justify="left")
    table.add_column("file")
    table.add_column("lines", overflow="fold")
    for name, sides in counts.items():
        groups = sorted({*sides["train"], *sides[HELD_OUT]})
        told = [f"{group} {sides['train'].get(group, 0)}+{sides[HELD_OUT].get(group, 0)}" for group in groups]
        table.add_row(f"{name}.jsonl", ", ".join(told))
    return table


def _longer_wins(pairs: Path) -> float | None:
    """Share of the pairs whose chosen answer has more characters: near 1/2, or length gives the answer away."""
    lengths = [(len(record["chosen"]), len(record["rejected"])) for record in read_jsonl(pairs)]
    differing = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    return sum(differing) / len(differing) if differing else None


def _digests(out: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*.jsonl"))]
