"""`sputnik chat MODEL_OR_RUN`: talk to a model in the terminal, its thinking shown dimmed (or folded with --fold).

Ctrl-C stops an answer, not the program; Ctrl-\\ cuts the thought short and asks for the answer; Ctrl-C or Ctrl-D at the
prompt leaves. Earlier thoughts are not sent back, as R1 wants it; what earlier turns computed comes from the cache.
With input from a pipe each line is a question and each answer one line on stdout, for scripts.

Left out: editing earlier turns, several chats, files.
"""

import contextlib
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from rich.live import Live
from rich.text import Text
from tyro.conf import Positional, arg

from sputnik.cli.console import Console
from sputnik.cli.model import Template, load_llm, require_thinking
from sputnik.engine.llm import LLM, Stream
from sputnik.engine.params import SamplingParams
from sputnik.engine.thinking import Finish
from sputnik.errors import DataError
from sputnik.hardware import hardware
from sputnik.text.chat import Channel
from sputnik.text.named_models import EMBEDDED

HELP = """\
/new           forget the conversation
/think on|off  answer with or without thinking
/budget N|off  close a thought after N tokens
/thought       show the last thought again
/help          this list
/quit          leave (also Ctrl-D)
Ctrl-C         stop an answer
Ctrl-\\         enough thought: answer now"""
ROOM = 16
"""Tokens that must be left for an answer; below that the conversation is full."""
NOTES: Mapping[Finish, str] = {
    "stop": "",
    "aborted": ", stopped",
    "length": ", cut off: out of tokens",
    "length while thinking": ", cut off while thinking: out of tokens",
    "loop": ", cut off: it repeats itself",
    "failed": ", failed: its logits are not finite",
}


@dataclass(frozen=True)
class ChatConfig:
    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = EMBEDDED
    """A checkpoint directory, a GGUF file, a run, or the name of a run or a model (smollm2, r1-mini)."""
    fold: bool = False
    """Replace a finished thought by one line with its length."""
    thinking: bool = True
    thinking_budget: int | None = None
    """Tokens after which a thought is closed."""
    template: Template = "auto"
    """auto: the one the model was trained with."""
    system: str = ""
    """A system message before the conversation."""
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 1024
    """Longest answer, thinking included, of which a quarter is kept for what follows the thought; less if the context
    has less room."""
    seed: int = 0
    precision: str = "auto"
    weights: str | None = None
    """int8 or int4: smaller and faster."""


@dataclass(frozen=True)
class Turn:
    """What one answer was and took."""

    thought: str
    answer: str
    tokens: int
    seconds: float
    finish: Finish
    cached: int
    """Tokens of the conversation that earlier turns had computed."""

    def line(self, usd_per_hour: float) -> str:
        speed = self.tokens / self.seconds if self.seconds else 0.0
        usd = self.seconds / 3600 * usd_per_hour
        cached = f"{self.cached} cached, " if self.cached else ""
        figures = f"{self.tokens} tokens, {self.seconds:.1f} s, {speed:.0f} tokens/s, {cached}${usd:.6f}"
        return figures + NOTES.get(self.finish, f", {self.finish}")


