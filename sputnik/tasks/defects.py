"""Answers that are worse on purpose: preference pairs with a named defect, and outputs labelled safe or unsafe.

The rejected answer of a pair has one controlled defect. Half of the time a longer one is taken where there is one, else
a shorter one, so length tells little; the same text may be chosen in one pair and rejected in another (an answer off
topic, a refusal), so only who reads the question can tell. Left out: wrong facts in fluent prose, which a judge of this
size could not see.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sputnik.tasks.general import Item, Words, fill


@dataclass(frozen=True)
class Pair:
    item: Item
    chosen: str
    rejected: str
    defect: str


@dataclass(frozen=True)
class Output:
    """A whole output with its label; `why` names what makes it so."""

    item: Item
    thinking: str | None
    answer: str
    safe: bool
    why: str


@dataclass(frozen=True)
class Draw:
    """What a defect is made from: the words, foreign sentences, and another prompt's answer."""

    words: Words
    rng: random.Random
    foreign: Sequence[str]
    other: str

    def some(self, table: str, least: int, most: int) -> str:
        """So many different phrases of a table, as one text."""
        phrases: list[str] = self.words["defects"][table]
        return " ".join(self.rng.sample(phrases, min(len(phrases), self.rng.randint(least, most))))


Defect = Callable[[Draw, Item, str], str]


def _off_topic(draw: Draw, item: Item, answer: str) -> str:
    return draw.other


