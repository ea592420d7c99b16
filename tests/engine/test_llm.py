"""Text in, text out, with a real (untrained) model: streamed is whole, stops never show, nobody disturbs others."""

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

import sputnik
from sputnik.engine.llm import LLM
from sputnik.engine.outputs import Output, Piece, Reader
from sputnik.engine.params import SamplingParams
from sputnik.engine.runner import NativeRunner
from sputnik.errors import CheckpointError, ConfigError, DataError
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.text.chat import parse
from sputnik.text.tokenizer import TOOL_SEP, TOOLS, Tokenizer
from sputnik.text.tools import BrokenCall, ToolCall

QUESTION = [{"role": "user", "content": "What is 1 + 2?"}]
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
{{ '<|im_start|>assistant\n' }}"""
THOUGHT = SamplingParams(max_tokens=40, thinking_budget=12, seed=3)
PLAIN = SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes an untrained checkpoint with its tokenizer."""

    def written(tok: Tokenizer, **changes: Any) -> Path:
        folder: Path = tmp_path_factory.mktemp("model") / "checkpoint"
        shape = {"vocab_size": tok.vocab_size, "eos_token_id": tok.eos_id, "initializer_range": 0.15} | changes
        model = Transformer(ModelConfig.preset("tiny", **shape))
        save_model(model.init_weights(torch.Generator().manual_seed(0)), folder, tokenizer=tok)
        return folder

    return written


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(["What is 1 + 2? The answer is 3, 你好 😀."] * 4, vocab_size=400)


@pytest.fixture(scope="module")
def foreign() -> Tokenizer:
    """A tokenizer without thoughts, with a chat template of its own."""
    full = Tokenizer.train(["What is 1 + 2? The answer is 3."] * 4, vocab_size=400)._full
    full = type(full).from_str(full.to_str().replace("think>", "thunk>"))
    full.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    return Tokenizer(full, {"eos_token": "<|im_end|>", "add_bos_token": False, "chat_template": CHATML})


@pytest.fixture(scope="module")
def checkpoint(tok: Tokenizer, save: Callable[..., Path]) -> Path:
    return save(tok)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return sputnik.LLM(checkpoint, precision="fp32", cache_tokens=4096)


def joined(pieces: list[Piece], channel: str, sample: int = 0) -> str:
    return "".join(piece.text for piece in pieces if (piece.channel, piece.sample) == (channel, sample))


def idle(llm: LLM) -> bool:
    return not llm.engine.busy and llm.engine.scheduler.figures.used_blocks == 0


@pytest.mark.parametrize("thinking", [True, False])
def test_streamed_pieces_join_to_the_whole_and_that_is_what_parse_says(llm: LLM, thinking: bool) -> None:
    prompt = llm.render(QUESTION, thinking)
    for seed in range(3):
        params = replace(THOUGHT, seed=seed)
        pieces = list(llm.stream(QUESTION, params, thinking))
        whole = llm.chat(QUESTION, params, thinking)
        (output,) = whole.outputs
        wanted = parse(llm.tok, output.ids, in_thought=prompt.in_thought, finished=output.finish == "stop")
        assert (output.thinking, output.answer) == (wanted.thinking, wanted.answer)
        assert joined(pieces, "thinking") == whole.thinking and joined(pieces, "answer") == whole.text
        assert [piece.finish for piece in pieces if not piece.text] == [whole.finish]
        assert pieces[-1].finish == whole.finish


def test_plain_text_goes_on_to_the_letter(llm: LLM) -> None:
    text = "What is"
    (result,) = llm.generate([text], PLAIN)
    assert result.prompt == [llm.tok.bos_id, *llm.tok.encode(text)]
    assert result.text == llm.tok.decode(result.outputs[0].ids, skip_special=True)
    assert joined(list(llm.stream(text, PLAIN)), "answer") == result.text
    assert llm.generate([result.prompt], PLAIN)[0].outputs == result.outputs
    assert (
        llm.generate([text, text], [PLAIN, replace(PLAIN, max_tokens=5)])[1].outputs[0].ids
        == (result.outputs[0].ids[:5])
    )


def test_stop_strings_end_the_answer_and_never_show(llm: LLM) -> None:
    texts = ["What is", "3, ", "answer"]
    free = llm.generate(texts, PLAIN)
    for width in (1, 2, 5):
        stops = [result.text[7 : 7 + width] for result in free]
        params = [replace(PLAIN, stop=(stop, "no such text")) for stop in stops]
        found = llm.generate(texts, params)
        for text, stop, each, before, result in zip(texts, stops, params, free, found, strict=True):
            assert result.text == before.text[: before.text.index(stop)] and result.finish == "stop"
            ids = result.outputs[0].ids
            assert ids == before.outputs[0].ids[: len(ids)]
            assert stop in llm.tok.decode(ids) and stop not in llm.tok.decode(ids[:-1])
            assert joined(list(llm.stream(text, each)), "answer") == result.text
    assert idle(llm)


