"""The terminal chat with a real (untrained) model: pieces, history, pipes, and Ctrl-C on a real terminal."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from torch import Tensor

from sputnik.cli.chat import ROOM, Conversation, TagFilter, command, printable, run_pipe
from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.engine.sample import Request
from sputnik.errors import DataError
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.transformer import Transformer
from sputnik.text.chat import render
from sputnik.text.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(600)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def conversation(checkpoint: Path) -> Conversation:
    return Conversation(LLM(checkpoint, precision="fp32", max_running=1), SamplingParams(max_tokens=24, seed=1))


@pytest.fixture(scope="module")
def talker(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never comes to an end by itself, and has room to go on for seconds: keys are pressed amid an answer."""
    tok, config = Tokenizer.load(checkpoint), load_model(checkpoint).config
    model = Transformer(replace(config, max_position_embeddings=32_768)).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[[tok.eos_id, tok.end_think_id], 0] = -100.0
    folder = tmp_path_factory.mktemp("talker") / "checkpoint"
    save_model(model, folder, tokenizer=tok)
    return folder


class Script:
    """Makes the model write a given text, whatever it is asked: its head is replaced, all else is real."""

    def __init__(self, conversation: Conversation, text: str) -> None:
        tok, engine = conversation.llm.tok, conversation.llm.engine
        self.ids = [*tok.encode_with_special(text), tok.eos_id]
        self.prompts: list[list[int]] = []
        self._size = engine.model.config.vocab_size
        self._add, self._next = engine.add, 0
        engine.add, engine.runner.head = self.add, self.head  # type: ignore[method-assign]

    def add(self, request: Request) -> int:
        self.prompts.append(list(request.prompt))
        self._next = 0
        return self._add(request)

    def head(self, hidden: Tensor, keep: bool = True) -> Tensor:
        assert len(hidden) == 1
        self._next += 1
        return torch.full((1, self._size), -1e9).index_fill(1, torch.tensor(self.ids[self._next - 1]), 0.0)


def test_streamed_pieces_join_to_the_whole_answer(conversation: Conversation) -> None:
    question = "What is 1 + 2?"
    pieces = list(conversation.ask(question))
    params = SamplingParams(max_tokens=24, seed=2, answer_reserve=6)
    whole = conversation.llm.chat([{"role": "user", "content": question}], params)
    assert "".join(piece for channel, piece in pieces if channel == "thinking") == whole.thinking
    assert "".join(piece for channel, piece in pieces if channel == "answer") == whole.text
    assert conversation.last is not None and conversation.last.tokens == len(whole.outputs[0].ids)


def test_history_carries_answers_without_thoughts(conversation: Conversation) -> None:
    script = Script(conversation, "one and two\n</think>\n\n3")
    assert list(conversation.ask("1 + 2?"))[-1] == ("answer", "3")
    list(conversation.ask("and now?"))
    second = conversation.llm.tok.decode(script.prompts[1])
    assert "1 + 2?" in second and "3" in second and "and now?" in second
    assert "one and two" not in second
    command(conversation, "/new")
    list(conversation.ask("and now?"))
    assert "1 + 2?" not in conversation.llm.tok.decode(script.prompts[2])


def test_what_earlier_turns_computed_is_not_computed_again(conversation: Conversation) -> None:
    Script(conversation, "</think>3")
    list(conversation.ask("What is 1 + 2? " * 5))
    list(conversation.ask("And now?"))
    assert conversation.last is not None and conversation.last.cached >= 32
    assert f"{conversation.last.cached} cached" in conversation.last.line(0.1)


def test_template_zero_shows_no_tags_and_keeps_the_answer(conversation: Conversation) -> None:
    conversation.llm.template = "zero"
    Script(conversation, "<think>hm</think>\n<answer>3 < 4</answer>")
    pieces = list(conversation.ask("?"))
    assert "".join(piece for channel, piece in pieces if channel == "answer") == "3 < 4"
    assert conversation.messages[-1] == {"role": "assistant", "content": "3 < 4"}


