"""From the deltas of a job to what the client reads: chunks of a stream, or one reply. In OpenAI's and DeepSeek's form.

    teller = ChatTeller(head, speech, job, applied)    # or CompletionTeller
    teller.events(deltas), teller.end()                # -> bytes of server-sent events
    teller.reply(deltas)                               # all of them -> the bytes of the whole

A reply is made of the same deltas as the chunks, so their texts are equal. A thought is sent under both of its names,
`reasoning_content` (DeepSeek) and `reasoning`. What no standard field has room for stands in `finish_details` of a
choice (how it ended exactly, who closed the thought, calls that could not be read) and `applied` of the reply.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from sputnik.engine.thinking import Finish
from sputnik.serve.generations import Job
from sputnik.serve.reading import Answer, Delta, Score, Speech, merged
from sputnik.serve.refusals import Refusal
from sputnik.text.tokenizer import Tokenizer

REASONS: Mapping[Finish, str] = {
    "stop": "stop",
    "stop while thinking": "stop",
    "length": "length",
    "length while thinking": "length",
    "loop": "length",
    "deadline": "insufficient_system_resource",
}


@dataclass(frozen=True)
class Head:
    """What all chunks of a reply have in common."""

    id: str
    model: str
    created: int
    fingerprint: str


@dataclass(frozen=True)
class Outcome:
    """How an answer stands, or has ended."""

    finish: str | None
    """None: it has not."""
    prompt: int
    cached: int
    written: int
    """Tokens, thought included."""
    thought: int
    called: bool
    stopped: str | None
    """The stop string that was found."""
    details: Mapping[str, Any]
    """How it ended exactly."""
    estimated: bool = False
    """Its tokens were not told, but guessed."""


class Flow(Protocol):
    """What comes of a request, piece by piece."""

    @property
    def done(self) -> bool: ...

    async def deltas(self) -> list[Delta]:
        """What has come since the last call, waited for; empty at the end. Raises Refusal."""

    def close(self) -> None: ...


class Spoken(Flow, Protocol):
    """One answer, of our engine or of another server."""

    def outcome(self) -> Outcome: ...

    def scored(self, scores: Sequence[Score]) -> list[dict[str, Any]]:
        """As clients read them."""


class Teller(Protocol):
    """How one dialect tells an answer."""

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """What comes of some of the deltas, as server-sent events."""

    def end(self) -> bytes:
        """The last of them."""

    def failed(self, refusal: Refusal) -> bytes:
        """The last of them, when it ends so."""

    def silence(self, text: str) -> bytes:
        """So that nobody takes the connection for dead."""

    def reply(self, deltas: Sequence[Delta]) -> bytes:
        """All of the deltas, as one JSON."""


class _Told:
    """What both kinds of reply share."""

    kind, chunk_kind = "", ""

    def __init__(self, head: Head, speech: Speech, job: Job, applied: Mapping[str, Any], usage: bool = False) -> None:
        self.head, self.speech, self.job, self.applied = head, speech, job, applied
        self._with_usage = usage
        self._begun: set[int] = set()

    def events(self, deltas: Sequence[Delta]) -> bytes:
        return b"".join(_event(self._chunk([self._choice(delta)], delta)) for delta in merged(deltas))

    def end(self) -> bytes:
        last = b""
        if self._with_usage:
            frame = self._frame(self.chunk_kind) | {"choices": [], "usage": usage(self.job)}
            last = _event(msgspec.json.encode(frame))
        return last + _event(b"[DONE]")

    def failed(self, refusal: Refusal) -> bytes:
        return _event(refusal.body())

    def silence(self, text: str) -> bytes:
        return f": {text}\n\n".encode()

    def reply(self, deltas: Sequence[Delta]) -> bytes:
        by_sample = {answer.sample: [d for d in deltas if d.sample == answer.sample] for answer in self.job.answers}
        choices = [self._whole(self._answer(sample), found) for sample, found in by_sample.items()]
        frame = self._frame(self.kind) | {"choices": choices, "usage": usage(self.job), "applied": self.applied}
        return msgspec.json.encode(frame)

    def _frame(self, kind: str) -> dict[str, Any]:
        head = self.head
        return {
            "id": head.id, "object": kind, "created": head.created, "model": head.model,
            "system_fingerprint": head.fingerprint,
        }  # fmt: skip

    def _chunk(self, choices: list[dict[str, Any]], delta: Delta) -> bytes:
        frame = self._frame(self.chunk_kind) | {"choices": choices}
        if self._with_usage:
            frame["usage"] = None
        if delta.finish is not None:
            frame["applied"] = self.applied
        return msgspec.json.encode(frame)

    def _answer(self, sample: int) -> Answer:
        return next(answer for answer in self.job.answers if answer.sample == sample)

    def _ending(self, answer: Answer) -> dict[str, Any]:
        """finish_reason and finish_details of a sample that has ended."""
        assert answer.finish is not None
        reason = REASONS.get(answer.finish, "stop")
        reason = "tool_calls" if answer.calls and reason == "stop" else reason
        return {"finish_reason": reason, "finish_details": finish_details(answer)}

    def _choice(self, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _whole(self, answer: Answer, deltas: Sequence[Delta]) -> dict[str, Any]:
        raise NotImplementedError


class ChatTeller(_Told):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, head: Head, speech: Speech, job: Job, applied: Mapping[str, Any], usage: bool = False) -> None:
        super().__init__(head, speech, job, applied, usage)
        self._calls: dict[int, int] = {}

    def _choice(self, delta: Delta) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if delta.sample not in self._begun:
            self._begun.add(delta.sample)
            told = {"role": "assistant", "content": None}
        if delta.text:
            told |= _channels(delta.channel, delta.text)
        if delta.call is not None:
            place = self._calls[delta.sample] = self._calls.get(delta.sample, -1) + 1
            told["tool_calls"] = [{"index": place} | self._call(delta, place)]
        found: dict[str, Any] = {"index": delta.sample, "delta": told}
        found["logprobs"] = self._scores(delta.scores) if delta.scores else None
        ended = self._ending(self._answer(delta.sample)) if delta.finish is not None else {"finish_reason": None}
        return found | ended

    def _whole(self, answer: Answer, deltas: Sequence[Delta]) -> dict[str, Any]:
        thought, text = (
            "".join(delta.text for delta in deltas if delta.channel == channel) for channel in ("thinking", "answer")
        )
        called = [delta for delta in deltas if delta.call is not None]
        calls = [self._call(delta, place) for place, delta in enumerate(called)]
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if thought:
            message |= _channels("thinking", thought)
        if calls:
            message["tool_calls"] = calls
        scores = [score for delta in deltas for score in delta.scores]
        found = {"index": answer.sample, "message": message}
        return found | {"logprobs": self._scores(scores) if scores else None} | self._ending(answer)

    def _call(self, delta: Delta, place: int) -> dict[str, Any]:
        assert delta.call is not None
        function = {"name": delta.call.name, "arguments": delta.call.arguments}
        name = f"call_{self.head.id.rpartition('-')[2]}_{delta.sample}_{place}"
        return {"id": name, "type": "function", "function": function}

    def _scores(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Of the answer under `content`, of the thought beside it, as DeepSeek has it."""
        return {
            name: told_scores(self.speech.tok, scores, channel)
            for name, channel in (("content", "answer"), ("reasoning_content", "thinking"))
        }