def test_a_question_alone_is_a_message_of_the_user(llm: LLM) -> None:
    assert llm.chat(QUESTION[0]["content"], THOUGHT).text == llm.chat(QUESTION, THOUGHT).text


def test_stop_strings_leave_the_thought_alone(llm: LLM) -> None:
    free = llm.chat(QUESTION, THOUGHT)
    assert free.thinking and free.text
    letter = next(letter for letter in free.text[1:] if letter in free.thinking)
    found = llm.chat(QUESTION, replace(THOUGHT, stop=(letter,)))
    assert found.thinking == free.thinking
    assert found.text == free.text[: free.text.index(letter)] and found.finish == "stop"


def test_several_answers_and_the_best_of_them(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, n=5, seed=1, logprobs=2, ignore_eos=True)
    (all_five,) = llm.generate(["What"], params)
    assert len({tuple(each.ids) for each in all_five.outputs}) == 5

    def mean(output: Output) -> float:
        return sum(output.logprobs) / len(output.logprobs)

    (best,) = llm.generate(["What"], replace(params, n=2, best_of=5))
    assert best.outputs == sorted(all_five.outputs, key=mean, reverse=True)[:2]
    (quiet,) = llm.generate(["What"], replace(params, n=2, best_of=5, logprobs=None))
    assert [each.ids for each in quiet.outputs] == [each.ids for each in best.outputs] and not quiet.outputs[0].logprobs
    pieces = list(llm.stream("What", params))
    assert [joined(pieces, "answer", sample) for sample in range(5)] == [each.answer for each in all_five.outputs]


def test_log_probabilities_of_answer_and_prompt_are_the_models(llm: LLM, checkpoint: Path) -> None:
    (result,) = llm.generate(["What is 1"], SamplingParams(max_tokens=6, seed=0, logprobs=3, prompt_logprobs=2))
    (output,) = result.outputs
    with torch.no_grad():
        logprobs = load_model(checkpoint)(torch.tensor([[*result.prompt, *output.ids]]))[0].log_softmax(dim=-1)
    start = len(result.prompt) - 1
    assert output.logprobs == pytest.approx(
        [float(logprobs[start + i, id]) for i, id in enumerate(output.ids)], abs=1e-3
    )
    own = [float(logprobs[i, id]) for i, id in enumerate(result.prompt[1:])]
    assert result.prompt_logprobs == pytest.approx(own, abs=1e-3)
    for found, place, k in ((output.top[0], start, 3), (result.prompt_top[0], 0, 2)):
        values, ids = logprobs[place].topk(k)
        assert [id for id, _ in found] == ids.tolist()
        assert [value for _, value in found] == pytest.approx(values.tolist(), abs=1e-3)


def test_a_prompt_that_cannot_be_answered_is_named_before_anything_runs(llm: LLM) -> None:
    steps = llm.engine.metrics.steps
    long = "1 + " * llm.context
    with pytest.raises(DataError, match=rf"prompt 1: prompt of \d+ tokens.*{llm.context}"):
        llm.generate(["fine", long, "fine"], PLAIN)
    with pytest.raises(ConfigError, match="prompt 2: .*token 9999"):
        llm.generate(["a", "b", "c"], [PLAIN, PLAIN, replace(PLAIN, stop_ids=(9999,))])
    with pytest.raises(ConfigError, match="2 params for 1 prompts"):
        llm.generate(["a"], [PLAIN, PLAIN])
    for wrong in ([3, 4], [[3.0]], [None]):  # ids of one prompt without a list around them, ids that are none
        with pytest.raises(ConfigError, match="prompt 0: a prompt is a text, a list of token ids"):
            llm.generate(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"give SamplingParams\(...\), not dict"):
        llm.generate(["a"], {"max_tokens": 3})  # type: ignore[arg-type]
    assert idle(llm) and llm.engine.metrics.steps == steps


def test_a_grammar_governs_the_answer_after_the_thought(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"sum": {"enum": [1, 2, 3]}}, "required": ["sum"]}
    params = replace(THOUGHT, max_tokens=120, schema=schema | {"additionalProperties": False})
    result = llm.chat(QUESTION, params)
    assert json.loads(result.text)["sum"] in (1, 2, 3) and result.thinking
    with pytest.raises(DataError, match="schema"):
        llm.chat(QUESTION, replace(params, schema="{"))


