"""What a model's ids become: pieces of text while it writes, outputs and results when it is done.

    reader = Reader(tok, params, prompt.in_thought)
    for id in ids:
        for channel, text in reader.feed(id): ...       # "thinking" or "answer"; none after `reader.stopped`
    reader.end("stop")                                  # what was held back
    reader.text("answer")                               # all pieces of the channel, joined

Streamed and whole answers come out of this one reader, so they are the same. Stop strings are looked for in the answer
and not in the thought, like grammars. Where tools were told, calls are taken out of the answer (`reader.calls`).
"""

from collections.abc import Collection
from dataclasses import dataclass

from sputnik.engine.params import SamplingParams
from sputnik.engine.thinking import Finish
from sputnik.text.chat import Channel, StreamParser
from sputnik.text.detokenize import Detokenizer, StopFilter
from sputnik.text.tokenizer import Tokenizer
from sputnik.text.tools import BrokenCall, CallParser, ToolCall

Call = ToolCall | BrokenCall


@dataclass(frozen=True)
class Piece:
    """Text that became certain. The last piece of each sample has no text and says why it ended."""

    channel: Channel
    text: str
    sample: int = 0
    finish: Finish | None = None
    call: Call | None = None
    """A call of a tool that is complete; it has no text."""


@dataclass(frozen=True)
class Output:
    """One answer. `ids` are all that was drawn: the thought, the stop string and the end token included."""

    ids: list[int]
    thinking: str
    answer: str
    calls: list[Call]
    """Of tools, in order."""
    finish: Finish
    logprobs: list[float]
    """Of each id, if asked for."""
    top: list[list[tuple[int, float]]]
    """Of each id the likeliest tokens in its place, if asked for."""


@dataclass(frozen=True)
class Result:
    """What came of one prompt; `outputs` best first if `best_of` was asked for."""

    prompt: list[int]
    cached_tokens: int
    """Prompt tokens that were in the cache."""
    prompt_logprobs: list[float]
    """Of prompt tokens 1, 2, ..., if asked for: the first has nothing before it."""
    prompt_top: list[list[tuple[int, float]]]
    outputs: list[Output]

    @property
    def text(self) -> str:
        """The (first) answer."""
        return self.outputs[0].answer

    @property
    def thinking(self) -> str:
        return self.outputs[0].thinking

    @property
    def calls(self) -> list[Call]:
        return self.outputs[0].calls

    @property
    def finish(self) -> Finish:
        return self.outputs[0].finish


class Reader:
    """Takes one sample apart, id by id, as `text.chat.parse` would as a whole."""

    def __init__(
        self,
        tok: Tokenizer,
        params: SamplingParams,
        in_thought: bool | None,
        tools: Collection[str] | None = None,
    ) -> None:
        """`in_thought` None: plain text, all of it answer, white space at its ends kept. `tools`: those that may be
        called; None: no calls are looked for."""
        self.calls: list[Call] = []
        self.finish: Finish | None = None
        self.taken = 0
        """Ids read."""
        self._found: dict[Channel, list[str]] = {"thinking": [], "answer": []}
        self._parser = None if in_thought is None else StreamParser(tok, in_thought, self._stopping)
        self._calls = None if tools is None else CallParser(tok, tools)
        self._plain = Detokenizer(tok, skip_special=True)
        self._stops = StopFilter(params.stop)
        self._wait = params.min_tokens

    @property
    def channel(self) -> Channel:
        return "thinking" if self._parser is not None and self._parser.in_thought else "answer"

    @property
    def stopped(self) -> bool:
        """A stop string ended the answer."""
        return self._stops.found is not None

    def text(self, channel: Channel) -> str:
        return "".join(self._found[channel])

    def feed(self, id: int) -> list[tuple[Channel, str]]:
        self.taken += 1
        if self._calls is not None and self.channel == "answer":
            taken = self._calls.feed(id)
            if not isinstance(taken, int):
                self.calls += [] if taken is None else [taken]
                return []
        if self._parser is not None:
            return self._kept(self._parser.feed(id))
        return self._kept([("answer", self._stopping(self._plain.feed(id)))])

    def end(self, finish: Finish) -> list[tuple[Channel, str]]:
        """Call once: what was held back."""
        self.finish = finish
        cut = None if self._calls is None else self._calls.finish()
        self.calls += [] if cut is None else [cut]
        if self._parser is not None:
            return self._kept([*self._parser.finish(), *self._parser.after_all(self._stops.finish())])
        return self._kept([("answer", self._stopping(self._plain.finish())), ("answer", self._stops.finish())])

    def _stopping(self, text: str) -> str:
        """What of the answer's text is certain; the first `min_tokens` ids end nothing."""
        return text if self.taken <= self._wait else self._stops.feed(text)

    def _kept(self, pieces: list[tuple[Channel, str]]) -> list[tuple[Channel, str]]:
        found = [(channel, text) for channel, text in pieces if text]
        for channel, text in found:
            self._found[channel].append(text)
        return found