class CompletionTeller(_Told):
    kind = chunk_kind = "text_completion"

    def __init__(self, head: Head, speech: Speech, job: Job, applied: Mapping[str, Any], usage: bool = False) -> None:
        super().__init__(head, speech, job, applied, usage)
        self._offsets: dict[int, int] = {}

    def _choice(self, delta: Delta) -> dict[str, Any]:
        found: dict[str, Any] = {"index": delta.sample, "text": delta.text}
        found["logprobs"] = self._scores(delta.sample, delta.scores) if delta.scores else None
        ended = self._ending(self._answer(delta.sample)) if delta.finish is not None else {"finish_reason": None}
        return found | ended

    def _whole(self, answer: Answer, deltas: Sequence[Delta]) -> dict[str, Any]:
        scores = [score for delta in deltas for score in delta.scores]
        found = {"index": answer.sample, "text": "".join(delta.text for delta in deltas)}
        return found | {"logprobs": self._scores(answer.sample, scores) if scores else None} | self._ending(answer)

    def _scores(self, sample: int, scores: Sequence[Score]) -> dict[str, Any]:
        """OpenAI's older form; an offset is where the text of a token begins in the answer."""
        tok, at = self.speech.tok, self._offsets.get(sample, 0)
        texts, offsets = [tok.decode([score.id]) for score in scores], list[int]()
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[sample] = at
        tops = [{tok.decode([id]): logprob for id, logprob in score.top} for score in scores]
        logprobs = [score.logprob for score in scores]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def finish_details(answer: Answer) -> dict[str, Any]:
    """How it ended exactly."""
    details: dict[str, Any] = {"type": answer.finish}
    if answer.closed_by is not None:
        details["thought_closed_by"] = answer.closed_by
    if answer.stopped is not None:
        details["stop"] = answer.stopped
    if answer.broken:
        details["broken_calls"] = [{"text": each.text, "reason": each.reason} for each in answer.broken]
    return details


def told_scores(tok: Tokenizer, scores: Sequence[Score], channel: str) -> list[dict[str, Any]]:
    """Those of one channel, each with the likeliest tokens in its place."""

    def token(id: int, logprob: float) -> dict[str, Any]:
        found = tok.token_bytes([id])
        return {"token": found.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(found)}

    return [
        token(score.id, score.logprob) | {"top_logprobs": [token(id, logprob) for id, logprob in score.top]}
        for score in scores
        if score.channel == channel
    ]


def usage(job: Job) -> dict[str, Any]:
    """Tokens, counted here: prompts once, all samples of each."""
    prompt = sum(len(asked.prompt) for asked in job.asked)
    cached = sum(answer.cached for answer in job.leaders)
    thoughts, written = sum(answer.thought_tokens for answer in job.answers), job.produced
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": thoughts},
    }


def _channels(channel: str, text: str) -> dict[str, str]:
    return {"content": text} if channel == "answer" else {"reasoning_content": text, "reasoning": text}


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
