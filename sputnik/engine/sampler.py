"""The simple batched sampler: one contiguous cache, one batch from the first token to the last.

    sampler = Sampler(model, eos_id=tokenizer.eos_id)
    groups = sampler.generate([prompt_ids], SamplingParams(max_tokens=64), n=8)

It is used by rollouts, evaluation and the terminal chat, and calls the same `Transformer` as the trainer, so that
both sides share one log-probability. Prompts are prefilled once per distinct question and their cache rows repeated
for the group. Finished rows leave the batch in bulk. What it leaves out on purpose: paging, prefix reuse across
calls, admission of new requests while a batch runs, and independence of a sample from the rest of its batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sputnik.errors import ConfigError, DataError
from sputnik.hardware import resolve_precision
from sputnik.model.cache import Cache
from sputnik.model.transformer import Transformer

Finish = Literal["stop", "length"]
COMPACT_BELOW = 0.75
"""Rebuild the batch when fewer than this share of its rows is still running: copying the cache costs about one step."""


@dataclass(frozen=True)
class SamplingParams:
    """How to decode. temperature 0 is greedy; `seed` fixes the draw for a given batch."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise ConfigError(
                f"sampling: need temperature >= 0, 0 < top_p <= 1, max_tokens >= 1; got {self.temperature}, "
                f"{self.top_p}, {self.max_tokens}"
            )


@dataclass(frozen=True)
class Generation:
    """One answer. `ids` ends with the stop token if finish is "stop"; `logprobs` are the policy's at `temperature`."""

    prompt: tuple[int, ...]
    ids: list[int]
    logprobs: list[float]
    finish: Finish


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[object]:
    """The numeric mode both sampler and trainer run in: "bf16" autocast, or plain "fp32"."""
    if precision not in ("bf16", "fp32"):
        raise ConfigError(f'precision must be "bf16" or "fp32", not {precision!r}')
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


class Sampler:
    """Draws answers from `model`, whose weights it shares: an optimiser step is visible in the next call."""

    def __init__(self, model: Transformer, eos_id: int, precision: str = "auto") -> None:
        self.model = model
        self.eos_id = eos_id
        self.precision = resolve_precision(precision)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1) -> list[list[Generation]]:
        """`n` answers to each prompt. Raises DataError when a prompt leaves no room for an answer in the context."""
        if not prompts:
            return []
        self._check(prompts, params)
        with autocast(self.precision):
            cache, logits = self._prefill(prompts, params)
            rows = torch.arange(len(prompts)).repeat_interleave(n)
            batch = _Batch(len(rows), params, self.eos_id)
            cache, logits = cache.select(rows), logits[rows]
            while batch.advance(logits):
                if batch.crowded_out():
                    cache = cache.select(batch.compact())
                logits = self.model(batch.last[:, None], cache=cache)[:, -1]
        done = batch.collect()
        return [[Generation(tuple(prompt), *done[i * n + j]) for j in range(n)] for i, prompt in enumerate(prompts)]

    @torch.no_grad()
    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """Token ids of one answer as they are drawn, the stop token included."""
        self._check([prompt], params)
        with autocast(self.precision):
            cache, logits = self._prefill([prompt], params)
        batch = _Batch(1, params, self.eos_id)
        while batch.advance(logits):
            yield int(batch.last)
            with autocast(self.precision):
                logits = self.model(batch.last[:, None], cache=cache)[:, -1]
        yield batch.collect()[0][0][-1]

    def _check(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        longest, limit = max(map(len, prompts)), self.model.config.max_position_embeddings
        if min(map(len, prompts)) == 0:
            raise DataError("a prompt is empty: render it with sputnik.text.chat, which starts every prompt with BOS")
        if longest + params.max_tokens > limit:
            raise DataError(
                f"prompt of {longest} tokens + max_tokens {params.max_tokens} exceed the context of {limit} tokens; "
                "shorten the prompt or lower max_tokens"
            )

    def _prefill(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> tuple[Cache, Tensor]:
        """Run all prompts, right-padded, and return the cache and the logits (B, V) after each one's last token."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        cache = Cache.empty(self.model.config, len(prompts), ids.shape[1] + params.max_tokens, dtype)
        trunk = self.model.trunk(ids, cache=cache, lengths=lengths)
        return cache, self.model.head(trunk.hidden[torch.arange(len(prompts)), lengths - 1])


class _Batch:
    """The running rows: what was drawn so far and which rows are finished. Row order is that of the cache."""

    def __init__(self, rows: int, params: SamplingParams, eos_id: int) -> None:
        self.params = params
        self.stops = torch.tensor(sorted({eos_id, *params.stop_ids}))
        self.noise = torch.Generator().manual_seed(params.seed)
        self.last = torch.zeros(rows, dtype=torch.long)
        self.running = torch.arange(rows)
        """Original row number of each row in the batch."""
        self.alive = torch.ones(rows, dtype=torch.bool)
        self.tokens = torch.zeros(rows, params.max_tokens, dtype=torch.long)
        self.logprobs = torch.zeros(rows, params.max_tokens)
        self.lengths = torch.zeros(rows, dtype=torch.long)
        self.stopped = torch.zeros(rows, dtype=torch.bool)
        self.step = 0

    def advance(self, logits: Tensor) -> bool:
        """Draw one token for each row from `logits` (rows, V); False when nothing is left to draw."""
        self.last, logprobs = draw(logits, self.params, self.noise)
        live = self.running[self.alive]
        self.tokens[live, self.step] = self.last[self.alive]
        self.logprobs[live, self.step] = logprobs[self.alive]
        self.lengths[live] += 1
        ended = self.alive & torch.isin(self.last, self.stops)
        self.stopped[self.running[ended]] = True
        self.alive &= ~ended
        self.step += 1
        return self.step < self.params.max_tokens and bool(self.alive.any())

    def crowded_out(self) -> bool:
        return float(self.alive.float().mean()) < COMPACT_BELOW

    def compact(self) -> Tensor:
        """Drop finished rows; returns the rows to keep, for the cache."""
        keep = self.alive.nonzero().flatten()
        self.running, self.last, self.alive = self.running[keep], self.last[keep], self.alive[keep]
        return keep

    def collect(self) -> list[tuple[list[int], list[float], Finish]]:
        return [
            (self.tokens[row, :length].tolist(), self.logprobs[row, :length].tolist(), "stop" if stopped else "length")
            for row, (length, stopped) in enumerate(zip(self.lengths.tolist(), self.stopped.tolist(), strict=True))
        ]


def draw(logits: Tensor, params: SamplingParams, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample (rows,) token ids from (rows, V) logits and return them with their log-probabilities.

    The log-probability is that of the whole distribution at `temperature` (1 when greedy), before top-p: it is what
    the trainer recomputes. Sampling is argmax of p / Exponential(1), the Gumbel trick without the logarithms.
    """
    scores = logits.float()
    if params.temperature not in (0.0, 1.0):
        scores = scores / params.temperature
    logprobs = scores.log_softmax(dim=-1)
    if params.temperature == 0:
        chosen = logprobs.argmax(dim=-1)
    else:
        weights = logprobs.exp() if params.top_p == 1 else nucleus(logprobs.exp(), params.top_p)
        race = torch.empty_like(weights).exponential_(generator=noise)
        chosen = (weights / race).argmax(dim=-1)
    return chosen, logprobs.gather(-1, chosen[:, None]).squeeze(-1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of tokens whose probability reaches `top_p`; the likeliest token always stays."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return probabilities.masked_fill(outside.scatter(-1, order, outside), 0.0)
