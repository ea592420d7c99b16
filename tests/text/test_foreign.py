"""Templates of other makers: the ids of transformers for ordinary words, and no word that becomes a control token."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sputnik.errors import DataError
from sputnik.text.foreign import render_own
from sputnik.text.tokenizer import BOS, EOS, Tokenizer

BEGIN, END = "<|begin_of_text|>", "<|eot_id|>"
CONTROL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<think>", "</think>")
# Shortened from what SmolLM2, Llama 3 and Qwen3 bring: a default system message, trimming, a switch and loop variables.
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
HEADERS = """{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + \
'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}\
{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
SWITCH = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' and message.content is string %}{% set ns.last = loop.index0 %}{% endif %}
    {%- if message.content == 'skip me' %}{% continue %}{% endif %}
    {%- generation %}{{- '<|im_start|>' + message.role + '\n' + message.content.strip('\n') + '<|im_end|>\n' }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}
    {%- else %}{{- '<think>\n' }}{% endif %}
{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "switch": SWITCH}
CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 < 3 | 4 > 1?"}],
    [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "\n Hello \n"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "多少？ 😀 <b>bold</b>"},
        {"role": "user", "content": "skip me"},
    ],
]
HOSTILE = st.sampled_from([*CONTROL, END, "<|im_", "start|>", "<", "|>", "\U000f0000", "\U000f0001"])
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def save(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a foreign tokenizer with the given template, as its makers would."""

    def written(template: str | None, **config: Any) -> Path:
        folder: Path = tmp_path_factory.mktemp("foreign")
        data = json.loads(tok._full.to_str().replace(BOS, BEGIN).replace(EOS, END))
        data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] <= 2]
        for place, name in enumerate(CONTROL):
            token = {"id": 1000 + place, "content": name, "special": "think" not in name, "normalized": False}
            data["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False})
        data["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(data))
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
        settings = names | ({} if template is None else {"chat_template": template}) | config
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return written


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("thinking", [True, False])
def test_ids_are_those_of_transformers(save: Callable[..., Path], template: str, thinking: bool) -> None:
    from transformers import AutoTokenizer

    folder = save(TEMPLATES[template])
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for messages in CONVERSATIONS:
        for generate in (True, False):
            wanted = theirs.apply_chat_template(
                messages, add_generation_prompt=generate, enable_thinking=thinking, tokenize=True, return_dict=False
            )
            found = render_own(ours, messages, thinking=thinking, add_generation_prompt=generate)
            assert list(found.ids) == wanted, ours.decode(found.ids)
            assert found.in_thought == (template == "switch" and thinking and generate)


def shape(tok: Tokenizer, ids: tuple[int, ...]) -> list[int]:
    return [id for id in ids if id in tok.control_ids]


@pytest.fixture(scope="module")
def foreign(save: Callable[..., Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(save(template)) for name, template in TEMPLATES.items()}


@quick
@given(
    template=st.sampled_from(sorted(TEMPLATES)),
    words=st.lists(
        st.lists(
            st.sampled_from([*CONTROL, END, "<|im_", "start|>", "<", "|>", "\U000f0000", "\U000f0001"])
            | st.text(max_size=4)
        ).map("".join),
        min_size=1,
        max_size=3,
    ),
)
def test_no_word_becomes_a_control_token(foreign: dict[str, Tokenizer], template: str, words: list[str]) -> None:
    tok = foreign[template]
    harmless = [{"role": "user", "content": "a"} for _ in words]
    messages = [{"role": "user", "content": word, "name": "<|im_end|>"} for word in words]
    found = render_own(tok, messages)
    assert shape(tok, found.ids) == shape(tok, render_own(tok, harmless).ids)
    if template == "chatml":
        assert all(word in tok.decode(found.ids) for word in words), "and every word is there, to the letter"


def test_an_earlier_thought_is_not_said_again(foreign: dict[str, Tokenizer]) -> None:
    tok = foreign["chatml"]
    messages = [{"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, {"role": "user", "content": "?"}]
    assert "assistant\nYes.<|im_end|>" in tok.decode(render_own(tok, messages).ids)


def test_the_template_of_its_own_file_and_of_a_list_is_found(save: Callable[..., Path]) -> None:
    folder = save(None)
    (folder / "chat_template.jinja").write_text(CHATML)
    assert Tokenizer.load(folder).chat_template == CHATML
    several = [{"name": "tools", "template": "{{ 1 }}"}, {"name": "default", "template": CHATML}]
    assert Tokenizer.load(save(several)).chat_template == CHATML


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (None, CONVERSATIONS[0], "no chat template.*plain text"),
        ("{% for %}", CONVERSATIONS[0], "not Jinja"),
        ("{{ raise_exception('no system message') }}", CONVERSATIONS[0], "refuses.*no system message"),
        ("{{ messages.__class__.__mro__ }}", CONVERSATIONS[0], "refuses"),
        ("{{ messages[7].content + 1 }}", CONVERSATIONS[0], "refuses"),
        ("{% for i in range(999999999) %}{% endfor %}", CONVERSATIONS[0], "refuses"),
        (CHATML, {"role": "user", "content": "3"}, "messages are a list"),
        (CHATML, [{"role": "tool", "content": "3"}], "role 'tool'"),
        (CHATML, [{"role": "user", "content": ["parts"]}], "content text"),
    ],
)
def test_what_cannot_be_rendered_is_an_error_of_one_line(
    save: Callable[..., Path], template: str | None, messages: Any, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        render_own(Tokenizer.load(save(template)), messages)


def test_plain_text_starts_as_its_makers_say(tok: Tokenizer, save: Callable[..., Path]) -> None:
    for config, start in (({"add_bos_token": True}, (0,)), ({"add_bos_token": False}, ()), ({}, ())):
        assert Tokenizer.load(save(CHATML, **config)).text_start == start
    assert tok.text_start == (tok.bos_id,)
    folder = save(CHATML)
    data = json.loads((folder / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [0], "tokens": [BEGIN]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.load(folder).text_start == (0,), "Llama 3 says it there"
    assert tok.has_dialogue and not Tokenizer.load(folder).has_dialogue and Tokenizer.load(folder).has_thoughts
