"""Tool calls: what is rendered is read back to the letter, and whatever a model writes is told apart, never raised."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sputnik.errors import DataError
from sputnik.text.chat import render
from sputnik.text.tokenizer import ADDED, BOS, EOS, TOOL_SEP, TOOLS, Tokenizer
from sputnik.text.tools import BrokenCall, CallParser, ToolCall, split_calls

CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, _, _, OUTPUT_BEGIN, OUTPUT_END = TOOLS
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a 城市 😀",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
slow_draws = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
names = st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True)
arguments = st.builds(
    lambda value, indent, ascii: json.dumps(value, indent=indent, ensure_ascii=ascii),
    st.dictionaries(st.text(max_size=5) | st.sampled_from(TOOLS), values, max_size=3),
    st.none() | st.integers(0, 2),
    st.booleans(),
)


def called(*calls: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": text}} for name, text in calls]


def conversation(*calls: tuple[str, str], content: str | None = None) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": content, "tool_calls": called(*calls)},
    ]


def answered(tok: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """Ids of the last assistant's turn as a model would have written them."""
    before = render(tok, messages[:-1], thinking=False).ids
    whole = render(tok, messages, add_generation_prompt=False).ids
    assert whole[: len(before)] == before
    return list(whole[len(before) :])


def split(tok: Tokenizer, text: str, **names: Any) -> tuple[str, list[ToolCall | BrokenCall]]:
    ids, calls = split_calls(tok, tok.encode_with_special(text), **names)
    return tok.decode(ids), calls


@settings(max_examples=80, deadline=None, suppress_health_check=slow_draws)
@given(calls=st.lists(st.tuples(names, arguments), min_size=1, max_size=3), content=st.text(max_size=8))
def test_a_rendered_call_is_read_back_to_the_letter(tok: Tokenizer, calls: list[tuple[str, str]], content: str) -> None:
    """Also when the arguments spell control tokens or are written with white space of their own."""
    ids = answered(tok, conversation(*calls, content=content))
    assert ids[-1] == tok.eos_id
    text, found = split_calls(tok, ids[:-1])
    assert found == [ToolCall(name, text) for name, text in calls]
    assert tok.decode(text) == content


def test_the_prompt_is_that_of_v31(tok: Tokenizer) -> None:
    messages = [
        *conversation(("get_weather", '{"city": "北京"}'), ("clock", "{}"), content="Let me look."),
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "12:00"},
    ]
    assert tok.decode(render(tok, messages).ids) == (
        f"{BOS}Be brief.<｜User｜>Weather?<｜Assistant｜></think>Let me look.{CALLS_BEGIN}"
        f'{CALL_BEGIN}get_weather{TOOL_SEP}{{"city": "北京"}}{CALL_END}{CALL_BEGIN}clock{TOOL_SEP}{{}}{CALL_END}'
        f"{CALLS_END}{EOS}{OUTPUT_BEGIN}sunny{OUTPUT_END}{OUTPUT_BEGIN}12:00{OUTPUT_END}"
    )
    assert not render(tok, messages).in_thought
    more = [*messages, {"role": "assistant", "content": "Sunny at noon."}, {"role": "user", "content": "Thanks"}]
    assert tok.decode(render(tok, more).ids).endswith(
        f"12:00{OUTPUT_END}Sunny at noon.{EOS}<｜User｜>Thanks<｜Assistant｜><think>\n"
    )


def test_definitions_stand_after_the_system_text(tok: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]
    text = tok.decode(render(tok, messages, tools=[WEATHER, CLOCK]).ids)
    parameters = json.dumps(WEATHER["function"]["parameters"])  # type: ignore[index]
    assert text.startswith(
        f"{BOS}Be brief.\n\n## Tools\nYou have access to the following tools:\n\n### get_weather\n"
        f"Description: Weather of a 城市 😀\n\nParameters: {parameters}\n\n"
        "### clock\nDescription: \n\nParameters: {}\n"
    )
    assert text.endswith("without separators or spaces<｜User｜>?<｜Assistant｜><think>\n")
    bare = tok.decode(render(tok, messages[1:], tools=[CLOCK]).ids)
    assert bare.startswith(f"{BOS}## Tools\n")