def _cut_off(draw: Draw, item: Item, answer: str) -> str:
    parts = answer.split(" ")
    return " ".join(parts[: draw.rng.randint(len(parts) // 4, 3 * len(parts) // 4)]).rstrip(".,!?;:")


def _repetitive(draw: Draw, item: Item, answer: str) -> str:
    parts = answer.split(" ")
    start = parts[: draw.rng.randint(1, min(5, len(parts)))]
    return " ".join(start * draw.rng.randint(3, 6))


def _rude(draw: Draw, item: Item, answer: str) -> str:
    insult = draw.rng.choice((draw.some("rude", 1, 3), insulting(draw.words, draw.rng)))
    return draw.rng.choice((insult, f"{insult} {answer}", f"{answer} {insult}"))


def _hedging(draw: Draw, item: Item, answer: str) -> str:
    return draw.some("hedge", 1, 4)


def _padded(draw: Draw, item: Item, answer: str) -> str:
    return f"{answer} {draw.some('padding', 2, 4)}"


def _curt(draw: Draw, item: Item, answer: str) -> str:
    return draw.some("curt", 1, 1)


def _wrong_language(draw: Draw, item: Item, answer: str) -> str:
    return draw.rng.choice(draw.foreign)


def _refused(draw: Draw, item: Item, answer: str) -> str:
    """Half of the time in the very words that are right for an unsafe request."""
    groups = [group for group in draw.words["unsafe"].values() if isinstance(group, dict)]
    meant: str = draw.rng.choice(draw.rng.choice(groups)["refuse"])
    return meant if draw.rng.random() < 0.5 else draw.some("refuse", 1, 2)


def _complied(draw: Draw, item: Item, answer: str) -> str:
    return complying(draw.words, draw.rng, item.act)


def _preached(draw: Draw, item: Item, answer: str) -> str:
    return f"{answer} {draw.some('sermon', 2, 3)}"


ALWAYS: Mapping[str, Defect] = {
    "off_topic": _off_topic, "cut_off": _cut_off, "repetitive": _repetitive, "rude": _rude, "hedging": _hedging,
    "padded": _padded, "curt": _curt, "wrong_language": _wrong_language,
}  # fmt: skip
TO_SAFE: Mapping[str, Defect] = {"refused": _refused}
TO_UNSAFE: Mapping[str, Defect] = {"complied": _complied, "preached": _preached}
NEAR = ("howto", "lookalike")
"""Kinds of harmless prompts that are close to unsafe ones: they come twice as often."""
OFTEN: Mapping[str, int] = {"off_topic": 4, "refused": 3, "complied": 4}
"""How much likelier than the others are those that only the question gives away."""


def make_pairs(words: Words, items: Sequence[Item], count: int, foreign: Sequence[str], seed: int) -> list[Pair]:
    """Up to `count` different pairs, as many for each item as for any other."""
    rng = random.Random(f"pairs/{seed}")
    found: dict[tuple[str, str, str], Pair] = {}
    for item in _rounds(items, count, rng):
        chosen = rng.choice(item.answers)
        draw = Draw(words, rng, foreign, _other(items, item, rng))
        makers = {**ALWAYS, **(TO_UNSAFE if item.act else TO_SAFE)}
        worse = {name: make(draw, item, chosen) for name, make in makers.items()}
        usable = {name: text for name, text in worse.items() if text.strip() and text not in item.answers}
        longer = [name for name, text in usable.items() if len(text) > len(chosen)]
        shorter = [name for name, text in usable.items() if len(text) <= len(chosen)]
        first, second = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
        (defect,) = rng.choices(first or second, [OFTEN.get(name, 1) for name in first or second])
        pair = Pair(item, chosen, usable[defect], defect)
        found.setdefault((item.prompt, chosen, pair.rejected), pair)
        if len(found) == count:
            break
    return list(found.values())


def make_outputs(words: Words, items: Sequence[Item], count: int, seed: int) -> list[Output]:
    """Up to `count` different outputs, half of them unsafe. The harm may be in the answer or in the thought alone: it
    is the whole output that is judged. Half answer unsafe requests, of those too one safe for each unsafe one: the
    prompt alone says nothing."""
    rng = random.Random(f"outputs/{seed}")
    asked = [item for item in items if item.act]
    others = [item for item in items if not item.act]
    others += [item for item in others if item.kind in NEAR]
    found: dict[tuple[str, str | None, str], Output] = {}
    for turn, drawn in enumerate(zip(_rounds(asked or others, count, rng), _rounds(others or asked, count, rng))):
        item = drawn[turn // 2 % 2]
        output = _safe(item, rng) if turn % 2 else _harmful(words, item, rng)
        found.setdefault((item.prompt, output.thinking, output.answer), output)
        if len(found) == count:
            break
    return list(found.values())


def _safe(item: Item, rng: random.Random) -> Output:
    why = "refusal" if item.act else item.kind
    return Output(item, _sometimes(item.thinking, rng), rng.choice(item.answers), True, why)


def _harmful(words: Words, item: Item, rng: random.Random) -> Output:
    harm = words["harm"]
    if not item.act or rng.random() < 0.2:
        insult, answer = insulting(words, rng), rng.choice(item.answers)
        text = rng.choice((insult, f"{insult} {answer}", f"{answer} {insult}"))
        return Output(item, _sometimes(item.thinking, rng), text, False, "insult")
    thought = fill(rng.choice(harm["thinking"]), act=item.act)
    if rng.random() < 0.25:
        return Output(item, thought, rng.choice(item.answers), False, "harmful_thought")
    return Output(item, _sometimes(thought, rng), complying(words, rng, item.act), False, "complied")


def complying(words: Words, rng: random.Random, act: str) -> str:
    """Going along with `act`, in steps that say nothing of use."""
    harm = words["harm"]
    opening = fill(rng.choice(harm["opening"]), act=act)
    steps = [step[:1].upper() + step[1:] + "." for step in rng.sample(harm["steps"], rng.randint(1, 3))]
    return " ".join([opening, *steps][rng.randint(0, 1) :])


def insulting(words: Words, rng: random.Random) -> str:
    who, what, end = (rng.choice(words["harm"][part]) for part in ("who", "what", "end"))
    return f"{who} {what}{end}"


def _sometimes(thinking: str, rng: random.Random) -> str | None:
    """Outputs come with the thought, or from a model that was told not to think."""
    return thinking if rng.random() < 0.7 else None


def _rounds(items: Sequence[Item], count: int, rng: random.Random) -> Iterator[Item]:
    """Every item once in an order of its own, then again, for `count` distinct results and some repeats."""
    for _ in range(4 * count // max(1, len(items)) + 1 if items else 0):
        yield from rng.sample(items, len(items))


def _other(items: Sequence[Item], item: Item, rng: random.Random) -> str:
    """An answer to something else, of another kind if there is one."""
    for _ in range(20):
        other = rng.choice(items)
        if other.kind != item.kind:
            return rng.choice(other.answers)
    return ""
