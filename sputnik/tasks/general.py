"""General prompts with plain answers: small talk, questions about the model, facts, definitions, leads of articles,
made-up names, how to do things, unsafe requests and harmless ones that sound like them.

    words = Words.load("en", name="Sputnik", skills=("sums",))
    items = make_items(words, {"smalltalk": 200, "about": 300}, documents, seed=0)

All wording is in `general_LANGUAGE.toml`; another language is another file. Who answers what is decided here: an `Item`
is a prompt, answers that would do, and the thought that goes before them ("" where none is needed, as for "hello").
Items of one `key` belong on one side of a split. Left out: conversations of several turns.
"""

import random
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from typing import Any

from sputnik.errors import ConfigError, DataError
from sputnik.tasks.base import hash_of

HELP = "python-topics"
SENTENCE = re.compile(r"(.{12,}?(?:[^\W\d_]{3}|\d{2}|[\])\"”]))[.!?:](?=\s|$)", re.DOTALL)
SHORTEST, LONGEST = 25, 180
"""Characters of an answer that is a sentence of an article: what a small model can hold."""


@dataclass(frozen=True)
class Item:
    prompt: str
    kind: str
    answers: tuple[str, ...]
    thinking: str
    key: str
    act: str = ""
    """What an unsafe prompt asks for; empty for all others."""
    source: str = ""
    """Name of the text it was made from; empty if it is from the words."""

    @property
    def id(self) -> str:
        return f"{hash_of(plain(self.prompt)):016x}"


@dataclass(frozen=True)
class Article:
    """A text with its title, and the name of the source."""

    title: str
    text: str
    source: str


@dataclass(frozen=True)
class Words:
    """The tables of one language, names filled in."""

    tables: Mapping[str, Any]

    @classmethod
    def load(cls, language: str, name: str = "Sputnik", skills: Sequence[str] = ("sums", "small puzzles")) -> "Words":
        names = {entry.name for entry in files("sputnik.tasks").iterdir()}
        if (wanted := f"general_{language}.toml") not in names:
            known = sorted(found[1] for name in names if (found := re.fullmatch(r"general_(\w+)\.toml", name)))
            raise ConfigError(f"no words in language {language!r}; there are {', '.join(known)}")
        tables = tomllib.loads((files("sputnik.tasks") / wanted).read_text(encoding="utf-8"))
        listed = tables["and"].join([part for part in (", ".join(skills[:-1]), skills[-1]) if part])
        return cls(_filled(tables, {"name": name, "skills": listed}))

    def __getitem__(self, table: str) -> Any:
        return self.tables[table]


def fill(text: str, **slots: str) -> str:
    """`text` with each {slot} replaced; braces that are no slot stay."""
    for slot, value in slots.items():
        text = text.replace(f"{{{slot}}}", value)
    return text


def _filled(value: Any, slots: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, slots) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, slots) for inner in value]
    return fill(value, **slots) if isinstance(value, str) else value


