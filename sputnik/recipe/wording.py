"""Numbers and comparisons in words, as the report prints them. Pure functions; a missing number is an en dash."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, pvariance

NONE = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent(share: float | None, digits: int = 1) -> str:
    """0.1234 -> 12.3 %; a share under one percent gets one digit more."""
    if share is None:
        return NONE
    return f"{100 * share:.{digits + (digits > 0 and 0 < abs(share) < 0.01)}f}\u00a0%"


def duration(seconds: float | None) -> str:
    """Two significant units at most: 42 s, 12 min, 1 h 05 min, 3.2 days."""
    if seconds is None:
        return NONE
    if seconds < 90:
        return f"{seconds:.0f}\u00a0s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes}\u00a0min"
    if minutes < 48 * 60:
        return f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"
    return f"{seconds / 86400:.1f}\u00a0days"


def money(usd: float | None) -> str:
    """Below a dollar two digits that count ($0.0024), cents up to ten thousand, then whole dollars."""
    if usd is None:
        return NONE
    if 0 < usd < 1:
        return f"${usd:.{1 - math.floor(math.log10(usd))}f}"
    return f"${usd:,.2f}" if usd < 10_000 else f"${usd:,.0f}"


def count(number: float | None) -> str:
    """950, 9,400, 3.1 million, 2.5 billion, 14.8 trillion."""
    if number is None:
        return NONE
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(number) >= size:
            return f"{number / size:.3g}\u00a0{word}"
    return f"{number:,.0f}" if abs(number) >= 100 or number == int(number) else f"{number:.3g}"


def figure(number: float) -> str:
    """Three significant digits."""
    return f"{number:.3g}"


def power(number: float | None) -> str:
    """3.2e15 -> 3.2 × 10¹⁵, the usual form for floating-point operations."""
    if number is None:
        return NONE
    if number < 1e6:
        return count(number)
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}\u00a0×\u00a010{str(int(exponent)).translate(_SUPERSCRIPT)}"


def clip(text: str, limit: int) -> str:
    """At most `limit` characters, and the number of those left out."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def ends(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The first and the last tenth of a series: at least one value, at most twenty."""
    width = min(20, max(1, len(values) // 10))
    return values[:width], values[-width:]


def trend(values: Sequence[float], show: Callable[[float], str]) -> str:
    """ "rises from 3 % to 60 %", "falls from 2.1 to 0.4" or "stays near 1.0".

    The ends are means of `ends`; a change within a twentieth of the larger one, or within two standard errors of the
    difference, counts as none.
    """
    head, tail = ends(values)
    first, last = fmean(head), fmean(tail)
    error = math.sqrt((pvariance(head) + pvariance(tail)) / len(head))
    if abs(last - first) <= max(0.05 * max(abs(first), abs(last)), 2 * error):
        return f"stays near {show(last)}"
    return f"{'rises' if last > first else 'falls'} from {show(first)} to {show(last)}"