def test_other_programs_render_the_same_prompt(tok: Tokenizer, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    tok.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        *conversation(("get_weather", '{"city": "北京"}')),
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "And tomorrow?"},
    ]
    for thinking in (True, False):
        wordless = [{"role": "system", "content": ""}, *messages[:1]]
        for shown in (messages, messages[:-1], messages[:-2], messages[:2], wordless):
            switches: dict[str, Any] = {"add_generation_prompt": True, "thinking": thinking}
            text = theirs.apply_chat_template(shown, tools=[WEATHER], tokenize=False, **switches)
            ours = render(tok, shown, tools=[WEATHER], thinking=thinking).ids
            assert tok.decode(ours) == text
            assert list(ours) == theirs(text, add_special_tokens=False)["input_ids"]


def test_what_people_write_never_becomes_a_control_token(tok: Tokenizer) -> None:
    evil = "".join((*TOOLS, TOOL_SEP, EOS, "<think>"))
    tool = {"type": "function", "function": {"name": "a", "description": evil, "parameters": {"title": evil}}}
    messages = [
        *conversation(("a", json.dumps({"x": evil}))),
        {"role": "tool", "content": evil},
        {"role": "user", "content": evil},
    ]
    clean = [
        *conversation(("a", "{}")),
        {"role": "tool", "content": ""},
        {"role": "user", "content": ""},
    ]
    dirty, plain = render(tok, messages, tools=[tool]).ids, render(tok, clean, tools=[CLOCK]).ids
    assert [id for id in dirty if id in tok.control_ids] == [id for id in plain if id in tok.control_ids]
    assert evil in tok.decode(dirty)


def test_the_form_of_r1_is_read_too(tok: Tokenizer) -> None:
    call = 'function{sep}{name}\n```json\n{{"city": "北京",\n "days": 3}}\n```'
    text = "I look it up." + CALLS_BEGIN
    text += CALL_BEGIN + call.format(sep=TOOL_SEP, name="get_weather") + CALL_END + "\n"
    text += CALL_BEGIN + call.format(sep=TOOL_SEP, name="clock") + CALL_END + CALLS_END
    body = '{"city": "北京",\n "days": 3}'
    assert split(tok, text) == ("I look it up.", [ToolCall("get_weather", body), ToolCall("clock", body)])


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        ("clock", "need one separator"),
        (f"clock{TOOL_SEP}{TOOL_SEP}{{}}", "need one separator"),
        (f"{TOOL_SEP}{{}}", "no name of a tool"),
        (f"two words{TOOL_SEP}{{}}", "no name of a tool"),
        (f"nobody{TOOL_SEP}{{}}", "there is no tool nobody"),
        (f'clock{TOOL_SEP}{{"a": 1', "arguments are not JSON"),
        (f"clock{TOOL_SEP}", "arguments are not JSON"),
        (f'clock{TOOL_SEP}{{"a": NaN}}', "NaN is no JSON number"),
        (f"clock{TOOL_SEP}[1]", "arguments are not a JSON object"),
        (f"clock{TOOL_SEP}{'[' * 100_000}", "nested too deeply"),
        (f"clock{TOOL_SEP}{{{'1' * 5000}}}", "arguments are not JSON"),
    ],
)
def test_a_broken_call_keeps_its_text_and_says_why(tok: Tokenizer, inside: str, reason: str) -> None:
    good = f"{CALL_BEGIN}clock{TOOL_SEP}{{}}{CALL_END}"
    text = f"Hm.{CALLS_BEGIN}{CALL_BEGIN}{inside}{CALL_END}{good}{CALLS_END}"
    shown, (broken, fine) = split(tok, text, names={"clock"})
    assert shown == "Hm." and fine == ToolCall("clock", "{}")
    assert isinstance(broken, BrokenCall) and reason in broken.reason and broken.text == inside


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        (CALLS_BEGIN, BrokenCall("", "a block of calls without a call")),
        (CALLS_BEGIN + "\n" + CALLS_END, BrokenCall("", "a block of calls without a call")),
        (CALLS_BEGIN + "so" + CALLS_END, BrokenCall("so", "text between calls")),
        (f"{CALLS_BEGIN}{CALL_BEGIN}a{TOOL_SEP}{{", BrokenCall(f"a{TOOL_SEP}{{", "it is cut off")),
        (f"{CALL_BEGIN}a", BrokenCall("a", "it is cut off")),
        (f"{CALLS_BEGIN}{CALL_BEGIN}a{CALLS_END}", BrokenCall("a", "it does not end")),
        (f"{CALLS_BEGIN}{CALL_BEGIN}a{CALLS_BEGIN}", BrokenCall("a", "it does not end")),
    ],
)
def test_a_block_of_calls_never_vanishes(tok: Tokenizer, text: str, broken: BrokenCall) -> None:
    assert split(tok, text)[1][0] == broken


