"""The questions of arithmetic and of the ladder in other words, as people ask them.

A family asks every question in one way, so that a small model learns to reckon before it learns to read. Examples made
from its answers may stand below any of these wordings (`reworded` of train/traces.py), and it comes to understand them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "arithmetic": (
            "What is {spaced}?", "{joined}", "{spaced}", "{joined}=", "{joined}=?", "{spaced} = ?",
            "How much is {joined}?", "How much is {spaced}?", "Compute {joined}.", "What is {spoken}?",
            "what is {joined}",
        ),
        "ladder:compare": (
            "Which is larger, {either}?", "Which number is larger, {either}?", "{either}: which is larger?",
            "What is the largest of {commas}?", "Which is the largest: {commas}?", "Which is bigger, {either}?",
            "{either}?",
        ),
        "ladder:sort": (
            "Sort {commas}", "Sort {commas}.", "Sort {blanks}", "Sort these numbers: {commas}",
            "Sort the numbers {blanks}.", "Sort from small to large: {commas}", "Put these numbers in order: {blanks}",
        ),
        "ladder:gcd": (
            "gcd({commas})", "What is gcd({commas})?", "What is the gcd of {both}?", "gcd of {both}",
            "Find the greatest common divisor of {both}.", "Greatest common divisor of {both}?",
        ),
        "ladder:equation": (
            "Solve {spaced} for x.", "Solve {joined}", "Solve {spaced}.", "{joined}", "{spaced}, what is x?",
            "What is x if {joined}?", "{joined}, x=?", "Find x: {spaced}",
        ),
        "ladder:reverse": (
            'Reverse "{word}".', 'Reverse the word "{word}".', 'Spell "{word}" backwards.',
            'What is "{word}" backwards?', "Write {word} backwards.", "Reverse {word}",
        ),
        "ladder:count": (
            'How many times does {letter} occur in "{word}"?', 'How many {letter} are in "{word}"?',
            'Count the letter {letter} in "{word}".', 'How often is {letter} in "{word}"?',
            "How many times is {letter} in {word}?", 'How many {letter}\'s are in "{word}"?',
        ),
    }
)  # fmt: skip
"""Family -> what may stand in place of its own prompt."""


def wordings(family: str, meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Other prompts for the problem of `family` with this `meta`."""
    parts = _parts(meta)
    return tuple(form.format(**parts) for form in FORMS[family])


def _parts(meta: Mapping[str, Any]) -> dict[str, str]:
    """What the forms are filled with."""
    if "word" in meta:
        return {"word": meta["word"], "letter": meta.get("letter", "")}
    if "parts" in meta:
        a, sign, b, c = meta["parts"]
        return {"joined": f"{a}x{sign}{b}={c}", "spaced": f"{a}x {sign} {b} = {c}"}
    if "words" in meta:
        spoken = {"+": "plus", "-": "minus", "*": "times"}
        return {
            "joined": "".join(meta["words"]),
            "spaced": " ".join(meta["words"]),
            "spoken": " ".join(spoken.get(word, word) for word in meta["words"]),
        }
    *others, last = map(str, meta["numbers"])
    first = ", ".join(others)
    return {
        "commas": f"{first}, {last}",
        "blanks": " ".join([*others, last]),
        "either": f"{first} or {last}",
        "both": f"{first} and {last}",
    }
