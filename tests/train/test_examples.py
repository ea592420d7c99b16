"""Dialogues become ids and masks that say exactly what the model will be asked and what it is to write."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sputnik.errors import ConfigError, DataError
from sputnik.text.chat import parse, render, render_example, render_turn
from sputnik.text.tokenizer import Tokenizer
from sputnik.text.tools import split_calls
from sputnik.train.examples import Data, Example, preview, read_examples, read_records, runs, split

Message = dict[str, Any]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def reply(text: str, thought: str | None = None, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **({} if thought is None else {"reasoning_content": thought}), **more}


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(["What is 1 plus 2? The answer is 3. Hello, how are you?"] * 4, 320)


def read(folder: Path, tok: Tokenizer, *lines: Any, **options: Any) -> Data:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "mine.jsonl").write_text(text, encoding="utf-8")
    return read_examples([folder / "mine.jsonl"], tok, **{"longest": 1000, **options})


def learned(tok: Tokenizer, example: Example) -> list[str]:
    return [tok.decode(ids.tolist()) for carries, ids in runs(example) if carries]


# --- what carries loss ---


def test_both_forms_of_a_line_are_the_example_the_chat_module_writes(tok: Tokenizer, tmp_path: Path) -> None:
    long = {"messages": [user("1 plus 2?"), reply("3", "Count: 1, 2, 3.")], "id": "a"}
    short = {"prompt": "1 plus 2?", "answer": "3", "thinking": "Count: 1, 2, 3.", "task": "sums"}
    tagged = {"messages": [user("1 plus 2?"), reply("<think>\nCount: 1, 2, 3.\n</think>\n\n3")]}
    expected = render_example(tok, "1 plus 2?", "Count: 1, 2, 3.", "3")
    found = read(tmp_path, tok, long, short, tagged).examples
    assert [(each.ids.tolist(), each.mask.tolist()) for each in found] == [expected] * 3
    assert [each.where.rpartition(":")[2] for each in found] == ["1", "2", "3"]


@pytest.mark.parametrize("template", ["chat", "zero"])
@pytest.mark.parametrize("thought", ["Two and two.", None])
def test_a_single_turn_asks_and_answers_as_in_use(tok: Tokenizer, template: str, thought: str | None) -> None:
    asked, wrote = render_turn(tok, [user("2+2?"), reply("4", thought)], template=template)
    prompt = render(tok, [user("2+2?")], template=template, thinking=thought is not None)
    assert tuple(asked) == prompt.ids and wrote[-1] == tok.eos_id
    back = parse(tok, wrote, in_thought=prompt.in_thought, finished=True, template=template)
    assert (back.thinking, back.answer) == (thought or "", "4")


def test_an_empty_thought_is_opened_and_closed_and_none_is_a_direct_answer(tok: Tokenizer, tmp_path: Path) -> None:
    empty, none = read(
        tmp_path, tok, {"prompt": "Hello", "answer": "Hi!", "thinking": ""}, {"prompt": "Hello", "answer": "Hi!"}
    ).examples
    assert learned(tok, empty) == ["\n</think>\n\nHi!<｜end▁of▁sentence｜>"]
    assert learned(tok, none) == ["Hi!<｜end▁of▁sentence｜>"]
    assert empty.ids.tolist()[: int(empty.mask.argmax())] == list(render(tok, [user("Hello")]).ids)
    assert none.ids.tolist()[: int(none.mask.argmax())] == list(render(tok, [user("Hello")], thinking=False).ids)


def test_turns_without_thoughts_are_one_example(tok: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, user("Hello"), reply("Hi!"), user("1 plus 2?"), reply("3")]
    (example,) = read(tmp_path, tok, {"messages": messages}).examples
    assert learned(tok, example) == ["Hi!<｜end▁of▁sentence｜>", "3<｜end▁of▁sentence｜>"]
    whole = render(tok, messages, thinking=False, add_generation_prompt=False)
    assert tuple(example.ids.tolist()) == whole.ids


def test_every_thought_is_learned_once_behind_a_prompt_without_the_earlier_ones(tok: Tokenizer, tmp_path: Path) -> None:
    said = [reply("A"), reply("B", "why B"), reply("C", "why C"), reply("D")]
    messages = [message for asked, answer in zip("abcd", said, strict=True) for message in (user(asked), answer)]
    first, second, third = read(tmp_path, tok, {"messages": messages}).examples
    eos = "<｜end▁of▁sentence｜>"
    assert learned(tok, first) == [f"A{eos}", f"why B\n</think>\n\nB{eos}"]
    assert learned(tok, second) == [f"why C\n</think>\n\nC{eos}"]
    assert learned(tok, third) == [f"D{eos}"]
    assert "why" not in tok.decode(third.ids.tolist()) and "why B" not in tok.decode(second.ids.tolist())
    for example, asked in ((first, 3), (second, 5)):
        start = len(example.ids) - len(runs(example)[-1][1])
        assert tuple(example.ids[:start].tolist()) == render(tok, messages[:asked]).ids


def test_a_message_of_weight_0_is_only_read(tok: Tokenizer, tmp_path: Path) -> None:
    messages = [user("a"), reply("wrong", weight=0), user("b"), reply("B", weight=1)]
    (example,) = read(tmp_path, tok, {"messages": messages}).examples
    assert learned(tok, example) == ["B<｜end▁of▁sentence｜>"] and "wrong" in tok.decode(example.ids.tolist())


def test_tool_calls_are_learned_as_the_template_writes_them_and_read_back(tok: Tokenizer, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        user("1 plus 2?"), {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "3"}, {"role": "tool", "content": "3"}, reply("It is 3."),
    ]  # fmt: skip
    (example,) = read(tmp_path, tok, {"messages": messages, "tools": [TOOL]}).examples
    expected = render(tok, messages, tools=[TOOL], thinking=False, add_generation_prompt=False)
    assert tuple(example.ids.tolist()) == expected.ids
    called, answered = (ids.tolist() for carries, ids in runs(example) if carries)
    text, calls = split_calls(tok, called[:-1], ["add"])
    assert text == [] and [vars(each) for each in calls] == [{"name": "add", "arguments": '{"a": 1}'}] * 2
    assert tok.decode(answered) == "It is 3.<｜end▁of▁sentence｜>" and called[-1] == tok.eos_id


def test_a_thought_before_a_tool_call_is_an_example_of_its_own(tok: Tokenizer, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [user("?"), reply("", "I should add.", tool_calls=[call]), {"role": "tool", "content": "3"}, reply("3")]
    calling, answering = read(tmp_path, tok, {"messages": messages}).examples
    (written,) = learned(tok, calling)
    assert written.startswith("I should add.\n</think>") and "add<｜tool▁sep｜>" in written
    assert learned(tok, answering) == ["3<｜end▁of▁sentence｜>"]
    assert "I should" not in tok.decode(answering.ids.tolist())


spelled = st.sampled_from(["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"])
texts = st.lists(spelled | st.text(max_size=6), min_size=1).map("".join)
answers = texts.filter(lambda text: text.strip() and "think>" not in text)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(asked=st.lists(texts, min_size=1, max_size=3), said=st.lists(answers, min_size=3, max_size=3))
def test_words_never_become_control_tokens_and_every_answer_ends(
    tok: Tokenizer, tmp_path: Path, asked: list[str], said: list[str]
) -> None:
    messages = [message for a, b in zip(asked, said, strict=False) for message in (user(a), reply(b))]
    plain = [message for _ in asked for message in (user("a"), reply("b"))]
    (example,), (simple,) = (read(tmp_path, tok, {"messages": each}).examples for each in (messages, plain))
    control = tok.control_ids
    assert [i for i in example.ids.tolist() if i in control] == [i for i in simple.ids.tolist() if i in control]
    ends = [ids.tolist()[-1] for carries, ids in runs(example) if carries]
    assert ends == [tok.eos_id] * len(asked)


# --- other makers' models ---


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def foreign(folder: Path, template: str | None = CHATML, eos: str = "<|im_end|>") -> Tokenizer:
    """A byte-level BPE as SmolLM2's: ChatML tokens, no thoughts."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    full = tokenizers.Tokenizer(models.BPE())
    full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    full.decoder = decoders.ByteLevel()
    names = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=names, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    full.train_from_iterator(["What is 1 plus 2?"], trainer)
    full.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": eos, "pad_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def test_a_models_own_template_is_learned_up_to_its_end_token(tmp_path: Path) -> None:
    tok = foreign(tmp_path)
    messages = [user("Hello"), reply("Hi!"), user("1 plus 2?"), reply("3")]
    (example,) = read(tmp_path, tok, {"messages": messages}, template="own").examples
    assert learned(tok, example) == ["Hi!<|im_end|>", "3<|im_end|>"]
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages).rstrip("\n")
    assert tok.decode(example.ids.tolist()) == expected