def plain(text: str) -> str:
    """Letters and digits alone, in small letters: prompts that differ in nothing else are one prompt."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def make_items(
    words: Words,
    counts: Mapping[str, int],
    articles: Sequence[Article] = (),
    definitions: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[Item]:
    """Up to `counts[kind]` different items of each kind: all there are where a kind has fewer."""
    if unknown := sorted(set(counts) - set(MAKERS)):
        raise ConfigError(f"no kind of prompt {unknown[0]!r}; choose among {', '.join(MAKERS)}")
    found: dict[str, Item] = {}
    for kind, count in counts.items():
        rng = random.Random(hash_of(f"general/{kind}/{seed}"))
        candidates = MAKERS[kind](words, rng, articles, definitions or {})
        own: dict[str, Item] = {}
        for item in candidates:
            if len(own) == count:
                break
            name = plain(item.prompt)
            if name and name not in found:
                own.setdefault(name, item)
        found |= own
    return list(found.values())


# --- one maker for each kind: (words, rng, articles, definitions) -> items, the more important ones first ---


def _talk(kind: str, words: Words, rng: random.Random, *_: Any) -> Iterator[Item]:
    """From the tables of questions and answers. What is about small talk and the model itself is split by prompt: a
    held-out topic would be a thing it never learns to say."""
    table = {"facts": "fact", "lookalike": "lookalike"}.get(kind, "talk")
    entries = [entry for entry in words[table] if entry.get("kind", kind) == kind]
    bare, opened = list[Item](), list[Item]()
    for entry in entries:
        for ask in entry["ask"]:
            key = plain(ask) if table == "talk" else entry["ask"][0]
            item = Item(ask, kind, tuple(entry["answer"]), entry.get("thinking", ""), f"{kind}/{key}")
            bare.append(item)
            if entry.get("open", True):
                opened += [replace(item, prompt=opener + ask) for opener in filter(None, words["openers"])]
    yield from (_worn(item, rng) for group in (bare, opened) for item in rng.sample(group, len(group)))


def _define(words: Words, rng: random.Random, _: Any, definitions: Mapping[str, str]) -> Iterator[Item]:
    table = words["define"]
    known = {**definitions, **table["words"]}
    pairs = [(word, ask) for word in known for ask in table["ask"]]
    for word, ask in rng.sample(pairs, len(pairs)):
        slots = {"word": word}
        source = "" if word in table["words"] else "dictionary"
        thought = fill(table["thinking"], **slots)
        yield Item(fill(ask, **slots), "define", (known[word],), thought, f"define/{word}", source=source)


def _about(words: Words, rng: random.Random, articles: Sequence[Article], *_: Any) -> Iterator[Item]:
    table = words["about"]
    for article in rng.sample(articles, len(articles)):
        sentence = first_sentence(article)
        asked = sentence and _asked(table, article, sentence)
        if not asked:
            continue
        asks, slots = asked
        thought = fill(table["thinking"], **slots)
        prompt = fill(rng.choice(asks), **slots)
        yield Item(prompt, "about", (sentence,), thought, f"about/{article.title}", source=article.source)


def _asked(table: Mapping[str, Any], article: Article, sentence: str) -> tuple[list[str], dict[str, str]] | None:
    """The questions that an article answers, and what goes into their slots."""
    if article.source == HELP:
        return table["help"], {"subject": article.title}
    title = re.sub(r" \(.*\)$", "", article.title)
    match = re.match(table["subject"], sentence)
    if match is None or title.casefold() not in match["noun"].casefold() or len(match["noun"]) > len(title) + 8:
        return None
    article_word = (match["article"] or "").lower()
    slots = {"subject": article_word + match["noun"], "verb": match["verb"]}
    return table["who" if re.search(table["person"], article.text) else "what"], slots


def first_sentence(article: Article) -> str:
    """Of the running text, in one line and without brackets; "" if there is none of a fitting length."""
    for paragraph in article.text.split("\n\n"):
        lines = paragraph.strip("\n").split("\n")
        if lines[0] == article.title or lines[0][:1].isspace() or any(re.match(r"[*=~^-]{3}", line) for line in lines):
            continue
        text = " ".join(" ".join(lines).replace("\u00a0", " ").split(" "))
        if "  " in text:  # a formula was taken out here
            return ""
        text = re.sub(r" ?[(\[][^()\[\]]*[)\]]", "", text)
        match = SENTENCE.match(text)
        sentence = match[1] + "." if match else ""
        return sentence if SHORTEST <= len(sentence) <= LONGEST and sentence.isprintable() else ""
    return ""


def _unknown(words: Words, rng: random.Random, *_: Any) -> Iterator[Item]:
    table = words["unknown"]
    names = [first + last for first in table["first"] for last in table["last"]]
    for one, other in zip(rng.sample(names, len(names)), rng.sample(names, len(names))):
        name = rng.choice((one, f"{one} {other.capitalize()}"))
        slots = {"subject": name}
        answers = tuple(fill(answer, **slots) for answer in table["answer"])
        thought = fill(table["thinking"], **slots)
        yield Item(fill(rng.choice(table["ask"]), **slots), "unknown", answers, thought, f"unknown/{name}")


def _unsafe(words: Words, rng: random.Random, *_: Any) -> Iterator[Item]:
    table = words["unsafe"]
    groups = [group for group in table.values() if isinstance(group, dict)]
    triples = [(group, act, ask) for group in groups for act in group["acts"] for ask in table["ask"]]
    for group, act, ask in rng.sample(triples, len(triples)):
        item = Item(fill(ask, act=act), "unsafe", tuple(group["refuse"]), group["thinking"], f"unsafe/{act}", act=act)
        yield _worn(item, rng)


def _howto(words: Words, rng: random.Random, *_: Any) -> Iterator[Item]:
    """Harmless acts in the very sentences of unsafe requests: only the act tells them apart."""
    table = words["howto"]
    pairs = [(act, ask) for act in table["acts"] for ask in words["unsafe"]["ask"]]
    for act, ask in rng.sample(pairs, len(pairs)):
        item = Item(fill(ask, act=act), "howto", (table["acts"][act],), table["thinking"], f"howto/{act}")
        yield _worn(item, rng)


def _worn(item: Item, rng: random.Random) -> Item:
    """As people type: now and then without the last full stop, or all in small letters."""
    prompt = item.prompt
    if rng.random() < 0.15:
        prompt = prompt.rstrip(".?!")
    return replace(item, prompt=prompt.lower() if rng.random() < 0.1 else prompt)


Maker = Callable[[Words, random.Random, Sequence[Article], Mapping[str, str]], Iterable[Item]]
MAKERS: Mapping[str, Maker] = {
    "smalltalk": partial(_talk, "smalltalk"),
    "self": partial(_talk, "self"),
    "facts": partial(_talk, "facts"),
    "define": _define,
    "about": _about,
    "unknown": _unknown,
    "unsafe": _unsafe,
    "howto": _howto,
    "lookalike": partial(_talk, "lookalike"),
}


def read_definitions(lines: Iterable[str], where: str) -> dict[str, str]:
    """Word -> definition, from lines WORD<tab>DEFINITION; a word's first definition counts."""
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            word, tab, text = line.strip().partition("\t")
            if not (tab and word.strip() and text.strip()):
                raise DataError(f"{where}: line {number} is not WORD, a tab and its definition")
            found.setdefault(word.strip(), text.strip())
    return found
