"""What tokens cost: a table in TOML (`prices.toml` is the one that ships), and the arithmetic in whole millionths.

    table = load_prices(path)                       # None: the one that ships
    price = table.price("deepseek-chat", sent)      # that of the moment at which the request was sent
    price.cost(Tokens(hit=64, miss=36, output=20))  # millionths of the currency

A request's cost is rounded once, half up, to a millionth. Left out: several currencies in one table.
"""

import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime, time
from decimal import Decimal
from pathlib import Path

import msgspec

from sputnik.errors import ConfigError

MILLION = 1_000_000
ANY = "*"


class Tokens(msgspec.Struct, frozen=True):
    """Of one request, over all of its prompts and answers."""

    hit: int = 0
    """Of the prompt, found in the cache."""
    miss: int = 0
    """Of the prompt, computed."""
    output: int = 0
    reasoning: int = 0
    """Of the output."""


class Price(msgspec.Struct, frozen=True):
    """Millionths of the currency for a million tokens."""

    hit: int
    miss: int
    output: int

    def cost(self, tokens: Tokens) -> int:
        exact = tokens.hit * self.hit + tokens.miss * self.miss + tokens.output * self.output
        return (exact + MILLION // 2) // MILLION

    def most(self, prompt: int, output: int) -> int:
        """The upper limit of a request's cost before anything is known of the cache."""
        exact = prompt * max(self.hit, self.miss) + output * self.output
        return -(-exact // MILLION)


class OffPeak(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    start: time = msgspec.field(name="from")
    end: time = msgspec.field(name="to")
    """UTC, both; before `start`: on the next day."""
    factor: Decimal

    def holds(self, at: time) -> bool:
        if self.start <= self.end:
            return self.start <= at < self.end
        return at >= self.start or at < self.end


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    models: list[str]
    hit: Decimal
    miss: Decimal
    output: Decimal
    since: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    off_peak: list[OffPeak] = []

    def price(self, at: time) -> Price:
        factor = next((each.factor for each in self.off_peak if each.holds(at)), Decimal(1))
        hit, miss, output = (round(value * factor * MILLION) for value in (self.hit, self.miss, self.output))
        return Price(hit, miss, output)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    price: list[Entry]
    currency: str = "USD"


@dataclass(frozen=True)
class PriceTable:
    currency: str
    entries: list[Entry]

    def price(self, model: str, sent: float) -> Price:
        """`sent`: seconds since 1970. A model without an entry costs what `*` does; without that one, nothing."""
        now = datetime.fromtimestamp(sent, UTC)
        begun = [entry for entry in self.entries if entry.since <= now]
        for name in (model, ANY):
            found = [entry for entry in begun if name in entry.models]
            if found:
                return max(reversed(found), key=lambda entry: entry.since).price(now.time())
        return Price(0, 0, 0)


def load_prices(path: Path | None = None) -> PriceTable:
    """ConfigError: unreadable, or not a table of prices."""
    path = path or Path(__file__).with_name("prices.toml")
    try:
        found = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal), _File)
    except OSError as error:
        raise ConfigError(f"--prices {path}: {error.strerror}") from None
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"--prices {path}: {error}") from None
    for place, entry in enumerate(found.price):
        if entry.since.tzinfo is None:
            raise ConfigError(f"--prices {path}: price {place + 1}: `since` needs a zone, as in 2025-01-20T00:00:00Z")
        for value in (entry.hit, entry.miss, entry.output, *(each.factor for each in entry.off_peak)):
            if not value.is_finite() or value < 0:
                raise ConfigError(f"--prices {path}: price {place + 1}: {value} is no price")
    return PriceTable(found.currency, found.price)


def money(amount: int) -> str:
    """Millionths as a decimal with two to six places: 1500000 -> 1.50."""
    sign, whole, rest = "-" if amount < 0 else "", *divmod(abs(amount), MILLION)
    digits = f"{rest:06d}".rstrip("0")
    return f"{sign}{whole}.{digits:0<2}"
