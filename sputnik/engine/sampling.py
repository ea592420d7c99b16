"""From logits to tokens for a batch whose rows ask for different things; pure tensor code.

    batch = SamplingBatch([Row(params, seed, prompt, written), ...], vocab_size, eos_ids)      # when the rows change
    drawn = sample(logits, batch, positions)                                                   # each step
    batch.observe(drawn.tokens)

Order: logit bias, penalties, minimum length, grammar mask, temperature, top-k, top-p, min-p. A draw is the token where
the sum of probabilities reaches one uniform number, a hash of the row's seed and the token's position: a row's token
depends on its own logits alone, bit for bit, whatever else is in the batch and wherever the row stands in it. For the
same reason speculative decoding needs no acceptance rule of its own: a drafted token is right if the draw equals it.

Left out: when to stop, and what to force (`thinking.py`).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from sputnik.engine.edits import Bias, MinTokens, Penalties, floats, ints, is_edited, is_penalised
from sputnik.engine.params import SamplingParams
from sputnik.model import kernels

BLOCK = 128
"""Tokens summed at a time: a draw finds first the block, then the token in it."""
CHUNK = 1 << 20
"""Logits worked on at a time on a CPU, so that what lies between two passes stays in the cache."""
GOLDEN = -7046029254386353131
MULTIPLIERS = (-4658895280553007687, -7723592293110705685)
"""Steele, Lea, Flood (2014), SplitMix64: its increment and multipliers, as signed numbers."""


@dataclass(frozen=True)
class Row:
    """A sequence as the sampler sees it. `prompt` and `written` (tokens so far) are read if penalties ask for them."""

    params: SamplingParams
    seed: int
    prompt: Sequence[int] = ()
    written: Sequence[int] = ()


@dataclass(frozen=True)
class Masks:
    """What grammars allow: row numbers (M,), and one bit a token (M, ceil(V / 32)) int32, lowest bit first."""

    rows: Tensor
    bits: Tensor

    def forbidden(self, vocab_size: int) -> Tensor:
        """(M, V) bool; tokens that the grammar's tokenizer does not have are forbidden."""
        bits = ~self.bits.cpu().numpy().view(numpy.uint8)
        known = torch.from_numpy(numpy.unpackbits(bits, axis=1, bitorder="little")).bool()
        return F.pad(known[:, :vocab_size], (0, max(0, vocab_size - known.shape[1])), value=True).to(self.bits.device)


@dataclass(frozen=True)
class Top:
    """The k likeliest tokens of the `rows` (T,) that asked for k: ids and log-probabilities (T, k)."""

    rows: Tensor
    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Drawn:
    """Tokens (R,) and their log-probabilities (R,); the latter None when all rows are greedy and none asked.

    A log-probability is that of the model's whole distribution at `temperature` (1 when greedy), before bias,
    penalties, masks and truncation: it is what the trainer recomputes. `sound` (R,) is false where the logits were not
    finite or nothing was allowed: that token is arbitrary and its request has failed; the other rows have not.
    """

    tokens: Tensor
    logprobs: Tensor | None
    sound: Tensor
    top: tuple[Top, ...] = ()

    def tops(self) -> dict[int, list[tuple[int, float]]]:
        """Row -> the likeliest tokens with their log-probabilities, where asked for."""
        return {
            row: list(zip(ids, logprobs, strict=True))
            for top in self.top
            for row, ids, logprobs in zip(top.rows.tolist(), top.ids.tolist(), top.logprobs.tolist(), strict=True)
        }


