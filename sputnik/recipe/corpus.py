"""The corpus stage: real texts and worked examples -> tokenizer, training shards, held-out shards.

    STAGE/tokenizer/    trained on the same texts         STAGE/train/      texts and worked examples, mixed by tokens
    STAGE/corpus.json   what is in it, with licences      STAGE/held_out/   texts alone, split off by title

The examples are rendered by `text/chat.py` with the template that reinforcement learning will use, so a base model has
seen the form of a dialogue the way a web-trained one has. They come from the task's train split: no question of its
validation or test split is in here. A corpus with another among its ancestors, for a model that is trained on, keeps
that one's tokenizer. Left out: filtering and deduplication.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sputnik.config import config_hash
from sputnik.errors import ConfigError
from sputnik.recipe.runner import StageContext
from sputnik.tasks.base import Demonstration, load_task, self_check
from sputnik.tasks.verify import VerifierPool
from sputnik.text.chat import render_example, template_hash
from sputnik.text.corpus import CorpusInfo, encode_document, encode_documents, fim, mix, pieces, write_shards
from sputnik.text.sources import SOURCES, Document, load_documents, split_holdout
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.state import write_json

TOKENIZER_CHARACTERS = 2_000_000
"""As much text as the merges are learned from; more takes longer and changes little at these vocabulary sizes."""


@dataclass(frozen=True)
class CorpusConfig:
    """`texts` are names of `sputnik/text/sources.py`, files, folders or patterns; `task` gives the worked examples."""

    texts: tuple[str, ...] = ("wiki-en", "shakespeare")
    tokens: int = 8_000_000
    vocab_size: int = 4096
    digits: int = 1
    task: str = ""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    examples: int = 20_000
    """Different worked examples; they repeat if their share of the tokens asks for more."""
    example_share: float = 0.5
    template: str = "chat"
    fim_rate: float = 0.1
    held_out: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 <= self.fim_rate <= 1 or not 0 < self.held_out < 1:
            raise ConfigError("corpus: need tokens >= 1, 0 <= fim_rate <= 1 and 0 < held_out < 1")
        if self.task and not (0 < self.example_share < 1 and self.examples > 0):
            raise ConfigError("corpus: with a task, need examples >= 1 and 0 < example_share < 1")


def build_corpus(config: CorpusConfig, context: StageContext) -> dict[str, Any]:
    """Write the corpus into the stage's directory."""
    out, console = context.directory, context.console
    examples = _examples(config)
    train, held_out = split_holdout(load_documents(config.texts), config.held_out)
    if not train or not held_out:
        raise ConfigError(
            f"corpus: {len(train) + len(held_out)} documents cannot be split; add texts or raise held_out"
        )
    console.print(f"    {len(train)} documents, {len(held_out)} held out, {len(examples)} worked examples")

    tokenizer = _tokenizer_below(config, context)
    if tokenizer is None:
        tokenizer = Tokenizer.train(_tokenizer_texts(train, examples), config.vocab_size, config.digits)
    tokenizer.save(out / "tokenizer")
    rng = random.Random(config.seed)
    share = 1 - config.example_share if examples else 1.0
    parts = [part for document in train for part in pieces(document.text)]
    rng.shuffle(parts)
    encoded = up_to(encode_documents(tokenizer, parts), share * config.tokens)
    texts = [fim(document, rng, tokenizer, config.fim_rate) for document in encoded]
    sources = [(texts, share)]
    if examples:
        sources.append((_encode_examples(tokenizer, examples, config.template), config.example_share))
    shards = write_shards(mix(sources, config.tokens), out / "train", tokenizer.vocab_size)
    held = write_shards(
        (encode_document(tokenizer, document.text) for document in held_out), out / "held_out", tokenizer.vocab_size
    )
    write_json(out / "corpus.json", _description(config, [*train, *held_out], examples, shards, held))
    once = sum(len(document) for documents, _ in sources for document in documents)
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokens": shards.tokens,
        "different_tokens": min(once, shards.tokens),
        "held_out_tokens": held.tokens,
        "data": config_hash([shards.sha256, held.sha256]),
    }


def _tokenizer_below(config: CorpusConfig, context: StageContext) -> Tokenizer | None:
    """That of the corpus below, whose ids a model already means something by."""
    below = context.ancestors.get("corpus")
    if below is None:
        return None
    first = context.recipe.stage(below.name).config
    for name in ("vocab_size", "digits"):
        ours, theirs = getattr(config, name), getattr(first, name)
        if ours != theirs:
            raise ConfigError(
                f"corpus: {name} = {ours}, but {below.name!r} below has {theirs}: write {name} = {theirs}"
            )
    return Tokenizer.load(below / "tokenizer")


def _examples(config: CorpusConfig) -> list[Demonstration]:
    """The worked examples; the task is tried here already, for a base model of a broken one is hours wasted."""
    if not config.task:
        return []
    task = load_task(config.task, config.task_options)
    with VerifierPool(config.task, config.task_options) as pool:
        self_check(task, verify=pool.verify)
    return task.demonstrations(config.examples, config.seed)


def up_to(documents: Iterable[list[int]], tokens: float) -> Iterator[list[int]]:
    """As many documents as it takes to reach so many tokens: encoding the rest would be thrown away."""
    given = 0
    for document in documents:
        if given >= tokens:
            return
        given += len(document)
        yield document


def _tokenizer_texts(documents: Sequence[Document], examples: Sequence[Demonstration]) -> Iterator[str]:
    """The head of every text, in proportion, and every example in plain words."""
    size = sum(len(document.text) for document in documents)
    share = min(1.0, TOKENIZER_CHARACTERS / size)
    for document in documents:
        yield document.text[: round(len(document.text) * share)]
    for example in examples:
        yield f"{example.prompt}\n{example.thinking or ''}\n{example.answer}"


def _encode_examples(tokenizer: Tokenizer, examples: Iterable[Demonstration], template: str) -> list[list[int]]:
    return [
        render_example(tokenizer, example.prompt, example.thinking, example.answer, template=template)[0]
        for example in examples
    ]


def _description(
    config: CorpusConfig,
    documents: Sequence[Document],
    examples: Sequence[Demonstration],
    shards: CorpusInfo,
    held_out: CorpusInfo,
) -> dict[str, Any]:
    """What a reader of the model has to know: sources with licence and attribution, examples by style."""
    attribution = {source.name: source.attribution for source in SOURCES}
    sources = {
        name: {
            "licence": next(document.licence for document in documents if document.source == name),
            "attribution": attribution.get(name, ""),
            "documents": sum(document.source == name for document in documents),
            "characters": sum(len(document.text) for document in documents if document.source == name),
        }
        for name in dict.fromkeys(document.source for document in documents)
    }
    styles = {
        style: {
            "examples": sum(example.style == style for example in examples),
            "correct": sum(example.correct for example in examples if example.style == style),
        }
        for style in sorted({example.style for example in examples})
    }
    return {
        "sources": sources,
        "task": config.task,
        "styles": styles,
        "template": config.template,
        "template_hash": template_hash(config.template),
        "train": asdict(shards),
        "held_out": asdict(held_out),
    }
