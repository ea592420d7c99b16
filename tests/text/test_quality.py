"""Language, repetition and form of a text, on texts of which everybody knows the right answer."""

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sputnik.errors import ConfigError
from sputnik.tasks.base import load_task
from sputnik.text.quality import SMALL_WORDS, Readable, is_readable, language_share, repeats

TEXTS = {
    "en": "First I add the two numbers. The sum of three and four is seven, so the answer must be seven. Let me check.",
    "de": "Zuerst addiere ich die beiden Zahlen. Die Summe von drei und vier ist sieben, also ist die Antwort sieben.",
    "fr": "D'abord nous prenons les deux nombres. La somme de trois et quatre est sept, donc le résultat est sept.",
    "es": "Primero sumamos los dos números. La suma de tres y cuatro es siete, entonces el resultado es siete.",
    "it": "Prima sommiamo i due numeri. Quindi la somma di tre e quattro è sette, dunque questo è il risultato.",
    "pt": "Primeiro somamos os dois números. Isso não é difícil, porque você vê então que a soma é sete.",
    "ru": "Сначала я складываю два числа. Сумма трёх и четырёх равна семи.",
    "zh": "首先把两个数加起来。三加四等于七，所以答案是七。",
    "ja": "まず二つの数を足します。三と四の和は七です。",
    "ko": "먼저 두 수를 더합니다. 삼과 사의 합은 칠입니다.",
    "ar": "أولا نجمع العددين ثم نكتب الناتج",
}


@pytest.mark.parametrize("language", TEXTS)
def test_a_text_is_of_its_own_language_and_of_no_other(language: str) -> None:
    # Four words of five, for a sentence may begin with words that prove nothing. Han characters are Japanese too.
    assert language_share(TEXTS[language], language) >= 0.8
    assert language == "zh" or language_share(TEXTS[language], "zh") < 0.5
    assert language == "en" or language_share(TEXTS[language], "en") < 0.5


def test_the_share_is_counted_in_words() -> None:
    assert language_share("So 3 加 4 is 7", "en") == 2 / 3
    assert language_share("the sum 是 seven", "en") == 3 / 4
    assert language_share("the sum is 七, 七 or 七", "en") == 4 / 7
    assert language_share("于是 x = 3, 所以 y = 4", "zh") == 1.0, "a variable is no English"
    assert language_share("\\frac{1}{2} + \\sqrt{x} 等于", "zh") == 1.0
    assert language_share("the café is", "en") == 2 / 3


@pytest.mark.parametrize("text", ["", "7+5=12\n12-3=9", "x = y + 2", "\n"])
def test_a_text_without_words_is_of_every_language(text: str) -> None:
    assert language_share(text, "en") == language_share(text, "zh") == 1.0


@given(st.text(max_size=80), st.sampled_from(sorted(TEXTS)))
def test_shares_are_shares(text: str, language: str) -> None:
    assert 0 <= language_share(text, language) <= 1 and 0 <= repeats(text) <= 1


def test_more_of_another_language_never_raises_the_share() -> None:
    shares = [language_share(TEXTS["en"] + TEXTS["zh"][:n], "en") for n in range(len(TEXTS["zh"]))]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1.0


def test_no_small_word_is_of_two_languages() -> None:
    for first, second in combinations(SMALL_WORDS, 2):
        assert not set(SMALL_WORDS[first].split()) & set(SMALL_WORDS[second].split()), (first, second)


def test_an_unknown_language_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no language 'xx'; choose one of zh, ja"):
        language_share("", "xx")


def test_loops_are_repetition_and_one_more_pass_is_not() -> None:
    working = "7+5=12\n12-3=9\n9+8=17\n17-4=13\n13+6=19"
    assert repeats(f"Step by step.\n{working}\nCheck: {working}") == 0.0
    assert repeats("Wait, no. " * 50) > 0.9
    assert repeats("ha" * 500) > 0.9 and repeats("三" * 100) > 0.9 and repeats("=" * 100) > 0.9
    assert 0.2 < repeats("\n".join([working] * 3)) < 0.4
    rng = random.Random(0)
    assert repeats(" ".join(str(rng.randrange(10**6)) for _ in range(500))) == 0.0


@pytest.mark.parametrize(
    ("text", "rules", "reason"),
    [
        (TEXTS["en"], {}, None),
        ("7+5=12\n12-3=9", {}, None),
        ("", {}, "too short"),
        ("7", {"shortest": 2}, "too short"),
        ("7+5=12", {"longest": 5}, "too long"),
        ("the sum \ufffd is", {}, "broken characters"),
        ("the sum \x1b is", {}, "broken characters"),
        ("so\n```python\nprint(1)\n```", {}, "code block"),
        ("so\n```python\nprint(1)\n```", {"code_blocks": True}, None),
        ("## Step 1\nthe sum", {}, None),
        ("## Step 1\nthe sum", {"markdown": False}, "markdown"),
        ("it is **seven**", {"markdown": False}, "markdown"),
        ("2 ** 3 ** 2 is 3 * 3", {"markdown": False}, None),
        (TEXTS["en"], {"paragraph": 50}, "long paragraph"),
        (TEXTS["en"].replace(". ", ".\n"), {"paragraph": 80}, None),
        ("no, wait. " * 40, {}, "repetition"),
        ("no, wait. " * 40, {"repeats": 1.0}, None),
        (TEXTS["zh"], {}, "language"),
        (TEXTS["zh"], {"language": "zh"}, None),
        (TEXTS["en"] + TEXTS["zh"], {"language": ""}, None),
        (TEXTS["en"] + TEXTS["zh"], {"language_share": 0.3}, None),
    ],
)
def test_the_reason_is_named(text: str, rules: dict, reason: str | None) -> None:
    assert is_readable(text, Readable(**rules)) == reason


def test_worked_examples_are_readable() -> None:
    for example in load_task("arithmetic").demonstrations(300, seed=0):
        assert is_readable(example.thinking or "") is None, example.thinking


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"language": "english"}, "no language 'english'"),
        ({"language_share": 1.5}, "language_share = 1.5: a share"),
        ({"repeats": -1}, "repeats = -1: a share"),
        ({"shortest": 9, "longest": 3}, "shortest <= longest"),
    ],
)
def test_impossible_rules_are_refused(rules: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Readable(**rules)