def test_what_an_own_template_cannot_say_is_refused(tok: Tokenizer, tmp_path: Path) -> None:
    theirs = foreign(tmp_path)
    plain = {"prompt": "a", "answer": "b"}
    with pytest.raises(ConfigError, match='no tokens for template "chat": use template "own"'):
        read(tmp_path, theirs, plain)
    with pytest.raises(ConfigError, match="unknown template 'caht'"):
        read(tmp_path, tok, plain, template="caht")
    with pytest.raises(DataError, match="mine.jsonl:2: message 2: a model's own template has no thoughts"):
        read(tmp_path, theirs, plain, plain | {"thinking": "why"}, template="own")
    with pytest.raises(DataError, match="tools are for models that speak"):
        read(tmp_path, theirs, {"messages": [user("a"), reply("b")], "tools": [TOOL]}, template="own")
    with pytest.raises(DataError, match="would not stop"):
        read(tmp_path, foreign(tmp_path, eos="<|endoftext|>"), plain, template="own")
    with pytest.raises(DataError, match="would not stop"):
        read(tmp_path, foreign(tmp_path, CHATML.replace("assistant\n", "assistant: ")), plain, template="own")
    with pytest.raises(ConfigError, match="brings no chat template"):
        read(tmp_path, foreign(tmp_path, None), plain, template="own")


