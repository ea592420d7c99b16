"""What the engine keeps of each request: the request itself, its samples, and the events they cause."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from sputnik.engine.params import SamplingParams
from sputnik.engine.sampling import Masks, sample_seed
from sputnik.engine.sequence import Sequence
from sputnik.engine.thinking import Finish, ThoughtControl, ThoughtTokens
from sputnik.errors import DataError


class Matcher(Protocol):
    """The part of `constrain.Constraint` that is used here."""

    @property
    def done(self) -> bool:
        """Nothing can follow but the end."""

    def bits(self) -> "np.ndarray[Any, np.dtype[np.int32]]":
        """One bit a token, (ceil(V / 32),)."""

    def accept(self, id: int) -> bool:
        """The token that was drawn; False if it does not fit."""


@dataclass(frozen=True)
class Request:
    """Prompt ids and how to go on."""

    prompt: Tokens[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    in_thought: bool = False
    """The prompt ends inside a thought (`text.chat.Prompt.in_thought`)."""
    thought: ThoughtTokens | None = None
    """The tags of a thought; None: a model without thoughts."""
    matchers: Tokens[Matcher] = ()
    """One per sample, if the answer is constrained."""
    priority: int = 0
    deadline: float | None = None
    salt: bytes = b""
    written: Tokens[int] = ()
    """Of an only sample, what it has come to elsewhere: it goes on there, and a seed gives what it would have there."""


@dataclass(eq=False, slots=True)
class Sample:
    """One answer on its way, and what it has come to."""

    request: int
    index: int
    sequence: Sequence
    params: SamplingParams
    prompt: list[int]
    seed: int
    ends: frozenset[int]
    control: ThoughtControl | None
    matcher: Matcher | None
    arrival: float
    written: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    """Of prompt tokens 1, 2, ...; the first token has none."""
    routes: "np.ndarray[Any, np.dtype[np.int16]] | None" = None
    """If recorded: experts (tokens, expert layers, K) of prompt and answer; -1 where nothing was computed."""
    prompt_top: list[tuple[list[int], list[float]]] = field(default_factory=list)
    finish: Finish | None = None
    first_token: float | None = None

    @classmethod
    def of(
        cls, request: Request, number: int, index: int, id: int, seed: int, now: float, eos_ids: tuple[int, ...]
    ) -> "Sample":
        params = request.params
        sequence = Sequence(
            id, list(request.prompt), len(request.prompt) + params.max_tokens, request.priority, request.deadline, now,
            request.salt, reuse=params.prompt_logprobs is None,
        )  # fmt: skip
        control = None
        if request.thought is not None or params.break_loops:
            control = ThoughtControl(params, request.thought, eos_ids, request.in_thought)
        matcher = request.matchers[index] if request.matchers else None
        own = sample_seed(seed, index)
        made = cls(
            number, index, sequence, params, list(request.prompt), own, params.ends(eos_ids), control, matcher, now
        )
        made._go_on(request.written)
        return made

    def _go_on(self, written: Tokens[int]) -> None:
        """Bring all that counts tokens to where it stood after these."""
        if any(self.take(id, None, None) is not None for id in written):
            raise DataError("what was written is a whole answer, or does not fit its grammar: nothing can follow")
        self.sequence.tokens.extend(written)

    @property
    def controlled(self) -> bool:
        return self.control is not None

    def forced(self) -> int | None:
        return None if self.control is None else self.control.forced

    @property
    def free(self) -> int:
        """Tokens that can be drawn before something else is to be written, or the end."""
        return self.params.max_tokens - len(self.written) if self.control is None else self.control.free

    @property
    def guessable(self) -> bool:
        """Whether several places can be drawn at once: no penalty and no grammar that waits for what was written."""
        params = self.params
        return (
            self.matcher is None
            and not (params.presence_penalty or params.frequency_penalty)
            and params.repetition_penalty == 1
        )

    @property
    def constrained(self) -> bool:
        """Whether the next token is the grammar's business: the thought, if there is one, is over."""
        return self.matcher is not None and (self.control is None or self.control.answering)

    def instead(self, id: int) -> int:
        return id if self.control is None else self.control.instead(id)

    def take(self, id: int, logprob: float | None, top: list[tuple[int, float]] | None) -> Finish | None:
        """The next token; why the sample ends with it, or None."""
        if self.matcher is not None and self.constrained and id not in self.ends and not self.matcher.accept(id):
            return "failed"
        self.written.append(id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if top is not None:
            self.top.append(top)
        finish: Finish | None = "length" if len(self.written) >= self.params.max_tokens else None
        if self.control is not None:
            finish = self.control.feed(id)
        elif id in self.ends and len(self.written) > self.params.min_tokens:
            finish = "stop"
        whole = finish == "length" and self.matcher is not None and self.matcher.done
        return "stop" if whole else finish

    def take_all(self, ids: list[int], logprobs: Tokens[float | None]) -> tuple[list[int], Finish | None]:
        """Tokens drawn in a row, none but the last of them an end: those that stay, up to where something else is to be
        written than what was drawn, and why the sample ends with them, or None."""
        if self.control is None and self.matcher is None and ids:
            self.written += ids[:-1]
            self.logprobs += (each for each in logprobs[: len(ids) - 1] if each is not None)
            return ids, self.take(ids[-1], logprobs[len(ids) - 1], None)
        kept = list[int]()
        for drawn, logprob in zip(ids, logprobs, strict=False):
            id = self.instead(drawn)
            kept.append(id)
            finish = self.take(id, logprob, None)
            if finish is not None or id != drawn or self.forced() is not None:
                return kept, finish
        return kept, None

    def keep_routes(self, start: int, rows: "np.ndarray[Any, np.dtype[np.int16]]") -> None:
        """The experts (tokens, expert layers, K) of the tokens from `start` on."""
        if self.routes is None:
            self.routes = np.full((self.sequence.max_length, *rows.shape[1:]), -1, dtype=np.int16)
        self.routes[start : start + len(rows)] = rows

    def answer_now(self) -> None:
        if self.control is not None:
            self.control.answer_now()

    def wants_prompt(self, start: int) -> bool:
        """Whether prompt tokens are still to be scored by a piece of work from `start` on."""
        return (
            self.params.prompt_logprobs is not None
            and self.index == 0
            and start <= len(self.prompt_logprobs) < len(self.prompt) - 1  # below it after a preemption
        )


@dataclass(eq=False, slots=True)
class Event:
    """What a step brought of one sample: its next tokens, and why it ended with the last of them (or without any:
    deadline, failed). Not frozen, which would treble its price."""

    request: int
    sample: int
    ids: list[int]
    finish: Finish | None
    of: Sample


def masks_of(rows: Tokens[Sample], device: torch.device) -> Masks | None:
    """What the grammars allow next."""
    found = [(place, each.matcher.bits()) for place, each in enumerate(rows) if each.matcher and each.constrained]
    if not found:
        return None
    places, bits = torch.tensor([place for place, _ in found]), np.stack([bits for _, bits in found])
    return Masks(places.to(device), torch.from_numpy(bits).to(device))


def positions_of(rows: Tokens[Sample]) -> list[int]:
    """Tokens written before each row's: one more for every further row of the same sample, which checks a guess."""
    positions, last = list[int](), None
    for each in rows:
        positions.append(positions[-1] + 1 if each is last else len(each.written))
        last = each
    return positions
