"""The questions of arithmetic and of the ladder in other words, as people ask them.

A family asks every question in one way, so that a small model learns to reckon before it learns to read. Examples made
from its answers may stand below any of these wordings (`reworded` of train/traces.py), and it comes to understand them.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sputnik.tasks.base import Problem, Task, broken_task

FORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "arithmetic": (
            "What is {spaced}?", "{joined}", "{spaced}", "{joined}=", "{joined}=?", "{spaced} = ?", "{spaced} =",
            "How much is {joined}?", "How much is {spaced}?", "Compute {joined}.", "Calculate {joined}.",
            "Calculate {spaced}", "What is {spoken}?", "How much is {spoken}?", "{spoken}", "What's {joined}?",
            "What's {spaced}?", "Please calculate {joined}.", "Can you tell me what {spaced} is?",
        ),
        "ladder:compare": (
            "Which is larger, {either}?", "Which number is larger, {either}?", "{either}: which is larger?",
            "What is the largest of {commas}?", "Which is the largest: {commas}?", "Which is bigger, {either}?",
            "{either}?", "Which is greater: {either}?", "What is the maximum of {both}?", "max({commas})",
            "Which number is the biggest, {either}?", "Which of {both} is larger?",
        ),
        "ladder:sort": (
            "Sort {commas}", "Sort {commas}.", "Sort {blanks}", "Sort these numbers: {commas}",
            "Sort the numbers {blanks}.", "Sort from small to large: {commas}", "Put these numbers in order: {blanks}",
            "Put these numbers in order: {commas}", "Put {commas} in order.", "Sort the list [{commas}].",
            "Order these numbers from small to large: {commas}",
        ),
        "ladder:gcd": (
            "gcd({commas})", "What is gcd({commas})?", "What is the gcd of {both}?", "gcd of {both}",
            "Find the greatest common divisor of {both}.", "Greatest common divisor of {both}?", "GCD of {both}?",
            "What is the GCD of {both}?", "Find the gcd of {both}.", "What is the largest number that divides {both}?",
        ),
        "ladder:equation": (
            "Solve {spaced} for x.", "Solve {joined}", "Solve {spaced}.", "{joined}", "{spaced}",
            "{spaced}, what is x?",
            "What is x if {joined}?", "{joined}, x=?", "Find x: {spaced}", "If {spaced}, what is x?",
            "Solve for x: {joined}", "Solve the equation {joined}.", "What is x in {spaced}?",
        ),
        "ladder:reverse": (
            'Reverse "{word}".', 'Reverse the word "{word}".', 'Spell "{word}" backwards.', "Spell {word} backwards.",
            'What is "{word}" backwards?', "Write {word} backwards.", "Reverse {word}", "What is {word} backwards?",
            "Reverse the word {word}.", "{word} backwards", 'Write "{word}" in reverse.', 'Turn "{word}" around.',
        ),
        "ladder:count": (
            'How many times does {letter} occur in "{word}"?', 'How many {letter} are in "{word}"?',
            'Count the letter {letter} in "{word}".', 'How often is {letter} in "{word}"?',
            "How many times is {letter} in {word}?", 'How many {letter}\'s are in "{word}"?',
            "How many {letter}'s are in {word}?", "Count the {letter} in {word}.",
            "How many times does the letter {letter} appear in {word}?", "How many {letter} are there in {word}?",
        ),
    }
)  # fmt: skip
"""Family -> what may stand in place of its own prompt."""


def wordings_of(task: Task, problem: Problem) -> Sequence[str]:
    """`Task.wordings`; an exception becomes a TaskError that names the place."""
    task = task.task_of(problem)
    try:
        return task.wordings(problem)
    except Exception as error:
        raise broken_task(error, f"{type(task).__name__}.wordings", type(task)) from error


def wordings(family: str, meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Other prompts for the problem of `family` with this `meta`, each also as one types it in haste."""
    parts = _parts(meta)
    forms = dict.fromkeys(each for form in FORMS[family] for each in (form, _hasty(form)))
    return tuple(form.format(**parts) for form in forms)


def _hasty(form: str) -> str:
    """Without a capital at the beginning and a mark at the end."""
    small = form if form.startswith(("{", "GCD")) else form[0].lower() + form[1:]
    return small.rstrip("?. ")


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
