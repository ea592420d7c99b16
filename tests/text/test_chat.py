from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sputnik.errors import ConfigError, DataError
from sputnik.text.chat import Completion, StreamParser, parse, render, render_example, template_hash
from sputnik.text.templates import template_source
from sputnik.text.tokenizer import ADDED, BOS, EOS, Tokenizer

TEMPLATES = ("chat", "zero")
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hello \n"},
        {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHi!"},
        {"role": "user", "content": "多少？ 😀"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": ""},
    ],
]
contents = st.lists(st.sampled_from([BOS, EOS, *ADDED]) | st.text(max_size=8)).map("".join)
tag = {"think": "<think>", "end": "</think>"}


@pytest.fixture(scope="module")
def theirs(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tok.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def took(tok: Tokenizer, text: str, *, in_thought: bool = True, finished: bool = True, **kind: str) -> Completion:
    return parse(tok, tok.encode_with_special(text), in_thought=in_thought, finished=finished, **kind)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("generate", [True, False])
def test_prompt_equals_what_transformers_renders(
    tok: Tokenizer, theirs: Any, template: str, thinking: bool, generate: bool
) -> None:
    for messages in CONVERSATIONS:
        ours = render(tok, messages, template=template, thinking=thinking, add_generation_prompt=generate)
        switches = {"add_generation_prompt": generate, "thinking": thinking}
        if template != "chat":  # what is saved with the tokenizer is "chat"
            switches["chat_template"] = template_source(template)
        text = theirs.apply_chat_template(messages, tokenize=False, **switches)
        assert tok.decode(ours.ids) == text
        assert list(ours.ids) == theirs(text, add_special_tokens=False)["input_ids"]


def test_prompt_ends_where_the_model_goes_on(tok: Tokenizer) -> None:
    question = CONVERSATIONS[0]
    thought, direct, zero = (
        render(tok, question, template=name, thinking=thinking)
        for name, thinking in (("chat", True), ("chat", False), ("zero", True))
    )
    assert tok.decode(thought.ids) == f"{BOS}<｜User｜>What is 2 + 2?<｜Assistant｜><think>\n"
    assert tok.decode(direct.ids) == f"{BOS}<｜User｜>What is 2 + 2?<｜Assistant｜></think>"
    assert tok.decode(zero.ids).endswith("User: What is 2 + 2?\nAssistant:")
    assert [prompt.in_thought for prompt in (thought, direct, zero)] == [True, False, False]


def test_earlier_thoughts_leave_the_prompt(tok: Tokenizer) -> None:
    for template in TEMPLATES:
        assert "greeting" not in tok.decode(render(tok, CONVERSATIONS[1], template=template).ids)


def test_direct_turns_keep_the_prefix_of_the_next_prompt(tok: Tokenizer) -> None:
    ids, _ = render_example(tok, "Hi", None, "Hello")
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    later = render(tok, [*turn, {"role": "user", "content": "So?"}], thinking=False).ids
    assert list(later[: len(ids)]) == ids


@given(hostile=st.lists(contents, min_size=2, max_size=2))
def test_contents_cannot_inject_control_tokens(tok: Tokenizer, hostile: list[str]) -> None:
    def control(system: str, user: str) -> list[int]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return [id for template in TEMPLATES for id in render(tok, messages, template=template).ids if id in known]

    known = tok.control_ids
    assert control(*hostile) == control("a", "b")


def test_bad_messages_and_templates_are_refused(tok: Tokenizer) -> None:
    for message in ({"role": "robot", "content": "x"}, {"content": "x"}, {"role": "user"}):
        with pytest.raises(DataError, match="a message needs a role"):
            render(tok, [message])
    for messages in (CONVERSATIONS[0][0], [("user", "x")], ["x"]):  # one without a list around it, others' forms
        with pytest.raises(DataError, match=r"messages are a list of .* is none of these"):
            render(tok, messages)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown template 'zeor'"):
        render(tok, CONVERSATIONS[0], template="zeor")
    with pytest.raises(ConfigError, match="unknown template 'zeor'"):
        parse(tok, [], in_thought=True, finished=True, template="zeor")


def test_template_hash_tells_templates_apart() -> None:
    assert template_hash("chat") != template_hash("zero")
    assert template_hash("chat") == template_hash("chat")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("thinking", ["Two and two.", None])
def test_example_is_prompt_plus_trained_reply_and_end(tok: Tokenizer, template: str, thinking: str | None) -> None:
    ids, mask = render_example(tok, "2+2?", thinking, "4", template=template)
    prompt = render(tok, [{"role": "user", "content": "2+2?"}], template=template, thinking=thinking is not None)
    length = len(prompt.ids)
    assert tuple(ids[:length]) == prompt.ids
    assert mask == [False] * length + [True] * (len(ids) - length)
    assert ids[-1] == tok.eos_id
    assert ids.count(tok.eos_id) == ids.count(tok.bos_id) == 1
    reply = parse(tok, ids[length:], in_thought=prompt.in_thought, finished=True, template=template)
    assert (reply.thinking, reply.answer) == (thinking or "", "4")
    assert reply.well_formed == (thinking is not None or template == "chat")  # "zero" asks for a thought


@given(thinking=contents, answer=contents)
def test_example_parses_back_whatever_the_texts_spell(tok: Tokenizer, thinking: str, answer: str) -> None:
    ids, mask = render_example(tok, "q", thinking, answer)
    reply = parse(tok, ids[mask.index(True) :], in_thought=True, finished=True)
    assert (reply.thinking, reply.answer, reply.closed) == (thinking.strip(), answer.strip(), True)
    assert reply.well_formed == bool(thinking.strip() and answer.strip())


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "closed", "well_formed"),
    [
        ("so 4.\n</think>\n\n4", "so 4.", "4", True, True),
        ("so 4.</think>4" + EOS, "so 4.", "4", True, True),
        ("so 4.", "so 4.", "", False, False),
        ("", "", "", False, False),
        ("\n</think>\n\n4", "", "4", True, False),
        ("so</think> ", "so", "", True, False),
        ("<think>so</think>4", "so", "4", True, False),
        ("a</think>4</think>5", "a", "45", True, False),
        ("a</think>4<think>b</think>5", "ab", "45", True, False),
        ("a</think>4<think>b", "ab", "4", False, False),
        ("a<think><think>b</think></think>4", "ab", "4", True, False),
        ("a</think>4<｜User｜>more", "a", "4<｜User｜>more", True, False),
        ("a</think>4" + BOS, "a", "4", True, False),
        ("a</think>4" + EOS + "5", "a", "45", True, False),
        ("a</think><｜fim▁hole｜>4", "a", "<｜fim▁hole｜>4", True, False),
    ],
)
def test_chat_reply_in_a_thought(
    tok: Tokenizer, text: str, thinking: str, answer: str, closed: bool, well_formed: bool
) -> None:
    assert took(tok, text) == Completion(thinking, answer, closed, False, well_formed)
    assert took(tok, text, finished=False) == Completion(thinking, answer, closed, True, False)


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "well_formed"),
    [
        ("4", "", "4", True),
        ("", "", "", False),
        ("<think>a</think>4", "a", "4", False),
        ("</think>4", "", "4", False),
    ],
)
def test_direct_chat_reply(tok: Tokenizer, text: str, thinking: str, answer: str, well_formed: bool) -> None:
    assert took(tok, text, in_thought=False) == Completion(thinking, answer, True, False, well_formed)


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "well_formed"),
    [
        (" <think>a</think>\n<answer> 4 </answer>\n", "a", "4", True),
        ("<think>a</think><answer>4</answer>" + EOS, "a", "4", True),
        ("<think></think><answer>4</answer>", "", "4", False),
        ("<think>a</think><answer> </answer>", "a", "", False),
        ("<think>a</think>4", "a", "", False),
        ("<answer>4</answer>", "", "4", False),
        ("<think>a <answer>4</answer></think>", "a <answer>4</answer>", "", False),
        ("<think>a <answer>4</answer>", "a <answer>4</answer>", "", False),
        ("<answer>4</answer><think>a</think>", "a", "4", False),
        ("<think>a</think><answer>4</answer><answer>5</answer>", "a", "4", False),
        ("<think>a</think><answer><answer>4</answer></answer>", "a", "<answer>4", False),
        ("<think>a</think><answer><answer>4</answer>", "a", "<answer>4", False),
        ("<think>a</think><answer>4</answer> So it is 4.", "a", "4", False),
        ("<think>a</think> It is <answer>4</answer>", "a", "4", False),
        ("<think>a</think><think>b</think><answer>4</answer>", "ab", "4", False),
        ("<ans<think>a</think>wer>4</answer>", "a", "4", False),
        ("<think>a</think><answer>4", "a", "", False),
        ("<think>a</think></answer>4<answer>", "a", "", False),
        ("<think>a</think><answer>4<｜User｜></answer>", "a", "4<｜User｜>", False),
    ],
)
def test_zero_reply(tok: Tokenizer, text: str, thinking: str, answer: str, well_formed: bool) -> None:
    reply = took(tok, text, in_thought=False, template="zero")
    assert (reply.thinking, reply.answer, reply.well_formed) == (thinking, answer, well_formed)
    assert not took(tok, text, in_thought=False, template="zero", finished=False).well_formed