def test_tag_filter_drops_tags_however_they_are_cut() -> None:
    text = "a<answer>3 < 4 <an</answer>b"
    for cut in range(len(text)):
        tags = TagFilter()
        assert tags.feed(text[:cut]) + tags.feed(text[cut:]) + tags.held == "a3 < 4 <anb"


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\x07\x9b1m\n\tc") == "a\ufffd[2Jb\ufffd\ufffd\ufffd1m\n\tc"


def test_closing_early_keeps_the_answer_so_far_or_drops_the_question(conversation: Conversation) -> None:
    Script(conversation, "hm\n</think>\n\none two three")
    with contextlib.closing(conversation.ask("first")) as pieces:
        while next(pieces)[0] == "thinking":
            pass
    assert conversation.last is not None and conversation.last.finish == "aborted"
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    with contextlib.closing(conversation.ask("second")) as pieces:
        next(pieces)
    assert "second" not in str(conversation.messages)


def test_thinking_off_closes_the_thought_in_the_prompt(conversation: Conversation) -> None:
    script = Script(conversation, "3")
    assert command(conversation, "/think off") == "thinking is off"
    assert list(conversation.ask("?")) == [("answer", "3")]
    assert script.prompts[0][-1] == conversation.llm.tok.end_think_id
    assert "no such command" in command(conversation, "/think maybe")
    conversation.llm.template, conversation.thinking = "zero", True
    assert command(conversation, "/think off") == "this model always thinks" and conversation.thinking


def test_a_thought_is_closed_at_its_budget_and_in_time_for_an_answer(conversation: Conversation) -> None:
    text = "1 + 2 = 3 " * 50
    Script(conversation, text)
    assert command(conversation, "/budget 3") == "a thought is closed after 3 tokens"
    list(conversation.ask("?"))
    last: Any = conversation.last
    tok = conversation.llm.tok
    assert last.thought == tok.decode(tok.encode(text)[:3]).strip() and last.answer
    assert command(conversation, "/budget off") == "thoughts end by themselves"
    list(conversation.ask("?"))
    last = conversation.last
    assert len(tok.encode(last.thought)) > 3 and last.answer and last.finish == "length"
    assert "no such command" in command(conversation, "/budget maybe")


def test_a_full_context_names_both_numbers(conversation: Conversation) -> None:
    question = "1 + " * conversation.llm.context
    with pytest.raises(DataError, match=rf"has \d+ tokens and the model's context {conversation.llm.context}.*/new"):
        list(conversation.ask(question))
    assert conversation.messages == []


def test_a_nearly_full_context_shortens_the_answer(conversation: Conversation) -> None:
    tok, context = conversation.llm.tok, conversation.llm.context
    fill = "1" * (context - len(render(tok, [{"role": "user", "content": ""}]).ids) - ROOM - 2)
    while len(render(tok, [{"role": "user", "content": fill}]).ids) < context - ROOM:
        fill += "1"
    list(conversation.ask(fill))
    assert conversation.last is not None and conversation.last.tokens <= ROOM


def test_pipe_gives_one_answer_per_line(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "sputnik", "chat", str(checkpoint), "--max-tokens", "20", "--no-thinking"]
    done = subprocess.run(
        command,
        input="What is 1 + 2?\n\n/new\nWhat is 2 + 2?\n",
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr.count("tokens/s") == 2 and "a new conversation" in done.stderr


@pytest.mark.parametrize("fold", ["--no-fold", "--fold"])
def test_ctrl_c_stops_the_answer_and_not_the_program(talker: Path, fold: str) -> None:
    args = ["-m", "sputnik", "chat", str(talker), "--max-tokens", "30000", "--temperature", "2", fold]
    terminal = pexpect.spawn(
        sys.executable, args, env=ENVIRONMENT, timeout=120, encoding="utf-8", codec_errors="replace"
    )  # type: ignore[arg-type]
    terminal.expect("> ")
    for _ in range(2):
        terminal.sendline("Tell me a long story")
        terminal.expect("story\r\n")
        terminal.expect(r"\S")  # the answer has begun
        terminal.sendintr()
        terminal.expect(r"\d+ tokens, .*stopped")
        terminal.expect("> ")
    terminal.sendline("/help")
    terminal.expect("forget the conversation")
    terminal.expect("> ")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def leave_by_ctrl_d(terminal: Any) -> None:
    """Pressed again if need be: a key that comes while the line editor takes over the terminal is lost."""
    for _ in range(60):
        terminal.sendeof()
        if terminal.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=2) == 0:
            break
    terminal.close()
    assert terminal.exitstatus == 0


def test_ctrl_backslash_asks_for_the_answer(talker: Path) -> None:
    args = ["-m", "sputnik", "chat", str(talker), "--max-tokens", "30000", "--temperature", "2", "--fold"]
    terminal = pexpect.spawn(
        sys.executable, args, env=ENVIRONMENT, timeout=120, encoding="utf-8", codec_errors="replace"
    )  # type: ignore[arg-type]
    terminal.expect("> ")
    terminal.send("\x1c")  # nothing to hurry yet
    terminal.sendline("Tell me a long story")
    terminal.expect("story\r\n")
    terminal.expect(r"\S")
    terminal.send("\x1c")
    terminal.expect("thought for .* shows it")
    terminal.sendintr()
    terminal.expect(r"\d+ tokens, .*stopped")
    terminal.expect("> ")
    leave_by_ctrl_d(terminal)


def test_ctrl_d_leaves_and_a_wiped_line_keeps_its_prompt(checkpoint: Path) -> None:
    terminal = pexpect.spawn(sys.executable, ["-m", "sputnik", "chat", str(checkpoint)], env=ENVIRONMENT, timeout=120)  # type: ignore[arg-type]
    terminal.expect("> ")
    terminal.send("a question")
    terminal.expect("a question")
    terminal.send("\x15")  # Ctrl-U
    terminal.expect_exact("\r\x1b[C\x1b[C\x1b[K", timeout=30)  # what is cleared begins two columns to the right
    leave_by_ctrl_d(terminal)


def test_piped_input_in_another_encoding_is_told(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="the input is not utf-8: convert it"):
        run_pipe(conversation, 0.1)
