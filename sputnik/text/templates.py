"""The prompt templates as files (`chat.jinja`, `zero.jinja`) and their fingerprints.

`chat` is R1's: thoughts of earlier turns are dropped and the reply starts inside the thought; with `thinking=False` the
thought is closed at once (V3.1). `zero` is R1-Zero's plain text, where the model has to open the thought itself.
`text/chat.py` renders them to token ids; a saved tokenizer carries `chat` for other programs.
"""

import hashlib
from importlib.resources import files

from sputnik.errors import ConfigError

NAMES = ("chat", "zero")


def template_source(name: str) -> str:
    """The Jinja text of a template, as other programs may render it."""
    check_template(name)
    return (files("sputnik.text") / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def check_template(name: str) -> None:
    if name not in NAMES:
        raise ConfigError(f"unknown template {name!r}: choose one of {', '.join(NAMES)}")


def template_hash(name: str) -> str:
    """Short fingerprint that goes beside every score: two scores compare only if their templates are equal."""
    return hashlib.sha256(template_source(name).encode()).hexdigest()[:16]
