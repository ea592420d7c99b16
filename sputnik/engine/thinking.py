"""Reasoning controls of one sequence: a thought has a budget, leaves room for the answer, is cut short or drawn out.

    control = ThoughtControl(params, ThoughtTokens.of(tok), [tok.eos_id], prompt.in_thought)
    each step:  forced = control.forced       # an id that must come next, or None: draw freely
                id = control.instead(id)      # of an id that was drawn: what is written in its place
                finish = control.feed(id)     # what the sequence was given; says when and why it is finished
    any time:   control.answer_now()

A thought is closed by forcing the tokens the chat template would have at its end, so the model goes on with its answer
as if it had closed the thought itself; one that shall go on has its end replaced by "Wait" (budget forcing both ways,
s1, 2501.19393). All decisions are made on token ids; text is never searched. Left out: stop strings
(`text/detokenize.py`), deadlines and aborts (the engine knows them; `ended` gives them a name).
"""

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from sputnik.engine.params import SamplingParams
from sputnik.errors import ConfigError
from sputnik.text.tokenizer import Tokenizer

Cause = Literal["stop", "length", "loop", "aborted", "deadline", "failed"]
Finish = Literal[
    "stop", "stop while thinking", "length", "length while thinking", "loop", "aborted", "deadline", "failed"
]
ClosedBy = Literal["model", "budget", "reserve", "loop", "request"]


@dataclass(frozen=True)
class ThoughtTokens:
    """The tags of a thought and what stands around the closing one, as token ids."""

    open: int
    close: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    wait: tuple[int, ...] = ()
    """What stands in the place of an end that is put off."""

    @classmethod
    def of(cls, tok: Tokenizer, message: str = "", wait: str = "Wait") -> "ThoughtTokens":
        """Those of template "chat"; `message` is said at the end of a thought that did not end by itself."""
        before, after = tok.encode(f"{message}\n"), tok.encode("\n\n")
        return cls(tok.think_id, tok.end_think_id, tuple(before), tuple(after), tuple(tok.encode(wait)))

    @property
    def closing(self) -> int:
        """Tokens that ending a thought takes."""
        return len(self.before) + 1 + len(self.after)


class LoopDetector:
    """Tells when a text of token ids repeats itself, in constant time and bounded memory per token.

    Two signs: the last tokens are one block over and over (at least `repeats` times, and `least` tokens beyond the
    first), or nearly all of the last `WINDOW` tokens stood in the text before, as when only a counter changes from
    round to round. Blocks longer than `HORIZON` go unnoticed.
    """

    GRAM = 8
    HORIZON = 4096
    WINDOW = 2048
    NOVEL = 0.05
    """Share of new runs of 8 tokens in the window below which it says nothing new."""

    def __init__(self, repeats: int, least: int) -> None:
        self.repeats, self.least = repeats, least
        self._recent: deque[int] = deque(maxlen=self.GRAM)
        self._last_seen: dict[int, int] = {}
        self._fresh: deque[bool] = deque(maxlen=self.WINDOW)
        self._novel = 0
        self._length = self._period = self._run = 0

    def feed(self, id: int) -> bool:
        """True when the text, with this token, is caught in a loop."""
        self._length += 1
        self._recent.append(id)
        if len(self._recent) < self.GRAM:
            return False
        gram = hash(tuple(self._recent))
        period = self._length - self._last_seen.get(gram, self._length)
        self._last_seen[gram] = self._length
        if len(self._last_seen) > 2 * self.HORIZON:
            start = self._length - self.HORIZON
            self._last_seen = {gram: place for gram, place in self._last_seen.items() if place > start}
        self._run = self._run + 1 if period and period == self._period else 0
        self._period = period
        return self._cycles() or self._says_nothing_new(fresh=not period)

    def _cycles(self) -> bool:
        again = self._run + self.GRAM if self._period else 0  # tokens equal to those one period earlier
        return again >= max(self.least, (self.repeats - 1) * self._period)

    def _says_nothing_new(self, fresh: bool) -> bool:
        full = len(self._fresh) == self.WINDOW
        self._novel += fresh - (self._fresh[0] if full else 0)
        self._fresh.append(fresh)
        return full and self._novel < self.NOVEL * self.WINDOW


