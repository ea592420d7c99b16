"""Can a person read this? Language, repetition and form of a thought, as plain functions of the text.

    language_share("So 3 加 4 is 7", "en")       0.667: words of the language / words (R1's language reward)
    repeats("wait, no. " * 50)                   0.96: share of the text that has been there twice before
    is_readable(text, Readable(paragraph=400))   None, or the reason why not

R1 keeps samples for training only if their thoughts are of one language, without repetition, code blocks or long
paragraphs (R1 2.3.1, 2.3.3). Languages are told apart by script and, where they share the Latin one, by their small
words; numbers, formulas and single letters belong to every language. Left out: grammar, sense, and languages not in
`LANGUAGES`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sputnik.errors import ConfigError

HAN, KANA, HANGUL, CYRILLIC, ARABIC = (
    "\u3400-\u9fff",
    "\u3040-\u30ff",
    "\uac00-\ud7af",
    "\u0400-\u04ff",
    "\u0600-\u06ff",
)
LATIN = "A-Za-z\u00c0-\u024f"
LANGUAGES: Mapping[str, str] = {
    "zh": HAN, "ja": HAN + KANA, "ko": HANGUL, "ru": CYRILLIC, "ar": ARABIC,
    "en": "A-Za-z", "de": LATIN, "fr": LATIN, "es": LATIN, "it": LATIN, "pt": LATIN,
}  # fmt: skip
"""Language -> letters it is written in."""
SMALL_WORDS: Mapping[str, str] = {
    "en": "the and is of to that it for with are this be not we have from by or which then but if can will has than "
    "there at you they what so an first now as its my let",
    "de": "der das und ist nicht ein eine einen mit auf für sich von dem wird sind auch wir ich aber wenn dann noch "
    "wie oder zu",
    "fr": "le les une est pas qui dans avec sur nous vous mais donc et elle sont cette ou aussi alors au du",
    "es": "el los las por para pero esto hay también muy porque cuando entonces sí su lo",
    "it": "che di della sono perché anche allora quindi dunque questo gli nel più ed",
    "pt": "não uma você são isso então também mas os ao",
}
"""No word stands in two lists: each is proof of its language."""
COMMAND = re.compile(r"\\[A-Za-z]+")  # of TeX
WORD = re.compile(rf"[{HAN}{KANA}]|[^\W\d_{HAN}{KANA}]+(?:['\u2019][^\W\d_{HAN}{KANA}]+)*")
PIECE = re.compile(rf"[{HAN}{KANA}]|[^\W{HAN}{KANA}]{{1,12}}|[^\w\s]")
RUN = 6
"""Pieces (words, numbers, signs) in a row that count as the same passage."""
MARKDOWN = re.compile(r"^#{1,6} |\*\*\S.*?\*\*|^\|.*\|\s*$", re.MULTILINE)
BROKEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")


@dataclass(frozen=True)
class Readable:
    """What a thought must be like to be kept."""

    language: str = "en"
    """"" for any; see `LANGUAGES`."""
    language_share: float = 0.9
    """Words that must be of the language."""
    repeats: float = 0.2
    """Of the text at most; a check that goes through the working once more is no repetition."""
    code_blocks: bool = False
    markdown: bool = True
    """May there be headings, bold words, tables?"""
    paragraph: int = 1000
    """Longest line in characters."""
    shortest: int = 1
    longest: int = 100_000
    """Characters of the whole."""

    def __post_init__(self) -> None:
        if self.language:
            _check(self.language)
        for name in ("language_share", "repeats"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: a share is between 0 and 1")
        if not 0 <= self.shortest <= self.longest or self.paragraph < 1:
            raise ConfigError("need 0 <= shortest <= longest and paragraph >= 1")


def is_readable(text: str, rules: Readable | None = None) -> str | None:
    """None if it is, else the reason, in one or two words that can be counted."""
    rules = rules or Readable()
    if len(text) < rules.shortest:
        return "too short"
    if len(text) > rules.longest:
        return "too long"
    if BROKEN.search(text):
        return "broken characters"
    if not rules.code_blocks and "```" in text:
        return "code block"
    if not rules.markdown and MARKDOWN.search(text):
        return "markdown"
    if max(map(len, text.splitlines()), default=0) > rules.paragraph:
        return "long paragraph"
    if repeats(text) > rules.repeats:
        return "repetition"
    if rules.language and language_share(text, rules.language) < rules.language_share:
        return "language"
    return None


def language_share(text: str, language: str) -> float:
    """Words of `language` / words; 1.0 for a text without words. A Chinese or Japanese character counts as a word."""
    _check(language)
    belongs = list(_belongs(text, language))
    return sum(belongs) / len(belongs) if belongs else 1.0


def repeats(text: str) -> float:
    """Share of the passages of `RUN` pieces that have stood there at least twice before; 0.0 for short texts."""
    pieces = PIECE.findall(text)
    seen: Counter[tuple[str, ...]] = Counter()
    again = 0
    for place in range(len(pieces) - RUN + 1):
        passage = tuple(pieces[place : place + RUN])
        again += seen[passage] >= 2
        seen[passage] += 1
    return again / total if (total := seen.total()) else 0.0


def _belongs(text: str, language: str) -> Iterator[bool]:
    """For each word, is it of the language? A word in its letters that proves nothing goes with the last that did."""
    own = re.compile(f"[{LANGUAGES[language]}'\u2019]+")
    proofs = {word: name for name, words in SMALL_WORDS.items() for word in words.split()}
    now = language
    for match in WORD.finditer(COMMAND.sub(" ", text)):
        word = match.group()
        if len(word) == 1 and re.fullmatch(f"[{LATIN}]", word):  # a variable
            continue
        if not own.fullmatch(word):
            yield False
            continue
        if language in SMALL_WORDS:
            now = proofs.get(word.lower(), now)
        yield now == language


def _check(language: str) -> None:
    if language not in LANGUAGES:
        raise ConfigError(f"no language {language!r}; choose one of {', '.join(LANGUAGES)}")
