"""An answer as blocks: thoughts, texts and calls in the order in which they were written, each begun, filled and ended.

    blocks = Blocks()
    for step in blocks.steps(deltas): ...         # of one sample, in order; as often as there is something
    blocks.all                                    # what it comes to

The Responses and the Messages API both speak of answers so; what they call things is theirs. Streamed and whole are the
same by construction: the whole is what the steps have filled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sputnik.serve.reading import Delta, Score
from sputnik.text.tools import ToolCall


@dataclass
class Block:
    index: int
    kind: Literal["thinking", "text", "call"]
    text: str = ""
    """Of a call: its arguments."""
    call: ToolCall | None = None
    scores: list[Score] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    what: Literal["begin", "more", "end"]
    block: Block
    text: str = ""
    """That has been added."""
    scores: Sequence[Score] = ()
    last: bool = False
    """It ends because the answer does."""


class Blocks:
    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def steps(self, deltas: Sequence[Delta]) -> Iterator[Step]:
        for delta in deltas:
            if delta.call is not None:
                yield from self._end()
                block = self._begin("call")
                block.call = delta.call
                yield Step("begin", block)
                yield self._more(block, delta.call.arguments, delta.scores)
                yield from self._end()
            elif delta.text:
                kind: Literal["thinking", "text"] = "thinking" if delta.channel == "thinking" else "text"
                if self._open is None or self._open.kind != kind:
                    yield from self._end()
                    yield Step("begin", self._begin(kind))
                assert self._open is not None
                yield self._more(self._open, delta.text, delta.scores)
            elif delta.scores and self._open is not None:
                yield self._more(self._open, "", delta.scores)
            if delta.finish is not None:
                yield from self._end(last=True)

    def _begin(self, kind: Literal["thinking", "text", "call"]) -> Block:
        self._open = Block(len(self.all), kind)
        self.all.append(self._open)
        return self._open

    def _more(self, block: Block, text: str, scores: Sequence[Score]) -> Step:
        block.text += text
        block.scores += scores
        return Step("more", block, text, scores)

    def _end(self, last: bool = False) -> Iterator[Step]:
        if self._open is not None:
            block, self._open = self._open, None
            yield Step("end", block, last=last)