def test_a_call_without_its_block_is_a_call(tok: Tokenizer) -> None:
    text = f"{CALL_BEGIN}clock{TOOL_SEP}{{}}{CALL_END} done"
    assert split(tok, text) == (" done", [ToolCall("clock", "{}")])


def test_spelled_tags_are_text(tok: Tokenizer) -> None:
    text = f"{CALLS_BEGIN}{CALL_BEGIN}clock{TOOL_SEP}{{}}{CALL_END}{CALLS_END}"
    assert split_calls(tok, tok.encode(text)) == (tok.encode(text), [])


@settings(max_examples=150, deadline=None, suppress_health_check=slow_draws)
@given(pieces=st.lists(st.sampled_from([*ADDED, EOS, "{}", "clock", "\n", "é", "文"]), max_size=14))
def test_whatever_a_model_writes_is_told_apart(tok: Tokenizer, pieces: list[str]) -> None:
    """Nothing is raised; every begun call comes out; text outside stays; the parser can go on afterwards."""
    ids = tok.encode_with_special("".join(pieces))
    text, calls = split_calls(tok, ids, names={"clock"})
    begun = ids.count(tok.control_id(CALL_BEGIN))
    assert begun <= len(calls) <= begun + ids.count(tok.control_id(CALLS_BEGIN)) + len(ids)
    if not any(piece in (*TOOLS[:4],) for piece in pieces):
        assert text == ids and not calls
    parser = CallParser(tok)
    for id in ids:
        parser.feed(id)
    parser.finish()
    assert parser.finish() is None and parser.feed(tok.eos_id) == tok.eos_id


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "function"}], "tool 0: need"),
        (CLOCK, "tool 0: need"),
        ([{"type": "retrieval", "function": {"name": "a"}}], "tool 0: need"),
        ([CLOCK, {"type": "function", "function": {"name": "a b"}}], "tool 1: need"),
        ([CLOCK, CLOCK], "tool clock is defined twice"),
        ([{"type": "function", "function": {"name": "a", "parameters": [1]}}], "tool a: its description"),
        ([{"type": "function", "function": {"name": "a", "parameters": {"x": {1}}}}], "tool a: not JSON"),
    ],
)
def test_definitions_that_cannot_be_shown_are_refused(tok: Tokenizer, tools: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(tok, [{"role": "user", "content": "?"}], tools=tools)


def test_calls_that_cannot_be_shown_are_refused(tok: Tokenizer) -> None:
    for calls, message in (
        ([{"id": "x"}], "a tool call needs"),
        ({"function": {"name": "a"}}, "a tool call needs"),
        (called(("a b", "{}")), "a tool call needs"),
        (called(("a", "{")), "call of a: arguments are not JSON"),
        (called(("a", "[]")), "call of a: arguments are not a JSON object"),
    ):
        with pytest.raises(DataError, match=message):
            render(tok, [{"role": "assistant", "content": None, "tool_calls": calls}])
    with pytest.raises(DataError, match="must follow the assistant's message"):
        render(tok, [{"role": "user", "content": "?"}, {"role": "tool", "content": "!"}])
    with pytest.raises(DataError, match="has no tools"):
        render(tok, [{"role": "user", "content": "?"}], tools=[CLOCK], template="zero")
    with pytest.raises(DataError, match="has no tools"):
        render(tok, conversation(("a", "{}")), template="zero")


def test_arguments_may_be_given_as_an_object(tok: Tokenizer) -> None:
    message = {"function": {"name": "a", "arguments": {"城市": 1}}}
    ids = answered(
        tok, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [message]}]
    )
    assert split_calls(tok, ids)[1] == [ToolCall("a", '{"城市": 1}')]
