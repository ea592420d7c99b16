r"""The one plain form an answer may stand in: "The answer is X." or \boxed{X}.

    final_answer("The answer is 7.")      "7"
    final_answer("It is 7 or 8.")         as it is: the verifier decides

Models that talk to people answer in sentences; gold answers and verifiers stay bare. The form must be the whole text,
so it cannot hide a second answer: what holds another sentence, another box or a box in a box goes to the verifier as it
is written.
"""

import re

BOX = "\\boxed{"
SENTENCE = re.compile(r"The answer is (\S(?:.*\S)?)\.")
TWO_CLAIMS = re.compile(r"[.!?]\s|\\boxed|the answer is", re.IGNORECASE)


def final_answer(text: str) -> str:
    """The X of a text that is nothing but the form (a box may be the X of the sentence); any other text as it is."""
    inner = text.strip()
    if sentence := SENTENCE.fullmatch(inner):
        inner = sentence[1]
    dollars = len(inner) > 1 and inner[0] == inner[-1] == "$"
    bare = inner[1:-1] if dollars else inner
    if bare.startswith(BOX) and bare.count("\\boxed") == 1 and boxes(bare) == [bare[len(BOX) : -1]]:
        inner = bare[len(BOX) : -1].strip()
    return text if not inner or TWO_CLAIMS.search(inner) else inner


def boxes(text: str) -> list[str]:
    r"""The contents of each \boxed{...} in the text, braces balanced; an unclosed one is left out."""
    found, opened = list[tuple[int, str]](), list[int | None]()
    for brace in re.finditer(r"\\boxed\{|[{}]", text):
        if brace[0] != "}":
            opened.append(brace.end() if brace[0] != "{" else None)
        elif opened and (start := opened.pop()) is not None:
            found.append((start, text[start : brace.start()]))
    return [content for _, content in sorted(found)]
