"""Words whose letters are turned around or counted (ladder.py).

A tokenizer cuts a word into pieces of several letters, and a model can only spell a piece that it has seen spelt. Plain
syllables have few pieces; common words, and made-up ones that look English, have most of those that stand in others.
"""

import random

CONSONANTS, VOWELS = "bdfgklmnprstv", "aeiou"
ONSETS = (
    *"bcdfghjklmnprstvwyz",
    *("bl", "br", "ch", "cl", "cr", "dr", "fl", "fr", "gl", "gr", "pl", "pr", "qu", "sc", "sh", "sl", "sm", "sn", "sp"),
    *("st", "str", "sw", "th", "tr", "wh"),
)
NUCLEI = (*"aeiouaeiou", "ai", "ea", "ee", "ie", "oa", "oo", "ou", "y")
CODAS = (
    *("", "", "", *"dglmnprstxy"),
    *("ble", "ck", "er", "ff", "ft", "ing", "ld", "le", "ll", "mp", "nd", "ng", "nk", "nt", "rd", "rk", "rm", "rn"),
    *("rry", "rst", "rt", "sh", "sk", "ss", "st", "th", "tion", "tter", "ve"),
)

COMMON = """
air and animal answer apple apples arm baby ball banana bear bed bird black blue boat body book bottle box boy bread
bridge brother brown bus butter cake car cat chair cheese child church city class clock cloud coffee cold color computer
corn cow cup day desk doctor dog door dream dress earth egg elephant eye face family farm father field finger fire fish
floor flower food foot forest friend frog fruit game garden girl glass gold grass green hair hand hat head heart hello
hill home horse house ice island juice key king kitchen lake lamp leaf lemon letter level light lion love man map milk
money monkey moon morning mother mountain mouse music name night noon nose number ocean orange paper parrot pencil
people pepper phone piano pizza plane plant potato queen question rabbit radar rain red ring river road rock rocket room
rose salt sand school sea ship shoe sister sky snow song space spoon spring star stone storm strawberry street sugar
summer sun table teacher tiger time tomato tree water wheel white wind window winter wolf woman wood word world yellow
"""


def syllables(rng: random.Random, length: int, consonants: str = CONSONANTS, vowels: str = VOWELS) -> str:
    """Consonants and vowels in turn."""
    start = rng.randrange(2)
    return "".join(rng.choice(consonants if (start + place) % 2 else vowels) for place in range(length))


def english_word(rng: random.Random, shortest: int, longest: int) -> str:
    """A common word; or as many syllables with clusters of consonants as it takes, cut off."""
    if rng.random() < 0.3 and (fitting := [word for word in COMMON.split() if shortest <= len(word) <= longest]):
        return rng.choice(fitting)
    length, word = rng.randint(shortest, longest), ""
    while len(word) < length:
        word += rng.choice(ONSETS) + rng.choice(NUCLEI) + rng.choice(CODAS)
    return word[:length]