# --- lines that are no examples ---


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a"]', "not a JSON object"),
        ("{}", "not a JSON object"),
        ({"question": "a"}, 'need {"messages"'),
        ({"prompt": "a", "messages": []}, 'need {"messages"'),
        ({"prompt": "a"}, "prompt, answer and thinking must be texts"),
        ({"prompt": "a", "answer": 3}, "prompt, answer and thinking must be texts"),
        ({"prompt": "a", "answer": "b", "thinking": 3}, "prompt, answer and thinking must be texts"),
        ({"prompt": "a", "answer": " "}, "message 2: the assistant's answer is empty"),
        ({"prompt": "a", "answer": "<think>so</think> "}, "message 2: the assistant's answer is empty"),
        ({"prompt": "a", "answer": "<think>so 4"}, "message 2: the answer ends within its thought"),
        ('{"prompt": "a", "answer": "\\ud800"}', "half of a surrogate pair"),
        ({"messages": "a"}, "messages must be a list"),
        ({"messages": ["a"]}, "messages must be a list"),
        ({"messages": []}, "the last message must be the assistant's"),
        ({"messages": [user("a")]}, "the last message must be the assistant's"),
        ({"messages": [reply("a")]}, "message 1: assistant after nothing; it may follow user or tool"),
        ({"messages": [user("a"), user("b"), reply("c")]}, "message 2: user after user"),
        ({"messages": [user("a"), reply("b"), reply("c")]}, "message 3: assistant after assistant"),
        ({"messages": [user("a"), {"role": "system", "content": "b"}, reply("c")]}, "message 2: system after user"),
        ({"messages": [user("a"), reply("b"), {"role": "tool", "content": "c"}, reply("d")]}, "must follow"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "message 1: no role 'robot'; choose one of system, user"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1: no role"),
        ({"messages": [user("a"), {"role": "assistant", "content": ["b"]}]}, "message 2: content must be a text"),
        ({"messages": [user("a"), {"role": "assistant"}]}, "message 2: content must be a text"),
        ({"messages": [user("a"), reply("b", weight=0.5)]}, "message 2: weight is 0 or 1"),
        ({"messages": [user("a"), reply("b", weight=0)]}, "there is nothing to learn"),
        ({"messages": [user("a"), reply("b", tool_calls="c")]}, "message 2: tool_calls must be a list"),
        ({"messages": [user("a"), reply("b", tool_calls=[{}])]}, "a tool call needs"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b", "reasoning_content": 1}]}, "must be texts"),
        ({"messages": [user("a"), reply("b")], "tools": "c"}, "tools must be a list"),
        ({"messages": [user("a"), reply("b")], "tools": [{}]}, "tool 0: need"),
    ],
)  # fmt: skip
def test_a_bad_line_is_refused_with_its_number_or_dropped_on_request(
    tok: Tokenizer, tmp_path: Path, line: Any, reason: str
) -> None:
    good = {"prompt": "a", "answer": "b"}
    with pytest.raises(DataError) as error:
        read(tmp_path, tok, good, "", line, line)

    assert f"{tmp_path}/mine.jsonl:3: " in str(error.value) and reason in str(error.value)
    assert "so are 1 other lines" in str(error.value) and "\n" not in str(error.value)
    found = read(tmp_path, tok, good, "", line, good, bad_lines="drop")
    assert [each.where.rpartition(":")[2] for each in found.examples] == ["1", "4"] and found.lines == 2
    assert len(found.bad) == 1 and "mine.jsonl:3: " in found.bad[0] and reason in found.bad[0]