class Conversation:
    """The turns so far and how to get the next one; knows nothing of terminals."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str = "") -> None:
        self.llm = llm
        self.params = params
        self.thinking = True
        self.stream: Stream | None = None
        """The answer that is being written."""
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)
        self.last: Turn | None = None
        self._asked = 0

    def forget(self) -> None:
        self.messages = list(self._start)
        self.last = None

    def ask(self, question: str) -> Generator[tuple[Channel, str], None, None]:
        """Pieces of thought and answer as they come. Closing the iterator early keeps what was answered so far; a
        question that got no answer at all is dropped from the conversation. DataError if the context is full."""
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = self.llm.render(messages, self.thinking)
        room = self.llm.context - len(prompt.ids)
        if room < ROOM:
            raise DataError(
                f"the conversation has {len(prompt.ids)} tokens and the model's context {self.llm.context}: "
                "start a new one with /new"
            )
        self._asked += 1
        seed = None if self.params.seed is None else self.params.seed + self._asked
        tokens = min(self.params.max_tokens, room)
        reserve = tokens // 4 if self.llm.thought is not None else 0
        params = replace(self.params, max_tokens=tokens, answer_reserve=reserve, seed=seed)
        tags, tagged = TagFilter(), self.llm.template == "zero"
        begun = time.perf_counter()
        self.stream = self.llm.start(prompt, params)
        try:
            for piece in self.stream:
                text = tags.feed(piece.text) if tagged and piece.channel == "answer" else piece.text
                if text:
                    yield piece.channel, text
            if tags.held:
                yield "answer", tags.held
        finally:
            self.stream.close()
            result, self.stream = self.stream.result(), None
            self.last = Turn(
                thought=result.thinking,
                answer=result.text,
                tokens=len(result.outputs[0].ids),
                seconds=time.perf_counter() - begun,
                finish=result.finish,
                cached=result.cached_tokens,
            )
            if result.text:
                self.messages = [*messages, {"role": "assistant", "content": result.text}]

    def stop(self) -> None:
        """End the answer that is being written; asked twice, the program. For signal handlers."""
        if self.stream is None or self.stream.done:
            raise KeyboardInterrupt
        self.stream.close()

    def answer_now(self) -> None:
        """Close the thought that is being written. For signal handlers."""
        if self.stream is not None:
            self.stream.answer_now()


class TagFilter:
    """Drops <answer> and </answer> from text that comes in pieces (template "zero" writes them as plain text)."""

    TAGS = ("<answer>", "</answer>")

    def __init__(self) -> None:
        self.held = ""

    def feed(self, piece: str) -> str:
        text = self.held + piece
        for tag in self.TAGS:
            text = text.replace(tag, "")
        start = text.rfind("<")
        self.held = text[start:] if start >= 0 and any(tag.startswith(text[start:]) for tag in self.TAGS) else ""
        return text[: len(text) - len(self.held)]


class Terminal:
    """A person at the keyboard."""

    def __init__(self, conversation: Conversation, fold: bool, usd_per_hour: float) -> None:
        self.conversation = conversation
        self.fold = fold
        self.usd_per_hour = usd_per_hour
        self.console = Console(highlight=False)

    def run(self, name: str) -> None:
        """Questions and answers until the user leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history for input()
        context = self.conversation.llm.context
        self.console.print(f"{name}, context {context} tokens; /help lists the commands", style="dim", markup=False)
        with on_signal(signal.SIGQUIT, self.conversation.answer_now):
            while True:
                self.console.print()
                try:
                    question = input("> ").strip()  # not rich's: readline must know the prompt, or it wipes it
                except (KeyboardInterrupt, EOFError):
                    self.console.print()
                    return
                if question == "/quit":
                    return
                if question.startswith("/"):
                    self.console.print(command(self.conversation, question), markup=False)
                elif question:
                    self._answer(question)

    def _answer(self, question: str) -> None:
        try:
            asked = contextlib.closing(self.conversation.ask(question))
            with on_signal(signal.SIGINT, self.conversation.stop), asked as pieces:
                self._show(pieces)
        except DataError as error:
            self.console.print(f"error: {error}", style="red", markup=False)
            return
        if self.conversation.last is not None:
            self.console.print(self.conversation.last.line(self.usd_per_hour), style="dim", markup=False)

    def _show(self, pieces: Iterator[tuple[Channel, str]]) -> None:
        """Print as it comes; with `fold` the thought lives in an area that is wiped when it ends."""
        thought = Text(style="dim italic")
        begun = time.perf_counter()
        live = Live(console=self.console, transient=True, vertical_overflow="ellipsis") if self.fold else None
        before: Channel | None = None
        try:
            for channel, piece in pieces:
                piece = printable(piece)
                if channel == "thinking" and live is not None:
                    if before is None:
                        live.start()
                    thought.append(piece)
                    live.update(thought)
                elif channel == "thinking":
                    self.console.print(piece, style="dim italic", end="", markup=False, soft_wrap=True)
                else:
                    if before == "thinking":
                        self._end_thought(live, begun)
                    self.console.print(piece, end="", markup=False, soft_wrap=True)
                before = channel
        finally:
            if live is not None and before == "thinking":
                self._end_thought(live, begun)
        self.console.print()

    def _end_thought(self, live: Live | None, begun: float) -> None:
        if live is None:
            self.console.print("\n")
            return
        live.stop()
        self.console.print(f"(thought for {time.perf_counter() - begun:.1f} s, /thought shows it)", style="dim")


@contextlib.contextmanager
def on_signal(number: int, action: Callable[[], None]) -> Iterator[None]:
    """While inside, the signal does `action` and nothing else."""
    before: Any = signal.signal(number, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(number, before)


def printable(text: str) -> str:
    """Without control characters: a model's words must not steer the terminal."""
    return "".join(char if char in "\n\t" or unicodedata.category(char) != "Cc" else "\ufffd" for char in text)


def command(conversation: Conversation, text: str) -> str:
    """Do a slash command; returns what to tell the user."""
    match text.split():
        case ["/new"]:
            conversation.forget()
            return "a new conversation"
        case ["/think", ("on" | "off") as wanted]:
            if wanted == "off" and conversation.llm.template == "zero":
                return "this model always thinks"
            conversation.thinking = wanted == "on"
            return f"thinking is {wanted}"
        case ["/budget", wanted] if wanted == "off" or wanted.isdecimal():
            budget = None if wanted == "off" else int(wanted)
            if budget is not None and conversation.llm.thought is None:
                return "this model has no thoughts"
            conversation.params = replace(conversation.params, thinking_budget=budget)
            return "thoughts end by themselves" if budget is None else f"a thought is closed after {budget} tokens"
        case ["/thought"]:
            return printable(conversation.last.thought if conversation.last else "") or "no thought yet"
        case ["/help"]:
            return HELP
    return f"{text}: no such command\n{HELP}"


def run_pipe(conversation: Conversation, usd_per_hour: float) -> None:
    """One question per input line, one answer per output line; figures and command replies go to stderr."""
    for line in _decoded(sys.stdin):
        question = line.strip()
        if question == "/quit":
            return
        if question.startswith("/"):
            print(command(conversation, question), file=sys.stderr)
        elif question:
            for _ in conversation.ask(question):
                pass
            assert conversation.last is not None
            print(" ".join(conversation.last.answer.split()), flush=True)
            print(conversation.last.line(usd_per_hour), file=sys.stderr)


def _decoded(lines: Iterable[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise DataError(f"the input is not {error.encoding}: convert it, e.g. with iconv") from None


def main(config: ChatConfig) -> None:
    llm = load_llm(
        config.model, config.template, precision=config.precision, weights=config.weights, max_running=1, guesses=1
    )
    require_thinking(llm, config.thinking)
    params = SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        seed=config.seed,
        thinking_budget=config.thinking_budget,
    )
    conversation = Conversation(llm, params, config.system)
    conversation.thinking = config.thinking
    usd_per_hour = hardware("cpu").usd_per_hour
    if sys.stdin.isatty():
        Terminal(conversation, config.fold, usd_per_hour).run(config.model)
    else:
        run_pipe(conversation, usd_per_hour)