@pytest.mark.parametrize("thinking", [True, False])
def test_a_form_that_is_complete_at_the_last_token_is_no_cut_answer(llm: LLM, thinking: bool) -> None:
    pytest.importorskip("llguidance")
    params = replace(THOUGHT, max_tokens=200, regex="[1-3]{3}")
    whole = llm.chat(QUESTION, params, thinking=thinking)
    cut = [llm.chat(QUESTION, replace(params, max_tokens=len(whole.outputs[0].ids) - n), thinking) for n in (1, 2)]
    assert [(each.text, each.finish) for each in cut] == [(whole.text, "stop"), (whole.text[:-1], "length")]


def test_streams_of_one_model_run_together_and_apart_alike(checkpoint: Path) -> None:
    llm = LLM(checkpoint, precision="fp32", exact=True, cache_tokens=4096)
    asked = [QUESTION, [{"role": "user", "content": "3?"}], [{"role": "user", "content": "And 4, 5, 6, 7?"}]]
    params = [replace(THOUGHT, seed=seed, max_tokens=20 + seed) for seed in range(3)]
    alone = [llm.chat(messages, each) for messages, each in zip(asked, params, strict=True)]
    steps = llm.engine.metrics.steps
    streams = [llm.stream(messages, each) for messages, each in zip(asked, params, strict=True)]
    first = [next(streams[2]), next(streams[0])]
    found = [stream.result() for stream in streams]
    assert [result.outputs for result in found] == [result.outputs for result in alone]
    assert llm.engine.metrics.steps - steps < 30, "three answers of 20 tokens in the steps of one"
    pieces = [first[0], *streams[2]]
    assert joined(pieces, "thinking") == alone[2].thinking


def test_a_stream_that_is_closed_or_forgotten_gives_its_memory_back(llm: LLM) -> None:
    stream = llm.stream(QUESTION, replace(THOUGHT, max_tokens=200))
    said = [next(stream) for _ in range(3)]
    stream.close()
    assert idle(llm)
    result = stream.result()
    assert result.finish == "aborted" and result.thinking.startswith(joined(said, "thinking"))
    for piece in llm.stream(QUESTION, replace(THOUGHT, max_tokens=200)):
        assert piece.text
        break
    assert idle(llm)


def test_an_interrupted_step_ends_what_ran_and_nothing_else(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = llm.generate(["What"], PLAIN)
    stream = llm.stream(QUESTION, THOUGHT)
    next(stream)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm.engine.scheduler, "append", interrupt)
        list(stream)
    assert idle(llm) and stream.result().finish == "aborted"
    assert [each.outputs for each in llm.generate(["What"], PLAIN)] == [each.outputs for each in before]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_thought_can_be_cut_short(llm: LLM) -> None:
    params = SamplingParams(max_tokens=60, seed=1, logit_bias={llm.tok.end_think_id: -100, llm.tok.eos_id: -100})
    stream = llm.stream(QUESTION, params)
    next(stream)
    stream.answer_now()
    result = stream.result()
    assert result.thinking and result.text and len(result.outputs[0].ids) == 60
    assert llm.chat(QUESTION, params).finish == "length while thinking"


def test_a_second_turn_finds_the_first_in_the_cache(llm: LLM) -> None:
    first = llm.chat(QUESTION * 8, PLAIN, thinking=False)
    more = [*QUESTION * 8, {"role": "assistant", "content": "3"}, *QUESTION]
    second = llm.chat(more, PLAIN, thinking=False)
    assert second.cached_tokens >= len(first.prompt) - 2 * llm.engine.config.block_size > 0


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_white_space_ends_an_answer_when_it_comes(tok: Tokenizer) -> None:
    for stop, text in (("\n", "3, 4"), ("\n\n", "3, 4\n1"), (" ", "3,"), ("\n2", "3, 4\n1")):
        reader = Reader(tok, SamplingParams(stop=(stop,)), in_thought=True)
        written = [*tok.encode("1 \n 2"), tok.end_think_id, *tok.encode("\n\n3, 4\n1\n\n2")]
        while not reader.stopped:
            reader.feed(written[reader.taken])
        reader.end("stop")
        assert (reader.text("thinking"), reader.text("answer")) == ("1 \n 2", text)
        assert tok.decode(written[: reader.taken]).endswith(stop)


def test_what_the_filter_kept_back_loses_its_white_space_alone(tok: Tokenizer) -> None:
    for stop in ("3 \n no", "\n no", "no"):
        reader = Reader(tok, SamplingParams(stop=(stop,)), in_thought=False)
        for id in tok.encode(" 3 \n"):
            reader.feed(id)
        reader.end("length")
        assert reader.text("answer") == "3"