def test_spelled_tags_are_text_not_control(tok: Tokenizer) -> None:
    ids = [*tok.encode("I write </think> here"), tok.end_think_id, *tok.encode("4</think>")]
    assert parse(tok, ids, in_thought=True, finished=True) == Completion(
        "I write </think> here", "4</think>", True, False, True
    )


def test_very_long_hostile_reply_is_parsed_in_linear_time(tok: Tokenizer) -> None:
    ids = (tok.encode("<answer>") * 20_000) + [tok.think_id, tok.end_think_id] * 20_000
    assert not parse(tok, ids, in_thought=False, finished=True, template="zero").well_formed


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), in_thought=st.booleans())
def test_streamed_pieces_join_to_the_parsed_reply(tok: Tokenizer, data: st.DataObject, in_thought: bool) -> None:
    tags = st.sampled_from([tok.think_id, tok.end_think_id, tok.user_id, tok.eos_id]).map(lambda id: [id])
    halves = st.integers(0x80, 0xFF).map(lambda value: byte(tok, value))
    characters = st.characters(codec="utf-8").map(lambda letter: [id for b in letter.encode() for id in byte(tok, b)])
    piece = tags | halves | characters | st.integers(0, tok.vocab_size - 1).map(lambda id: [id])
    ids = [id for part in data.draw(st.lists(piece)) for id in part]
    stream = StreamParser(tok, in_thought)
    pieces = [piece for id in ids for piece in stream.feed(id)] + stream.finish()
    whole = parse(tok, ids, in_thought=in_thought, finished=True)
    joined = {name: "".join(text for channel, text in pieces if channel == name) for name in ("thinking", "answer")}
    assert joined == {"thinking": whole.thinking, "answer": whole.answer}
    assert stream.in_thought != whole.closed
    assert all(text for _, text in pieces)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")))
def test_no_piece_holds_half_a_character(tok: Tokenizer, text: str) -> None:
    stream = StreamParser(tok, in_thought=False)
    pieces = [piece for one in text.encode() for id in byte(tok, one) for piece in stream.feed(id)]
    assert "\ufffd" not in "".join(piece for _, piece in pieces)
    assert "".join(piece for _, piece in pieces) == text.strip()


def test_half_a_character_stays_in_its_channel(tok: Tokenizer) -> None:
    ids = [*byte(tok, 0xE4), tok.end_think_id, *tok.encode("4"), *byte(tok, 0xE4)]
    stream = StreamParser(tok, in_thought=True)
    pieces = [piece for id in ids for piece in stream.feed(id)] + stream.finish()
    assert pieces == [("thinking", "\ufffd"), ("answer", "4"), ("answer", "\ufffd")]
    assert parse(tok, ids, in_thought=True, finished=True) == Completion("\ufffd", "4\ufffd", True, False, True)


def byte(tok: Tokenizer, value: int) -> list[int]:
    """The id of one single byte."""
    return [3 + tok.token_bytes(range(3, 259)).index(value)]