def test_files_that_hold_nothing_are_refused(tok: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no examples in .*mine.jsonl: they are empty"):
        read(tmp_path, tok, "", " ")
    with pytest.raises(DataError, match=r"no examples in .*: 1 bad lines, the first: .*mine.jsonl:1: not JSON"):
        read(tmp_path, tok, "{", bad_lines="drop")
    with pytest.raises(DataError, match="other.jsonl: no such file"):
        read_examples([tmp_path / "other.jsonl"], tok, longest=10)


def test_a_line_that_is_not_utf8_is_named_and_a_byte_order_mark_is_not_text(tok: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}\r\n{"prompt": "caf\xe9", "answer": "b"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: not UTF-8 at byte 15 of the line: convert it"):
        read_examples([file], tok, longest=100)
    assert read_examples([file], tok, longest=100, bad_lines="drop").lines == 1


def test_a_long_example_is_refused_or_dropped_whole_and_never_cut(tok: Tokenizer, tmp_path: Path) -> None:
    short, long = {"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "b " * 50}
    size = len(render_example(tok, "a", None, "b " * 50)[0])
    assert len(read(tmp_path, tok, short, long, longest=size).examples) == 2
    with pytest.raises(DataError, match=rf"1 of 2 examples are longer than {size - 1} .*mine.jsonl:2: {size} tokens"):
        read(tmp_path, tok, short, long, longest=size - 1)
    found = read(tmp_path, tok, short, long, longest=size - 1, too_long="drop")
    assert (len(found.examples), found.lines, len(found.long)) == (1, 1, 1)
    with pytest.raises(DataError, match="1 of 1 examples are longer"):
        read(tmp_path, tok, long, longest=size - 1, too_long="drop")
    turns = [user("a"), reply("b"), user("c"), reply("c " * 50, "why")]
    assert read(tmp_path, tok, short, {"messages": turns}, longest=20, too_long="drop").lines == 1


def test_records_of_any_kind_are_read_with_their_places(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"x": "{name}1"}}\n\n{{"x": "{name}3"}}\n')
    found = read_records([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], lambda record: record["x"])
    places = [f"{tmp_path}/{name}.jsonl:{line}" for name in "ab" for line in (1, 3)]
    assert found.kept == list(zip(places, ["a1", "a3", "b1", "b3"], strict=True))


# --- held out, preview ---


def test_answers_to_one_question_stay_on_one_side(tok: Tokenizer, tmp_path: Path) -> None:
    lines = [{"prompt": f"question {n % 20}", "answer": f"answer {n}"} for n in range(60)]
    examples = read(tmp_path, tok, *lines).examples
    train, held_out = split(examples, 0.1, seed=0)
    assert (len(train), len(held_out)) == (54, 6) and len({each.question for each in held_out}) == 2
    assert {each.question for each in train}.isdisjoint(each.question for each in held_out)
    shuffled = split(examples[::-1], 0.1, seed=0)[1]
    assert {each.where for each in shuffled} == {each.where for each in held_out}
    assert {each.where for each in split(examples, 0.1, seed=1)[1]} != {each.where for each in held_out}


def test_a_small_share_holds_out_one_question_and_none_holds_out_none(tok: Tokenizer, tmp_path: Path) -> None:
    examples = read(tmp_path, tok, *({"prompt": f"{n}", "answer": "a"} for n in range(4))).examples
    assert [len(side) for side in split(examples, 0.001, 0)] == [3, 1]
    assert [len(side) for side in split(examples, 0.99, 0)] == [1, 3]
    assert [len(side) for side in split(examples, 0.0, 0)] == [4, 0]
    assert [len(side) for side in split(examples[:1], 0.5, 0)] == [1, 0]


def test_the_preview_shows_every_token_and_which_carry_loss(tok: Tokenizer, tmp_path: Path) -> None:
    turns = [user("a\nb"), reply("````\ncode"), user("c"), reply("C", "why")]
    (example,) = read(tmp_path, tok, {"messages": turns}).examples
    lines = preview([example], tok).split("`````diff\n")[1].split("\n`````")[0].split("\n")
    shown = "".join(line[2:] for line in lines).replace("⏎", "\n")
    assert shown == tok.decode(example.ids.tolist())
    trained = "".join(line[2:] for line in lines if line.startswith("+ ")).replace("⏎", "\n")
    assert trained == tok.decode(example.ids[example.mask].tolist())
