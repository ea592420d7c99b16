"""What a request asks of the sampler: one frozen record, checked when it is built.

    SamplingParams(temperature=0.6, top_p=0.95, max_tokens=2048, thinking_budget=1024, answer_reserve=256)

The same record serves `LLM`, rollouts, evaluation and the service. A part of the package that does not implement a
field refuses it (`only`) instead of ignoring it. Left out: server ceilings (an n or a budget that is too dear).
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sputnik.errors import ConfigError

COLDEST, HOTTEST = 1e-4, 1e6
"""Logits divided by a temperature between 0 and COLDEST overflow; 0 itself is greedy. At HOTTEST draws are uniform."""
MOST = 1 << 14
"""Answers of one request."""
CONSTRAINTS = ("schema", "regex", "grammar")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to decode. Penalties as OpenAI's API (presence, frequency: generated tokens) and vLLM (repetition: all)."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    """Drops tokens less likely than this share of the likeliest."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    """Texts that end the answer; none of them is part of it."""
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int = 256
    min_tokens: int = 0
    """No end-of-text token and none of `stop_ids` before this many tokens."""
    seed: int | None = None
    """Fixes the draws of this request whatever else is in the batch; None: one is drawn."""
    n: int = 1
    best_of: int | None = None
    """Draw so many answers and keep the `n` of highest mean log-probability."""
    logprobs: int | None = None
    """0: of each chosen token; k: of the k likeliest too."""
    prompt_logprobs: int | None = None
    thinking_budget: int | None = None
    """Tokens a thought may have before it is closed; 0: closed at once; None: no limit of its own."""
    answer_reserve: int = 0
    """Tokens of `max_tokens` kept for the answer: a thought is closed when only these are left."""
    extend: int = 0
    """Times that the end of a thought is replaced by "Wait", so that the model thinks on."""
    break_loops: bool = False
    """Close a thought, or end an answer, that repeats itself."""
    schema: str | Mapping[str, Any] | None = None
    """JSON schema of the answer (thought excluded); at most one of `schema`, `regex`, `grammar` (Lark) is given."""
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name, kinds in _kinds().items():
            value = getattr(self, name)
            if not isinstance(value, kinds):
                wanted = getattr(kinds, "__name__", kinds)
                raise ConfigError(f"sampling: {name} = {value!r}: give {wanted}, not {type(value).__name__}")
        for wrong, rule in self._rules():
            if wrong:
                raise ConfigError(f"sampling: {rule}")

    def _rules(self) -> Iterable[tuple[bool, str]]:
        """(broken?, what is asked for); comparisons are written so that NaN breaks them."""
        t, biases = self.temperature, self.logit_bias.values()
        yield not (t == 0 or COLDEST <= t <= HOTTEST), f"temperature = {t}: 0 (greedy) or {COLDEST} to {HOTTEST:.0f}"
        yield not 0 < self.top_p <= 1, f"need 0 < top_p <= 1, got {self.top_p}"
        yield self.top_k < 0, f"top_k = {self.top_k}: a number of tokens, or 0 for all"
        yield not 0 <= self.min_p <= 1, f"need 0 <= min_p <= 1, got {self.min_p}"
        for name in ("presence_penalty", "frequency_penalty"):
            yield not -2 <= getattr(self, name) <= 2, f"need -2 <= {name} <= 2, got {getattr(self, name)}"
        penalty = self.repetition_penalty
        yield not 0 < penalty < math.inf, f"repetition_penalty = {penalty}: above 0, where 1 is none"
        ids = (*self.logit_bias, *self.stop_ids)
        yield not all(isinstance(id, int) and id >= 0 for id in ids), "token ids of logit_bias and stop_ids are >= 0"
        numbers = all(isinstance(bias, int | float) and -100 <= bias <= 100 for bias in biases)
        yield not numbers, "a logit_bias must lie between -100 and 100"
        texts = isinstance(self.stop, Sequence) and not isinstance(self.stop, str)
        yield (
            not texts or not all(isinstance(each, str) and each for each in self.stop),
            "stop: a tuple of texts, none of them empty",
        )
        yield self.max_tokens < 1, f"need max_tokens >= 1, got {self.max_tokens}"
        least = self.min_tokens
        yield not 0 <= least <= self.max_tokens, f"need 0 <= min_tokens <= max_tokens, got {least}, {self.max_tokens}"
        yield not 1 <= self.n <= MOST, f"need 1 <= n <= {MOST}, got {self.n}"
        best = self.n if self.best_of is None else self.best_of
        yield not self.n <= best <= MOST, f"best_of = {best} is less than n = {self.n}, or more than {MOST}"
        yield self.seed is not None and not -(2**63) <= self.seed < 2**63, f"seed = {self.seed} has more than 64 bits"
        for name in ("logprobs", "prompt_logprobs", "thinking_budget"):
            value = getattr(self, name)
            yield value is not None and value < 0, f"{name} = {value}: a number of tokens, or None"
        yield self.extend < 0, f"extend = {self.extend}: how often a thought shall go on, or 0"
        scored = self.logprobs is not None or self.presence_penalty or self.frequency_penalty or penalty != 1
        yield (
            bool(self.extend and scored),
            "extend puts tokens in the place of drawn ones: leave out logprobs and penalties, or extend",
        )
        reserve = self.answer_reserve
        yield (
            not 0 <= reserve < self.max_tokens,
            f"answer_reserve = {reserve} must be at least 0 and leave room in max_tokens = {self.max_tokens}",
        )
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        yield (
            bool(given and (self.ignore_eos or self.min_tokens)),
            (f"{given} says itself where the answer ends: leave out ignore_eos and min_tokens"),
        )
        yield len(given) > 1, f"give one of schema, regex and grammar, not {' and '.join(given)}"

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def samples(self) -> int:
        """Answers to draw, of which `n` are kept."""
        return self.best_of or self.n

    @property
    def steers_thought(self) -> bool:
        """Asks for something that only a model with thoughts can do."""
        return self.thinking_budget is not None or bool(self.answer_reserve or self.extend)

    @property
    def constrained(self) -> bool:
        return any(getattr(self, name) is not None for name in CONSTRAINTS)

    def ends(self, eos_ids: Iterable[int]) -> frozenset[int]:
        """Token ids that end the text."""
        return frozenset((*self.stop_ids, *(() if self.ignore_eos else eos_ids)))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise a ConfigError for token ids and counts that a vocabulary of this size does not have."""
        outside = sorted(id for id in (*self.logit_bias, *self.stop_ids) if id >= vocab_size)
        if outside:
            raise ConfigError(f"sampling: token {outside[0]} is not in the vocabulary of {vocab_size} tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise ConfigError(f"sampling: {name} = {getattr(self, name)} exceeds the vocabulary of {vocab_size}")

    def settings(self) -> dict[str, Any]:
        """What differs from the defaults, and the four that everyone asks for: the record beside a score."""
        always = ("temperature", "top_p", "max_tokens", "seed")
        return {name: getattr(self, name) for name in _fields() if name in always or self._is_set(name)}

    def only(self, known: Iterable[str], by: str) -> None:
        """Raise a ConfigError if a field outside `known` is set; `by` says what does not implement it."""
        unknown = [name for name in _fields() if name not in known and self._is_set(name)]
        if unknown:
            raise ConfigError(f"{by} does not implement {', '.join(unknown)}: leave it out, or use the engine")

    def _is_set(self, name: str) -> bool:
        default = _fields()[name]
        value = getattr(self, name)
        return bool(value) if default.default is dataclasses.MISSING else value != default.default


@cache
def _kinds() -> dict[str, Any]:
    """What each field but `stop` may be an instance of."""
    plain = {name: each.type for name, each in _fields().items() if each.type not in (float, tuple[str, ...])}
    floats = {name: int | float for name, each in _fields().items() if each.type is float}
    special = {"logit_bias": Mapping, "stop_ids": Collection, "schema": str | Mapping | None}
    return plain | floats | special


def _fields() -> dict[str, "dataclasses.Field[Any]"]:
    return {each.name: each for each in dataclasses.fields(SamplingParams)}