def test_calls_are_taken_out_of_the_answer_wherever_it_is_cut(tok: Tokenizer) -> None:
    begin, end, call, call_end = (tok.control_id(name) for name in TOOLS[:4])
    body = [call, *tok.encode("add"), tok.control_id(TOOL_SEP), *tok.encode('{"a": 1}'), call_end]
    cut = [call, *tok.encode("add"), tok.control_id(TOOL_SEP), *tok.encode('{"a"')]
    ids = [
        *tok.encode("A call: "),
        begin,
        *body,
        end,
        begin,
        *body[:1],
        *tok.encode("sub"),
        *body[-10:],
        end,
        begin,
        *cut,
    ]
    reader = Reader(tok, SamplingParams(), False, {"add"})
    pieces = [piece for id in ids for piece in reader.feed(id)] + reader.end("length")
    assert "".join(text for _, text in pieces) == reader.text("answer") == "A call:"
    assert reader.calls[0] == ToolCall("add", '{"a": 1}')
    assert all(isinstance(each, BrokenCall) for each in reader.calls[1:]) and len(reader.calls) == 3
    in_thought = Reader(tok, SamplingParams(), True, {"add"})
    for id in [*ids[:12], tok.end_think_id, begin, *body, end]:
        in_thought.feed(id)
    assert in_thought.calls == [ToolCall("add", '{"a": 1}')]


def test_tools_are_told_with_messages_and_the_answer_lists_what_was_called(llm: LLM) -> None:
    told, plain = llm.render(QUESTION, tools=[TOOL]), llm.render(QUESTION)
    assert len(told.ids) > len(plain.ids)
    result = llm.chat(QUESTION, PLAIN, thinking=False, tools=[TOOL])
    assert tuple(result.prompt) == llm.render(QUESTION, thinking=False, tools=[TOOL]).ids and result.calls == []
    with pytest.raises(ConfigError, match="tools are told with messages"):
        llm.stream("1 + 2", PLAIN, tools=[TOOL])


def test_only_the_packed_weights_stay_in_memory(checkpoint: Path) -> None:
    llm = sputnik.LLM(checkpoint, precision="fp32", cache_tokens=256)
    kept = {tensor.device.type for tensor in llm.engine.model.parameters()}
    assert kept == ({"meta"} if isinstance(llm.engine.runner, NativeRunner) else {"cpu"})


def test_a_device_that_is_not_here_is_refused(checkpoint: Path) -> None:
    for device in ("cuda:7", "tpu", "meta"):
        with pytest.raises(ConfigError, match="device"):
            sputnik.LLM(checkpoint, device=device)


def test_a_model_of_other_makers_is_spoken_to_in_its_own_words(foreign: Tokenizer, save: Callable[..., Path]) -> None:
    llm = LLM(save(foreign, vocab_size=foreign.vocab_size + 20), precision="fp32")
    assert llm.template == "own"
    result = llm.chat(QUESTION, replace(PLAIN, temperature=1.0, seed=0, max_tokens=100, ignore_eos=True))
    assert llm.tok.decode(result.prompt) == ("<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert result.thinking == "" and result.text == llm.tok.decode(result.outputs[0].ids, skip_special=True)
    assert any(id >= foreign.vocab_size for id in result.outputs[0].ids), "rows without a token say nothing"
    with pytest.raises(ConfigError, match="thinking_budget"):
        llm.chat(QUESTION, replace(PLAIN, thinking_budget=3))


def test_the_answer_of_template_zero_is_its_block(checkpoint: Path, tok: Tokenizer) -> None:
    llm = LLM(checkpoint, template="zero", precision="fp32")
    for seed in range(3):
        (output,) = llm.chat(QUESTION, replace(THOUGHT, seed=seed)).outputs
        wanted = parse(tok, output.ids, in_thought=False, finished=output.finish == "stop", template="zero")
        assert (output.thinking, output.answer) == (wanted.thinking, wanted.answer)


def test_the_example_of_the_docs_runs(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quickstart/zero").mkdir(parents=True)
    (tmp_path / "runs/quickstart/zero/checkpoint").symlink_to(checkpoint)
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], {})
    rows = "".join(line for line in page.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`(\w+)`", rows))
    assert {each.name for each in fields(SamplingParams)} <= named, "every field is in the table"


def test_wrong_settings_are_refused_by_name(
    checkpoint: Path, foreign: Tokenizer, save: Callable[..., Path], llm: LLM
) -> None:
    with pytest.raises(ConfigError, match="unknown key 'cache_tokns'; did you mean 'cache_tokens'"):
        LLM(checkpoint, cache_tokns=3)
    with pytest.raises(ConfigError, match="template = 'other'"):
        LLM(checkpoint, template="other")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"tokenizer has \d+ ids"):
        LLM(save(foreign, vocab_size=foreign.vocab_size - 5))
    with pytest.raises(ConfigError, match="best_of"):
        llm.stream("What", SamplingParams(best_of=3))
