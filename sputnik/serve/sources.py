"""Where the answers of a dialect come from: a chat request in, an answer under way out. Ours is here.

    prepared = await source.prepare(request, lambda: as_chat(body))     # Refusal with the reason
    spoken = prepared.open()                                         # it waits for its turn, then runs
    while deltas := await spoken.deltas(): ...
    spoken.outcome()                                                 # at any time: how it stands

The other one is `upstreams/lifted.py`: the same over any server that speaks chat completions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request

from sputnik.serve.answering import called, reading
from sputnik.serve.fields import ChatRequest
from sputnik.serve.generations import Job
from sputnik.serve.reading import Delta, Score, Speech
from sputnik.serve.service import Service
from sputnik.serve.telling import Outcome, Spoken, finish_details, told_scores


@dataclass(frozen=True)
class Prepared:
    applied: dict[str, Any]
    open: Callable[[], Spoken]


class Source(Protocol):
    @property
    def fingerprint(self) -> str: ...

    async def prepare(self, request: Request, chat: Callable[[], ChatRequest]) -> Prepared: ...

    async def count(self, request: Request, chat: Callable[[], ChatRequest]) -> int:
        """Tokens of the prompt."""


class OwnEngine:
    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def fingerprint(self) -> str:
        return f"fp_{self._service.fingerprint}"

    async def prepare(self, request: Request, chat: Callable[[], ChatRequest]) -> Prepared:
        call, asking = called(self._service, request)
        asked, applied = await reading(call, lambda: asking.chat(chat(), call.identity))

        def begin() -> Spoken:
            assert call.ticket is not None
            name = (call.identity.id, call.id)
            return Ours(self._service.open(name, call.ticket, [asked], call.seconds), asking.speech)

        return Prepared(applied, begin)

    async def count(self, request: Request, chat: Callable[[], ChatRequest]) -> int:
        call, asking = called(self._service, request)
        with self._service.counting(call.identity):
            return await reading(call, lambda: asking.count(chat()))


class Ours:
    """A job with one answer."""

    def __init__(self, job: Job, speech: Speech) -> None:
        self._job, self._speech = job, speech

    @property
    def done(self) -> bool:
        return self._job.done

    async def deltas(self) -> list[Delta]:
        return await self._job.deltas()

    def close(self) -> None:
        self._job.close()

    def outcome(self) -> Outcome:
        (asked,), (answer,) = self._job.asked, self._job.answers
        return Outcome(
            answer.finish, len(asked.prompt), answer.cached, len(answer.ids), answer.thought_tokens,
            bool(answer.calls), answer.stopped, finish_details(answer),
        )  # fmt: skip

    def scored(self, scores: Sequence[Score]) -> list[dict[str, Any]]:
        return told_scores(self._speech.tok, scores, "answer")
