"""The engine: requests in, tokens out, one step at a time. Knows ids only; text is the caller's (`llm.py`).

    engine = Engine(model, eos_ids=(1,), config=EngineConfig(cache_tokens=65_536))
    id = engine.add(Request(prompt_ids, SamplingParams(max_tokens=64, n=4)))
    while engine.busy:
        for event in engine.step():         # event.request, event.sample, event.ids, event.finish
            ...
    engine.abort(id)                        # at any time; its memory is free at once

A step: the scheduler plans, the runner computes, the sampler draws, controls decide what goes on. A request that fails
(logits not finite, a grammar that allows nothing) ends with finish "failed" and takes nobody with it. One thread calls
all of this. Left out: threads, sockets and text.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sputnik.engine.blocks import BlockPool
from sputnik.engine.config import EngineConfig, Tables, cache_blocks
from sputnik.engine.metrics import WEIGHT_BYTES, Metrics
from sputnik.engine.metrics import Work as StepWork
from sputnik.engine.runner import FlatBatch, make_runner
from sputnik.engine.sample import Event, Request, Sample, masks_of, positions_of
from sputnik.engine.sampling import Drawn, Row, SamplingBatch, sample, score
from sputnik.engine.scheduler import Scheduler
from sputnik.engine.sequence import Limits, Work
from sputnik.engine.sequence import Sequence as Tracked
from sputnik.engine.speculate import Speculation
from sputnik.engine.stride import STRIDE, Stride, may_stride
from sputnik.engine.thinking import Finish
from sputnik.errors import ConfigError, DataError
from sputnik.hardware import resolve_precision
from sputnik.model.transformer import Transformer


class Engine:
    def __init__(
        self,
        model: Transformer,
        eos_ids: Sequence[int],
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.eos_ids, self.clock = model, tuple(eos_ids), clock
        self.config = config = config or EngineConfig()
        self.device = model.lm_head.weight.device
        on_gpu = config.precision == "auto" and self.device.type == "cuda"  # the CPU's speed says nothing of it
        precision = "bf16" if on_gpu else resolve_precision(config.precision)
        blocks = cache_blocks(model.config, config, precision, self.device.type)
        pool = BlockPool(blocks, config.block_size)
        step = max(2048, config.max_running + config.chunk)
        self.scheduler = Scheduler(pool, Limits(step, config.max_running, config.chunk))
        self.runner = make_runner(model, blocks, config.block_size, precision, config.weights, config.exact)
        self.speculation: Speculation | None = None
        if config.guesses and len(model.mtp):
            self.speculation = Speculation(self.runner, len(model.mtp), config.guesses, config.adaptive)
        work = StepWork(model.config, WEIGHT_BYTES[config.weights or precision], 2 if precision == "bf16" else 4)
        self.metrics = Metrics(self.scheduler, work, self.speculation)
        self._numbers = itertools.count()
        self._requests: dict[int, list[Sample]] = {}
        self._samples: dict[int, Sample] = {}
        self._tables = Tables()
        self._rows: list[Sample] = []
        self._batch: SamplingBatch | None = None
        self._scoring = False
        """Whether any request ever asked for the log-probabilities of its prompt."""

    # --- requests ---

    def add(self, request: Request) -> int:
        """Queue a request; returns its number. Raises DataError or ConfigError for what can never be answered."""
        params, config = request.params, self.model.config
        params.check_vocabulary(config.vocab_size)
        if request.thought is None and params.steers_thought:
            raise ConfigError(
                "thinking_budget, answer_reserve and extend need a model with thoughts: this one has no such tags"
            )
        _check_prompt([*request.prompt, *request.written], config.vocab_size)
        if request.written and (params.samples > 1 or params.extend):
            raise ConfigError("written: only one sample at a time goes on, and none whose thoughts were drawn out")
        length = len(request.prompt) + params.max_tokens
        if length > config.max_position_embeddings:
            raise DataError(
                f"prompt of {len(request.prompt)} tokens + max_tokens {params.max_tokens} exceed the context of "
                f"{config.max_position_embeddings} tokens; shorten the prompt or lower max_tokens"
            )
        self._scoring |= params.prompt_logprobs is not None
        number = next(self._numbers)
        seed = params.seed if params.seed is not None else hash((self.config.seed, number))
        now = self.clock()
        samples = [
            Sample.of(request, number, index, next(self._numbers), seed, now, self.eos_ids)
            for index in range(params.samples)
        ]
        if self.config.record_routes:  # every token is to be computed for its own sample
            for each in samples:
                each.sequence.reuse = False
        self.scheduler.add(samples[0].sequence)
        self._requests[number] = samples
        self._samples[samples[0].sequence.id] = samples[0]
        return number

    def abort(self, request: int) -> bool:
        """End a request; False when it is not running (any more)."""
        samples = self._requests.pop(request, [])
        for each in samples:
            self.scheduler.abort(each.sequence.id)
            self._samples.pop(each.sequence.id, None)
        self.metrics.aborted += bool(samples)
        return bool(samples)

    def samples(self, request: int) -> list[Sample]:
        """Those of a request that is not done yet; they are filled as it goes on."""
        return self._requests[request]

    def end(self, each: Sample, finish: Finish) -> None:
        """End one sample for a reason that the engine does not know, say a stop string; no event tells of it.

        It may have ended by itself in the step that just was; then only the reason is changed."""
        if each.finish is None:
            self._finish(each, finish)
            self.metrics.finished += 1
        each.finish = finish

    def answer_now(self, request: int) -> None:
        """Close the thought of a request: its next tokens are the answer."""
        for each in self._requests.get(request, ()):
            each.answer_now()

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def refresh(self) -> None:
        """The model's weights have changed: pack them anew and forget what the cache holds."""
        self.scheduler.forget()
        self.runner.refresh()

    # --- one step ---

    def step(self, most: int = 1) -> list[Event]:
        """Compute one batch; what it brought, by request. Empty when there is nothing to do. `most`: tokens that it may
        bring of a sequence where they all only decode (stride.py); deadlines and newcomers wait for them."""
        started = self.clock()
        plan = self.scheduler.schedule(started)
        events = [self._finish(self._samples[sequence.id], "deadline") for sequence in plan.expired]
        self.runner.copy(plan.copies)
        if not plan.works:
            self.metrics.finished += len(events)
            return events
        guesses = self._may_stride(plan.works, most)
        if guesses is not None:
            return self._stride(plan.works, most, guesses, started, events)
        batch, wanted = self._flat(plan.works)
        hidden = self.runner.forward(batch)
        if self.config.record_routes:
            self._record(plan.works)
        for work in plan.works:
            self.scheduler.done(work)
        rows, places = self._drawers(plan.works, wanted)
        if self._scoring:
            self._score_prompts(plan.works, wanted, hidden)
        if rows:
            events += self._advance(rows, self._draw(rows, hidden[places]))
        if self.speculation is not None:
            self._guess(self.speculation, batch, plan.works, sum(len(event.ids) for event in events))
        context = sum(work.start + work.count for work in plan.works)
        self.metrics.step(self.clock() - started, len(batch.ids), context, events, self.clock())
        return events

    def _may_stride(self, works: Sequence[Work], most: int) -> int | None:
        """Guesses of each sequence in a stride; None: somebody must be asked what comes next, so an ordinary step."""
        if most == 1 or self._scoring or self.device.type != "cpu":
            return None
        guesses, speculation = works[0].sequence.drafts, self.speculation
        if speculation is not None and guesses < speculation.most and (guesses or speculation.guessing):
            return None
        if not may_stride(works, [self._samples[work.sequence.id] for work in works], guesses):
            return None
        return guesses if self.scheduler.reserve(works, most + guesses) else None

    def _stride(
        self, works: Sequence[Work], most: int, guesses: int, started: float, events: list[Event]
    ) -> list[Event]:
        """Some steps at once (stride.py); `events` with what they brought."""
        rows, size = [self._samples[work.sequence.id] for work in works], 1 + guesses
        guessed = list[tuple[Tracked, list[int]]]()
        draws = self._sampling([each for each in rows for _ in range(size)])
        drafting = self.speculation if guesses else None
        stride = Stride(self.runner, self._flat(works)[0], draws, rows, drafting, self.config.record_routes)
        drawn = stride.run(max(1, most // size))
        for row, (work, each) in enumerate(zip(works, rows, strict=True)):
            ids, failed = drawn.tokens[row], drawn.failed[row]
            if drawn.routes is not None:
                each.keep_routes(work.start, drawn.routes[row])
            ids = ids[:-1] if failed else ids
            logprobs: list[float] | list[None] = [None] * len(ids) if drawn.logprobs is None else drawn.logprobs[row]
            kept, finish = each.take_all(ids, logprobs)
            self.scheduler.strode(work, kept)
            if failed and finish is None and len(kept) == len(ids):
                finish = "failed"
            event = Event(each.request, each.index, kept, None, each)
            events.append(event if finish is None else self._finish(each, finish, kept))
            if finish is None and len(kept) == len(ids) and each.forced() is None:
                guessed.append((work.sequence, drawn.guesses[row]))
        now, computed = self.clock(), drawn.steps * len(rows) * size
        self.metrics.step(now - started, computed, drawn.context, events, now, drawn.steps)
        brought = sum(len(event.ids) for event in events)
        if self.speculation is not None and self.speculation.decide(len(rows), brought, now, drawn.steps):
            for sequence, own in guessed:
                self.scheduler.draft(sequence, own)
        return events

    def _record(self, works: Sequence[Work]) -> None:
        """Keep the experts of this step's tokens with their samples."""
        taken = self.runner.routes()
        if taken is None:
            return
        rows, at = taken.transpose(0, 1).to(torch.int16).numpy(), 0
        for work in works:
            self._samples[work.sequence.id].keep_routes(work.start, rows[at : at + work.count])
            at += work.count

    def _flat(self, works: Sequence[Work]) -> tuple[FlatBatch, list[range]]:
        """The batch, and for each work the rows of hidden states it asked for."""
        ids: list[int] = []
        starts, wanted, places = [0], list[int](), list[range]()
        for work in works:
            end = work.start + work.count
            ids += work.sequence.tokens[work.start : end]
            starts.append(len(ids))
            asked = 0
            if self._scoring and self._samples[work.sequence.id].wants_prompt(work.start):
                asked = work.count
            elif end == len(work.sequence.tokens):
                asked = 1 + work.sequence.drafts
            places.append(range(len(wanted), len(wanted) + asked))
            wanted += range(len(ids) - asked, len(ids))
        counts = np.diff(starts)
        offsets = np.repeat(np.array([work.start for work in works]) - starts[:-1], counts)
        positions = torch.from_numpy(np.arange(len(ids)) + offsets)
        tables = self._tables.of(works)
        asked_for = torch.tensor(wanted, dtype=torch.long)  # none, in the middle of a long prompt
        return FlatBatch(torch.tensor(ids), positions, torch.tensor(starts), tables, asked_for), places

    def _drawers(self, works: Sequence[Work], places: Sequence[range]) -> tuple[list[Sample], list[int]]:
        """Samples that draw now, with their rows of hidden states; a prompt just computed serves all its samples."""
        rows, at = list[Sample](), list[int]()
        for work, place in zip(works, places, strict=True):
            if not work.complete:
                continue
            leader = self._samples[work.sequence.id]
            group = [leader]
            if leader.index == 0 and not leader.written:
                group = self._requests[leader.request]
                for follower in group[1:]:
                    if follower.sequence.state == "new":
                        self._samples[follower.sequence.id] = follower
                        follower.routes = None if leader.routes is None else leader.routes.copy()
                        self.scheduler.fork(leader.sequence, follower.sequence)
                group = [leader, *(each for each in group[1:] if each.sequence.decoding and not each.written)]
            if len(group) == 1:  # a row for the last token and one for each guess after it
                group = group * len(place) if leader.sequence.drafts else group
                at += place[-len(group) :]
            else:
                at += [place[-1]] * len(group)
            rows += group
        return rows, at

    def _sampling(self, rows: list[Sample]) -> SamplingBatch:
        if rows != self._rows or self._batch is None:
            described = [Row(each.params, each.seed, each.prompt, each.written) for each in rows]
            self._batch = SamplingBatch(described, self.model.config.vocab_size, self.eos_ids, self.device)
            self._rows = rows
        return self._batch

    def _draw(self, rows: list[Sample], hidden: Tensor) -> Drawn:
        batch = self._sampling(rows)
        positions = torch.tensor(positions_of(rows), device=self.device)
        forced = [each.forced() for each in rows] if any(each.controlled for each in rows) else None
        drawn = sample(
            self.runner.head(hidden, keep=False),
            batch,
            positions,
            masks=masks_of(rows, self.device),
            forced=torch.tensor([-1 if id is None else id for id in forced], device=self.device) if forced else None,
        )
        batch.observe(drawn.tokens)
        return drawn

    def _advance(self, rows: Sequence[Sample], drawn: Drawn) -> list[Event]:
        events = []
        logprobs: list[float] | list[None] = [None] * len(rows) if drawn.logprobs is None else drawn.logprobs.tolist()
        tops = drawn.tops()
        sound = drawn.sound.tolist()
        tokens, place = drawn.tokens.tolist(), 0
        while place < len(rows):
            each = rows[place]
            guessed = each.sequence.tokens[-each.sequence.drafts :] if each.sequence.drafts else []
            end, told = place + 1 + len(guessed), list[int]()
            for at in range(place, end):
                id = each.instead(tokens[at])
                finish = each.take(id, logprobs[at], tops.get(at)) if sound[at] else "failed"
                if finish is not None:
                    events.append(self._finish(each, finish, [*told, id] if sound[at] else told))
                    break
                told.append(id)
                right = at - place < len(guessed) and guessed[at - place] == id and each.forced() is None
                if not right:
                    self._settle(each, len(guessed), at - place)
                    self.scheduler.append(each.sequence, id)
                    events.append(Event(each.request, each.index, told, None, each))
                    break
            place = end
        return events

    def _settle(self, each: Sample, guessed: int, right: int) -> None:
        if guessed:
            self.scheduler.rollback(each.sequence, guessed - right)
            assert self.speculation is not None
            self.speculation.judge(guessed, right)

    def _guess(self, speculation: Speculation, batch: FlatBatch, works: Sequence[Work], drawn: int) -> None:
        """Guess what comes next, for the next step to check; nothing where it has been measured not to pay."""
        if any(work.count > 1 + speculation.most for work in works):
            speculation.interrupted()
        elif not speculation.decide(len(works), drawn, self.clock()):
            return
        wanting = [self._may_guess(work) for work in works]
        for work, guesses in zip(works, speculation.propose(batch, works, wanting), strict=True):
            if guesses:
                self.scheduler.draft(work.sequence, guesses)

    def _may_guess(self, work: Work) -> bool:
        """Only where the draws of several places can be made at once: nothing that depends on what was just written."""
        each = self._samples.get(work.sequence.id)
        if each is None or work.sequence.state != "running" or not work.sequence.decoding:
            return False
        return each.guessable and each.forced() is None

    def _finish(self, each: Sample, finish: Finish, ids: Sequence[int] = ()) -> Event:
        each.finish = finish
        if each.sequence.state in ("waiting", "running"):
            self.scheduler.finish(each.sequence)
        del self._samples[each.sequence.id]
        if each.index == 0 and not each.written and finish != "stop":  # the others never started
            for other in self._requests[each.request][1:]:
                if other.sequence.state == "new":
                    other.finish = finish
        if all(other.finish for other in self._requests[each.request]):
            del self._requests[each.request]
        return Event(each.request, each.index, list(ids), finish, each)

    def _score_prompts(self, works: Sequence[Work], places: Sequence[range], hidden: Tensor) -> None:
        for work, place in zip(works, places, strict=True):
            each = self._samples.get(work.sequence.id)
            if each is None or not each.wants_prompt(work.start):
                continue
            done = len(each.prompt_logprobs)
            known = each.prompt[done + 1 : work.start + work.count + 1]
            if not known:
                continue
            first = place.start + done - work.start
            logits = self.runner.head(hidden[first : first + len(known)])
            own, top = score(logits, torch.tensor(known, device=self.device), each.params.prompt_logprobs or 0)
            each.prompt_logprobs += own.tolist()
            each.prompt_top += zip(top.ids.tolist(), top.logprobs.tolist(), strict=True)

    # --- conveniences ---

    def run(self, requests: Iterable[Request]) -> list[list[Sample]]:
        """Add all, step until they are done: the samples of each request, in order."""
        kept = []
        for request in requests:
            number = self.add(request)
            kept.append(self.samples(number))
        while self.busy:
            self.step(STRIDE)
        return kept


def _check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    if not prompt:
        raise DataError("a prompt is empty: render it with sputnik.text.chat, which starts every prompt with BOS")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        raise DataError(f"token {wrong} is not in the vocabulary of {vocab_size}: the prompt is of another tokenizer")