class SamplingBatch:
    """The parameters of R rows as tensors. Build it anew when the rows change; in between call `observe`.

    A batch that is not `penalised` holds no state, so a row of it may stand for any position of its sequence.
    """

    def __init__(
        self, rows: Sequence[Row], vocab_size: int, eos_ids: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        params = [row.params for row in rows]
        self.scored = any(each.logprobs is not None or each.best_of or not each.greedy for each in params)
        asked = {each.logprobs for each in params if each.logprobs}
        self.top = [(k, _index((each.logprobs == k for each in params), self.device)) for k in sorted(asked)]
        self.temperature = floats((each.temperature or 1.0 for each in params), self.device)[:, None]
        self.edited = _index(map(is_edited, params), self.device)
        self._bias = Bias(params, self.device)
        self._minimum = MinTokens(params, eos_ids, self.device)
        self._penalties = Penalties(rows, vocab_size, self.device) if any(map(is_penalised, params)) else None
        self.rows_at_once = max(1, CHUNK // vocab_size if self.device.type == "cpu" else len(rows))
        self._params = params
        self._streams = _mix(ints((row.seed for row in rows), self.device) + GOLDEN)
        self._native = _Native(params, self._streams) if self.device.type == "cpu" and kernels.load() else None

    @cached_property
    def _parts(self) -> list[tuple[slice, "_Part"]]:
        size = self.rows_at_once
        spans = [slice(start, start + size) for start in range(0, len(self._params), size)]
        return [(span, _Part(self._params[span], self.temperature[span], self._streams[span])) for span in spans]

    @property
    def penalised(self) -> bool:
        return self._penalties is not None

    @property
    def native(self) -> list[Tensor] | None:
        """What `sputnik::choose` needs besides logits and positions; None where it is not all there is to a draw."""
        if self._native is None or len(self.edited) or self.top:
            return None
        return [self._streams, self.temperature, self._native.greedy, *self._native.cuts]

    def observe(self, tokens: Tensor) -> None:
        """Count the tokens (R,) that the rows were really given."""
        if self._penalties is not None:
            self._penalties.count(tokens)

    def edit(self, logits: Tensor, positions: Tensor, masks: Masks | None = None) -> Tensor:
        """Logits after bias, penalties, minimum length and grammar: `logits` itself when no row has any."""
        if masks is None and len(self.edited) == 0:
            return logits
        scores = logits.clone()
        self._bias.apply(scores)
        if self._penalties is not None:
            self._penalties.apply(scores)
        self._minimum.apply(scores, positions)
        if masks is not None:
            for row, forbidden in zip(masks.rows.tolist(), masks.forbidden(scores.shape[1]), strict=True):
                scores[row].masked_fill_(forbidden, -torch.inf)
        return scores

    def choose(self, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (R,) by their edited logits, and the probability of each at its temperature; greedy: any finite value.

        Not finite means that the row's logits were not."""
        if self._native is not None:
            return self._native.choose(scores.contiguous(), positions, self.temperature, self.scored)
        if not self.scored:
            tokens = argmax(scores)
            return tokens, scores.gather(1, tokens[:, None])[:, 0]
        chosen = [part.choose(scores[span], positions[span]) for span, part in self._parts]
        return torch.cat([tokens for tokens, _ in chosen]), torch.cat([values for _, values in chosen])


def sample(
    logits: Tensor, batch: SamplingBatch, positions: Tensor, masks: Masks | None = None, forced: Tensor | None = None
) -> Drawn:
    """Draw one token a row from logits (R, V).

    `positions` (R,) counts the tokens generated before this one. `forced` (R,) overrules the draw where it is not
    negative; such a token's log-probability is the model's, however small.
    """
    logits = logits.float()
    scores = batch.edit(logits, positions, masks)
    tokens, values = batch.choose(scores, positions)
    sound = values.isfinite()
    if forced is not None:
        tokens = torch.where(forced < 0, tokens, forced)
    if not batch.scored:
        return Drawn(tokens, None, sound)
    logprobs = values.log()
    apart = [batch.edited, *(rows for _, rows in batch.top)]
    apart += [] if masks is None else [masks.rows]
    apart += [] if forced is None else [(forced >= 0).nonzero()[:, 0]]
    if any(map(len, apart)):  # rows whose probabilities are not the model's own
        for rows in torch.cat(apart).unique().split(batch.rows_at_once):
            own = (logits[rows] / batch.temperature[rows]).log_softmax(dim=-1)
            logprobs[rows] = own.gather(1, tokens[rows, None])[:, 0]
    top = [Top(rows, *_top(logits[rows] / batch.temperature[rows], k)) for k, rows in batch.top]
    return Drawn(tokens, logprobs, sound, tuple(top))


def score(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Top]:
    """Log-probabilities (T,) of given tokens under logits (T, V), and the k likeliest: for `prompt_logprobs`."""
    logprobs = logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(k, dim=-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0]
    return own, Top(torch.arange(len(tokens), device=tokens.device), ids, values)


def sample_seed(seed: int, index: int) -> int:
    """Seed of the `index`-th of n samples of one request; the first keeps the request's."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) if index else seed


def uniform(streams: Tensor, positions: Tensor, attempt: int = 0) -> Tensor:
    """A number in (0, 1], float64, for each stream and position: always the same one."""
    bits = _mix(streams ^ _mix(positions * GOLDEN + attempt))
    return (_shifted(bits, 11) + 1).double() * 2.0**-53


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (R,) where the running sum of weights (R, V) reaches `uniforms` (R,) of the total; never one of weight 0.

    Sums of 128 weights first, then the weights of one such block: the sums do not depend on the number of rows.
    """
    blocks = _blocks(weights, 0.0)
    reached = blocks.sum(dim=-1).double().cumsum(dim=-1)
    point = uniforms[:, None] * reached[:, -1:]
    block = torch.searchsorted(reached, point).clamp(max=reached.shape[1] - 1)
    before = F.pad(reached, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].double().cumsum(dim=-1)
    # The point is above `before`, so what is left is positive: the first sum to reach it was raised by a weight.
    token = torch.searchsorted(inside, torch.minimum(point - before, inside[:, -1:]))
    return (block * BLOCK + token)[:, 0].clamp(max=weights.shape[1] - 1)


def argmax(scores: Tensor) -> Tensor:
    """`scores.argmax(-1)`, the first of equals, at the speed of `amax`."""
    blocks = _blocks(scores, -torch.inf)
    block = blocks.amax(dim=-1).argmax(dim=-1)
    token = blocks[torch.arange(len(blocks), device=blocks.device), block].argmax(dim=-1)
    return (block * BLOCK + token).clamp(max=scores.shape[1] - 1)


class _Native:
    """All rows in one call of our C++ (model/kernels/choose.cpp); `_Part` is its twin."""

    def __init__(self, params: Sequence[SamplingParams], streams: Tensor) -> None:
        self.streams = streams
        self.greedy = torch.tensor([each.greedy for each in params], dtype=torch.bool)
        self.cuts = (
            ints((each.top_k for each in params), streams.device),
            torch.tensor([each.top_p if each.top_p < 1 else 2.0 for each in params], dtype=torch.float64),
            floats((each.min_p for each in params), streams.device),
        )

    def choose(self, scores: Tensor, positions: Tensor, temperature: Tensor, scored: bool) -> tuple[Tensor, Tensor]:
        tokens, values = torch.ops.sputnik.choose(
            scores, positions, self.streams, temperature, self.greedy, *self.cuts, scored
        )
        return tokens, values


class _Part:
    """Rows that are drawn together."""

    def __init__(self, params: Sequence[SamplingParams], temperature: Tensor, streams: Tensor) -> None:
        device = streams.device
        self.temperature = None if all(each.temperature in (0, 1) for each in params) else temperature
        self.streams = streams
        self.greedy = _index((each.greedy for each in params), device)
        self.cut = _index((_is_cut(each) for each in params), device)
        self.truncation = _Truncation([each for each in params if _is_cut(each)], streams[self.cut])

    def choose(self, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        scaled = scores if self.temperature is None else scores / self.temperature
        probabilities = scaled.softmax(dim=-1)
        tokens = draw(probabilities, uniform(self.streams, positions))
        if len(self.cut):
            whole = len(self.cut) == len(tokens)
            tokens[self.cut] = self.truncation.draw(
                probabilities if whole else probabilities[self.cut], positions[self.cut]
            )
        if len(self.greedy):
            tokens[self.greedy] = argmax(scores[self.greedy])
        return tokens, probabilities.gather(1, tokens[:, None])[:, 0]


class _Truncation:
    """Top-k, top-p, min-p without sorting. A token's fate depends on the tokens strictly likelier than it: equals stay
    or go together."""

    def __init__(self, params: Sequence[SamplingParams], streams: Tensor) -> None:
        device = streams.device
        self.streams = streams
        self.most = max((each.top_k for each in params), default=0)
        self.top_k = ints((each.top_k for each in params), device)[:, None]
        self.floor = any(each.min_p for each in params)
        self.min_p = floats((each.min_p for each in params), device)[:, None]
        self.top_p = torch.tensor([each.top_p for each in params], dtype=torch.float64, device=device)
        self.top_p[self.top_p == 1] = 2.0  # off: no rounding of the sum may cut the tail

    def draw(self, weights: Tensor, positions: Tensor) -> Tensor:
        """Draw from all that top-k and min-p leave, and again from what is likelier than a token outside top-p.

        That is the distribution within top-p: a round either hits it, with the right shares, or narrows to a set that
        still holds all of it. (FlashInfer's rejection sampling.)
        """
        if self.most:
            ranked = weights.topk(min(self.most, weights.shape[1]), dim=-1).values
            least = ranked.gather(1, (self.top_k - 1).clamp(0, ranked.shape[1] - 1))
            weights = weights.masked_fill((weights < least) & (self.top_k > 0), 0.0)
        limit = self.top_p * _total(weights)
        if self.floor:
            weights = weights.masked_fill(weights < self.min_p * weights.amax(dim=-1, keepdim=True), 0.0)
        tokens = torch.zeros_like(positions)
        open = torch.arange(len(weights), device=weights.device)
        attempt = 0
        while len(open):
            drawn = draw(weights, uniform(self.streams[open], positions[open], attempt))
            tokens[open] = drawn
            weights = weights.masked_fill(weights <= weights.gather(1, drawn[:, None]), 0.0)
            outside = (_total(weights) >= limit[open]).nonzero()[:, 0]
            open, weights = open[outside], weights[outside]
            attempt += 1
        return tokens


def _is_cut(params: SamplingParams) -> bool:
    return not params.greedy and bool(params.top_k or params.min_p or params.top_p < 1)


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = logits.log_softmax(dim=-1).topk(k, dim=-1)
    return ids, values


def _total(weights: Tensor) -> Tensor:
    return _blocks(weights, 0.0).sum(dim=-1).double().cumsum(dim=-1)[:, -1]


def _blocks(values: Tensor, filler: float) -> Tensor:
    """(R, V) as (R, ceil(V / 128), 128)."""
    missing = -values.shape[1] % BLOCK
    padded = F.pad(values, (0, missing), value=filler) if missing else values
    return padded.view(len(values), -1, BLOCK)


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of the state moves about half of the bits of the result."""
    state = (state ^ _shifted(state, 30)) * MULTIPLIERS[0]
    state = (state ^ _shifted(state, 27)) * MULTIPLIERS[1]
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, by: int) -> Tensor:
    """Shift of 64 unsigned bits to the right; torch's own copies the sign."""
    return (state >> by) & ((1 << (64 - by)) - 1)


def _index(chosen: Iterable[bool], device: torch.device) -> Tensor:
    return ints((n for n, yes in enumerate(chosen) if yes), device)