class ThoughtControl:
    """The state machine. A model that opens a second thought goes on with what is left of the same budget."""

    def __init__(
        self, params: SamplingParams, tokens: ThoughtTokens | None, eos_ids: Collection[int], in_thought: bool = False
    ) -> None:
        """`tokens` None: a model without thoughts; a ConfigError if `params` has something to say about them."""
        if tokens is None and params.steers_thought:
            raise ConfigError("this model has no thoughts: leave out thinking_budget, answer_reserve and extend")
        self.in_thought = in_thought
        self.closed_by: ClosedBy | None = None
        """Who ended the (last) thought."""
        self.written = 0
        self.thought = 0
        """Tokens inside thoughts, their tags not counted."""
        self.extended = 0
        """Ends of thought that were put off."""
        self._params = params
        self._tokens = tokens
        self._ends = params.ends(eos_ids)
        self._queue: deque[int] = deque()
        self._asked = False
        self._loop: LoopDetector | None = None
        self._turn()

    @property
    def forced(self) -> int | None:
        """The id that the next token must be; `feed` it like any other."""
        return self._queue[0] if self._queue else None

    @property
    def answering(self) -> bool:
        """The next token belongs to the answer and is free: a grammar, if there is one, applies to it."""
        return not self.in_thought and not self._queue

    @property
    def free(self) -> int:
        """Tokens that can be written before a limit forces something, as far as that is known now; at least one."""
        left = [left for _, left in self._limits()] if self.in_thought else []
        return max(1, min([self._params.max_tokens - self.written, *left]))

    def instead(self, id: int) -> int:
        """What is written where the model drew `id`: an end of thought that comes too early gives way to "Wait"."""
        tokens = self._tokens
        if tokens is None or not self.in_thought or id != tokens.close or not self._may_extend(tokens):
            return id
        self.extended += 1
        self._queue.extend(tokens.wait)
        return tokens.wait[0]

    def feed(self, id: int) -> Finish | None:
        """Take the next token of the sequence; returns why the sequence ends with it, or None."""
        self.written += 1
        forced = bool(self._queue)
        if forced:
            self._queue.popleft()
        elif id in self._ends and self.written > self._params.min_tokens:
            return self.ended("stop")
        looping = self._advance(id, forced)
        if looping and not self.in_thought:
            return self.ended("loop")
        if self.written >= self._params.max_tokens:
            return self.ended("length")
        if looping:
            self._close("loop")
        self._watch()
        return None

    def answer_now(self) -> bool:
        """Close the thought, or the one that is about to be opened; False if the answer is already being written."""
        if not self.in_thought and self.written:
            return False
        self._asked = True
        self._watch()
        return True

    def ended(self, cause: Cause) -> Finish:
        """The finish detail of a sequence that ends now for this cause."""
        if self.in_thought and cause == "stop":
            return "stop while thinking"
        if self.in_thought and cause == "length":
            return "length while thinking"
        return cause

    def _advance(self, id: int, forced: bool) -> bool:
        """Follow the tags and count; true if the channel the token belongs to is caught in a loop."""
        tokens = self._tokens
        if tokens is not None and id == (tokens.close if self.in_thought else tokens.open):
            self.in_thought = not self.in_thought
            if not self.in_thought and not forced:
                self.closed_by = "model"
                if self._params.constrained:
                    self._queue.extend(tokens.after)
            self._turn()
            return False
        self.thought += self.in_thought
        return self._loop is not None and not forced and self._loop.feed(id)

    def _may_extend(self, tokens: ThoughtTokens) -> bool:
        """The model drew the end by itself, it is asked for more, and all limits leave room for it."""
        params, more = self._params, len(tokens.wait)
        if self._queue or self._asked or self.extended >= params.extend or not more:
            return False
        if params.thinking_budget is not None and self.thought + more > params.thinking_budget:
            return False
        return self.written + more + tokens.closing + params.answer_reserve <= params.max_tokens

    def _turn(self) -> None:
        """A channel begins."""
        if self._params.break_loops:
            self._loop = LoopDetector(4, 64) if self.in_thought else LoopDetector(4, 256)
        self._watch()

    def _watch(self) -> None:
        if not self.in_thought or self._tokens is None or self._queue:
            return
        spent: ClosedBy | None = next((by for by, left in self._limits() if left <= 0), None)
        if self._asked:
            self._close("request")
        elif spent is not None:
            self._close(spent)

    def _limits(self) -> Iterator[tuple[ClosedBy, int]]:
        """What closes a thought, and after how many tokens more."""
        params, tokens = self._params, self._tokens
        if tokens is not None and params.thinking_budget is not None:
            yield "budget", params.thinking_budget - self.thought
        if tokens is not None and params.answer_reserve:
            yield "reserve", params.max_tokens - params.answer_reserve - tokens.closing - self.written

    def _close(self, by: ClosedBy) -> None:
        if self._tokens is not None and not self._queue:
            self.closed_by = by
            self._queue.extend((*self._tokens.before, self._tokens.close, *self._tokens.after))
