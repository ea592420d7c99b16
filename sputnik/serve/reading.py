"""Tokens of one answer into what clients are sent: text by channel, calls, log-probabilities, counts, the end.

    answer = Answer(speech, params, in_thought, tools)
    for token in tokens:                              # wire.Token, in order
        for delta in answer.feed(token): ...
    answer.finish, answer.thought_tokens, answer.ids

All that is sent comes out of `feed`, piece by piece; a whole reply is the pieces joined, so streamed and whole are the
same by construction. `ids` are kept: after an engine's death they are what the next one goes on from.
"""

from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from sputnik.engine.outputs import Reader
from sputnik.engine.params import SamplingParams
from sputnik.engine.thinking import ClosedBy, Finish, ThoughtTokens
from sputnik.serve import wire
from sputnik.text.chat import Channel
from sputnik.text.tokenizer import Tokenizer
from sputnik.text.tools import BrokenCall, ToolCall

TAGS = ("<answer>", "</answer>")


@dataclass(frozen=True)
class Speech:
    """How the model is spoken with."""

    tok: Tokenizer
    template: str
    context: int

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token: no text has fewer tokens than its bytes by this."""
        return max(len(self.tok.token_bytes([id])) for id in range(self.tok.vocab_size))

    @property
    def thought(self) -> ThoughtTokens | None:
        return ThoughtTokens.of(self.tok) if self.tok.has_thoughts else None


@dataclass(frozen=True)
class Score:
    """Log-probability of one token, and of the likeliest in its place."""

    id: int
    channel: Channel
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Delta:
    sample: int
    channel: Channel
    text: str = ""
    call: ToolCall | None = None
    scores: tuple[Score, ...] = ()
    finish: Finish | None = None
    """Set in the last one of each sample."""


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Texts of one sample and channel become one: a reader who lags gets fewer, longer pieces."""
    groups, open = list[list[Delta]](), dict[int, list[Delta]]()
    for delta in deltas:
        group = open.get(delta.sample)
        if group and group[-1].channel == delta.channel and not (group[-1].call or delta.call or group[-1].finish):
            group.append(delta)
        else:
            open[delta.sample] = group = [delta]
            groups.append(group)
    return [_joined(group) for group in groups]


def _joined(group: list[Delta]) -> Delta:
    scores = tuple(score for each in group for score in each.scores)
    return replace(group[-1], text="".join(each.text for each in group), scores=scores)


@dataclass
class Answer:
    speech: Speech
    params: SamplingParams
    in_thought: bool | None
    """None: plain text, whatever it holds."""
    tools: Collection[str] | None = None
    sample: int = 0
    one_call: bool = False
    """The answer ends with its first call."""
    ids: "array[int]" = field(default_factory=lambda: array("i"))
    finish: Finish | None = None
    stopped: str | None = None
    """The stop string that was found."""
    closed_by: ClosedBy | None = None
    thought_tokens: int = 0
    cached: int = 0
    calls: list[ToolCall] = field(default_factory=list)
    broken: list[BrokenCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = Reader(self.speech.tok, self.params, self.in_thought, self.tools)
        self._tags = _TagFilter() if self.speech.template == "zero" and self.in_thought is not None else None
        self._scores: list[Score] = []
        self._read = 0

    def feed(self, token: wire.Token) -> list[Delta]:
        """What became certain; nothing once it has ended. `ended_early` tells whether the engine must be told."""
        if self.finish is not None:
            return []
        finish, pieces = token.finish, list[tuple[Channel, str]]()
        if not self.ids:
            self.cached = token.cached
        if token.id is not None:
            self.ids.append(token.id)
            channel = self._reader.channel
            self.thought_tokens += channel == "thinking"
            if token.logprob is not None:
                self._scores.append(Score(token.id, channel, token.logprob, token.top or []))
            pieces = self._reader.feed(token.id)
        early = self._reader.stopped or (self.one_call and any(isinstance(c, ToolCall) for c in self._reader.calls))
        if early:
            finish = "stop"
        if finish is not None:
            pieces += self._reader.end(finish)
            self.finish, self.closed_by = finish, token.closed_by
            self.stopped = self._reader._stops.found
        deltas = [*self._texts(pieces), *self._calls()]
        if finish is not None:
            deltas += self._end(finish)
        return self._scored(deltas)

    def _texts(self, pieces: list[tuple[Channel, str]]) -> list[Delta]:
        if self._tags is not None:
            pieces = [(channel, self._tags.feed(text) if channel == "answer" else text) for channel, text in pieces]
        return [Delta(self.sample, channel, text) for channel, text in pieces if text]

    def _calls(self) -> list[Delta]:
        """New calls; one that cannot be read is text, and its reason is kept."""
        found, self._read = self._reader.calls[self._read :], len(self._reader.calls)
        deltas = []
        for call in found:
            if isinstance(call, BrokenCall):
                self.broken.append(call)
                deltas += [Delta(self.sample, "answer", call.text)] if call.text else []
            elif not (self.one_call and self.calls):
                self.calls.append(call)
                deltas.append(Delta(self.sample, "answer", call=call))
        return deltas

    def _end(self, finish: Finish) -> list[Delta]:
        held = self._tags.held if self._tags is not None else ""
        rest = [Delta(self.sample, "answer", held)] if held else []
        return [*rest, Delta(self.sample, self._reader.channel, finish=finish)]

    def _scored(self, deltas: list[Delta]) -> list[Delta]:
        """Scores go with the first piece that comes after their tokens."""
        if not deltas or not self._scores:
            return deltas
        first, scores = deltas[0], tuple(self._scores)
        self._scores = []
        return [Delta(first.sample, first.channel, first.text, first.call, scores, first.finish), *deltas[1:]]


class _TagFilter:
    """Drops <answer> and </answer> from text that comes in pieces (template "zero" writes them as plain text)."""

    def __init__(self) -> None:
        self.held = ""

    def feed(self, piece: str) -> str:
        text = self.held + piece
        for tag in TAGS:
            text = text.replace(tag, "")
        start = text.rfind("<")
        self.held = text[start:] if start >= 0 and any(tag.startswith(text[start:]) for tag in TAGS) else ""
        return text[: len(text) - len(self.held)]
