"""Plots as inline SVG: pure functions from numbers to a string, drawn by matplotlib without pyplot or a display.

Text stays text, so a reader can search and a browser uses the page's own font. Colours leave as CSS variables
(`var(--blue)`) named in `PALETTE`, so one plot serves light mode, dark mode and paper. Ids carry the plot's name, so
many plots live in one page. No title, no caption: those belong to the page, where they can wrap.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from sputnik.errors import MissingPackage

# role -> (light, dark). The light value is what matplotlib draws with and what is replaced by the variable afterwards.
PALETTE: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "paper": ("#fdfcf9", "#15171c"),
        "ink": ("#1d1f24", "#e8e6e1"),
        "muted": ("#63666e", "#a2a5ad"),
        "rule": ("#dedbd3", "#343842"),
        "blue": ("#2f55c8", "#8aa6ff"),
        "slate": ("#6b6c72", "#b4b6bd"),
        "green": ("#1f7849", "#5fc98f"),
        "red": ("#bd4128", "#f0876c"),
        "amber": ("#8f6208", "#e5b450"),
        "violet": ("#8451b5", "#bd92ea"),
        "teal": ("#14727c", "#5cc2cd"),
        "pink": ("#b83f79", "#ee86b5"),
    }
)
SMALL = (380.0, 216.0)
WIDE = (900.0, 330.0)
BANNER = (900.0, 250.0)
FEW = 30  # fewer points than this are shown one by one and not smoothed
POINTS = 260  # more points than this in one line are averaged in bins: nobody sees them and the page stays small


@dataclass(frozen=True)
class Line:
    """One series over steps. `smooth` draws the values pale and their moving mean strong."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    role: str = "blue"
    smooth: bool = True


@dataclass(frozen=True)
class Dots:
    """Measured points with 95 % intervals."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    role: str = "ink"


def color(role: str) -> str:
    """The light-mode colour of a role."""
    return PALETTE[role][0]


def curves(
    name: str,
    lines: Sequence[Line],
    dots: Sequence[Dots] = (),
    level: tuple[str, float] | None = None,
    *,
    unit: str = "",
    log: bool = False,
    x_label: str = "step",
    size: tuple[float, float] = SMALL,
) -> str:
    """Lines over steps, optional measured points, optional dashed level `(label, value)`. `unit` "%" means shares."""
    with _axes(name, size) as (figure, axes, out):
        for line in lines:
            x, y = thin(line.x, line.y)
            style: dict[str, Any] = {"color": color(line.role), "label": line.label, "linewidth": 1.8}
            if line.smooth and len(y) >= FEW:
                axes.plot(x, y, color=color(line.role), linewidth=0.8, alpha=0.28)
                axes.plot(x, moving_mean(y), **style)
            elif len(y) < FEW:
                axes.plot(x, y, **style, marker="o", markersize=3.6, clip_on=False)
            else:
                axes.plot(x, y, **style)
        for points in dots:
            spread = (np.subtract(points.y, points.low), np.subtract(points.high, points.y))
            style = {"fmt": "o", "clip_on": False, "markersize": 4.6, "elinewidth": 1.3, "capsize": 2.5}
            style |= {"markeredgewidth": 1.1, "color": color(points.role), "label": points.label, "zorder": 3}
            axes.errorbar(points.x, points.y, np.maximum(spread, 0), **style)
        if level:
            axes.axhline(level[1], label=level[0], linestyle=(0, (4, 3)), linewidth=1.1, color=color("muted"))
        if log:
            _logarithmic(axes)
        else:
            _linear(axes, unit, [value for line in lines for value in line.y] + [top for d in dots for top in d.high])
        _finish(figure, axes, x_label, legend=len(lines) + len(dots) + bool(level) > 1)
    return out[0]


def stacked(
    name: str,
    x: Sequence[float],
    bands: Mapping[str, Sequence[float]],
    roles: Mapping[str, str],
    *,
    unit: str = "",
    size: tuple[float, float] = SMALL,
) -> str:
    """Bands on top of each other over steps, the first at the bottom."""
    with _axes(name, size) as (figure, axes, out):
        heights = [thin(x, values, POINTS // 2)[1] for values in bands.values()]
        steps = thin(x, x, POINTS // 2)[1]
        fills = [color(roles[label]) for label in bands]
        axes.stackplot(steps, heights, labels=list(bands), colors=fills, alpha=0.82, linewidth=0)
        total = np.sum(heights, axis=0)
        axes.set_xlim(steps[0], steps[-1] if steps[-1] > steps[0] else steps[0] + 1)
        _linear(axes, unit, [0.0, float(total.max())])
        axes.set_ylim(0, float(total.max()) or 1.0)
        _finish(figure, axes, "step", legend=True)
    return out[0]


def heat(name: str, rows: Sequence[Sequence[float]], labels: Sequence[str], size: tuple[float, float] = SMALL) -> str:
    """Layers x experts: each cell is an expert's load over an even share. Blue is under 1, red over it, paper is 1.

    Strength is opacity of one hue, so an even load is the page's own background in both colour schemes.
    """
    loads = np.asarray(rows, dtype=float)
    with _axes(name, size) as (figure, axes, out):
        axes.pcolormesh(_tint(loads), edgecolors=color("paper"), linewidth=0.6, rasterized=loads.size > 4096)
        axes.invert_yaxis()
        every = max(1, len(labels) // 12)
        ticks = range(0, len(labels), every)
        axes.set_yticks([tick + 0.5 for tick in ticks], [labels[tick] for tick in ticks])
        stride = max(1, loads.shape[1] // 8)
        experts = range(0, loads.shape[1] - stride // 2 - 1, stride)  # the last place says "expert"
        axes.set_xticks([expert + 0.5 for expert in experts], [str(expert) for expert in experts])
        axes.grid(False)
        _finish(figure, axes, "expert", legend=False)
        axes.spines["bottom"].set_visible(False)
    return out[0]


def thin(x: Sequence[float], y: Sequence[float], limit: int = POINTS) -> tuple[Any, Any]:
    """Both series as arrays of at most `limit` values; longer ones as means of bins of equal size."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    size = -(-len(xs) // limit)
    if size <= 1:
        return xs, ys
    starts = np.arange(0, len(xs), size)
    counts = np.diff([*starts, len(xs)])
    return np.add.reduceat(xs, starts) / counts, np.add.reduceat(ys, starts) / counts


def moving_mean(y: Sequence[float]) -> Any:
    """Centred moving mean over about a twelfth of the series; the window shrinks at the ends instead of padding."""
    values = np.asarray(y, dtype=float)
    half = max(1, len(values) // 24)
    total = np.concatenate([[0.0], np.cumsum(values)])
    left = np.maximum(np.arange(len(values)) - half, 0)
    right = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[right] - total[left]) / (right - left)


def _tint(loads: Any) -> Any:
    """(layers, experts, 4) RGBA: a factor of two from an even share is full strength."""
    strength = np.clip(np.abs(np.log2(np.maximum(loads, 1e-3))), 0, 1)
    over, under = (np.array([int(color(role)[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for role in ("red", "blue"))
    tints = np.empty((*loads.shape, 4))
    tints[..., :3] = np.where((loads > 1)[..., None], over, under)
    tints[..., 3] = strength
    return tints


@contextmanager
def _axes(name: str, size: tuple[float, float]) -> Iterator[tuple[Any, Any, list[str]]]:
    """A figure of `size` points with our style; its SVG is appended to the list when the block ends."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackage("matplotlib", extra="dev") from None
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.size": 11,
        "axes.edgecolor": color("rule"),
        "text.color": color("ink"),
        "xtick.color": color("muted"),
        "ytick.color": color("muted"),
        "axes.labelcolor": color("muted"),
    }
    out: list[str] = []
    name = re.sub(r"[^\w-]", "-", name)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        yield figure, axes, out
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer)
        out.append(_inline(buffer.getvalue(), name, size))


def _linear(axes: Any, unit: str, values: Sequence[float], from_zero: bool = True) -> None:
    """Few round ticks from zero, so that noise does not look like change; shares are written in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    written = (lambda value, _: f"{100 * value:.3g} %") if unit == "%" else (lambda value, _: short(value))
    axes.yaxis.set_major_formatter(FuncFormatter(written))
    if from_zero and (unit == "%" or min(values, default=0.0) >= 0):
        axes.set_ylim(bottom=0, top=None if max(values, default=0.0) > 0 else 1)


def _logarithmic(axes: Any) -> None:
    """Powers of ten only, in plain characters."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = (math.log10(end) for end in axes.get_ylim())
    axes.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))


def power_of_ten(value: float) -> str:
    """0.0001 -> 10⁻⁴."""
    exponent = str(round(math.log10(value)))
    return "10" + exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def short(value: float) -> str:
    """Tick label: 1,500 -> 1.5k, 2,000,000 -> 2M, small numbers as they are."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.4g}"


def _finish(figure: Any, axes: Any, x_label: str, legend: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def step(value: float, _: int) -> str:
        low, high = axes.get_xlim()
        return short(value) if value < high - 0.1 * (high - low) else ""  # there the axis says what it counts

    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=10.5)
    axes.set_axisbelow(True)
    if x_label != "expert":
        axes.grid(axis="y", color=color("rule"), linewidth=0.7)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(step))
        axes.margins(x=0.015)
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate(x_label, (1, 0), (0, -3.5), **place, fontsize=10.5, color=color("muted"))
    rows = _legend(figure, axes) if legend else 0
    _place(figure, axes, rows)


def _legend(figure: Any, axes: Any) -> int:
    """Above the plot, in one row if it fits; returns the rows."""
    labels = axes.get_legend_handles_labels()[1]
    fits = sum(6 * len(label) + 26 for label in labels) < 72 * figure.get_size_inches()[0]
    columns = len(labels) if fits else 2
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 1), "ncols": columns}
    tight = {"borderpad": 0.0, "borderaxespad": 0.1, "handlelength": 1.1, "columnspacing": 1.4, "handletextpad": 0.5}
    figure.legend(**place, **tight, frameon=False, fontsize=10.5)
    return -(-len(labels) // columns)


def _place(figure: Any, axes: Any, legend_rows: int) -> None:
    """Margins that fit the labels; measuring every glyph, as matplotlib's layouts do, takes as long as drawing."""
    width, height = 72 * figure.get_size_inches()
    ticks = axes.yaxis.get_major_formatter().format_ticks(axes.get_yticks())
    left, right, bottom, top = 6.2 * max(map(len, ticks), default=0) + 7, 6, 19, 16 * legend_rows + 8
    axes.set_position((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def _inline(svg: str, name: str, size: tuple[float, float]) -> str:
    """matplotlib's SVG document -> an element of an HTML page: no metadata or global style, own ids, variables."""
    body = svg[svg.index("<svg") : svg.rindex("</svg>")]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="(?!legend)[^"]*"', "<g", body)
    body = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r"font: (?:\d+ )?([\d.]+px) [^;\"]+", r"font-size: \1", body)
    body = re.sub(r" font-family: [^;\"]+;| transform=\"rotate\(-0 [^)]*\)\"", "", body)
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), body)
    for role, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--{role})")
    body = "\n".join(filter(None, (row.strip() for row in body.splitlines())))
    return f'<svg viewBox="0 0 {size[0]:g} {size[1]:g}" aria-hidden="true" focusable="false">{body}</svg>'


# --- for the findings card -------------------------------------------------------------------------------------------


def pairs(name: str, labels: Sequence[str], seeds: Sequence[Sequence[float]], *, unit: str = "") -> str:
    """One line per seed from the value of each label to the next, and the mean of each label as a bar."""
    with _axes(name, SMALL) as (figure, axes, out):
        for values in seeds:
            axes.plot(range(len(labels)), values, color=color("slate"), linewidth=1.0, marker="o", markersize=4.2)
        for place in range(len(labels)):
            mean = float(np.mean([values[place] for values in seeds]))
            axes.plot([place - 0.12, place + 0.12], [mean, mean], color=color("blue"), linewidth=2.6)
        axes.set_xlim(-0.4, len(labels) - 0.6)
        _linear(axes, unit, [value for values in seeds for value in values], from_zero=False)
        _finish(figure, axes, "", legend=False)
        axes.set_xticks(range(len(labels)), labels, color=color("ink"))
    return out[0]


def bands(
    name: str,
    groups: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    *,
    x_label: str = "step",
    unit: str = "",
) -> str:
    """Label -> (x, y) of each seed: the mean over the seeds, within the range of all; many points are smoothed."""
    with _axes(name, SMALL) as (figure, axes, out):
        for (label, seeds), role in zip(groups.items(), ("slate", "blue", "green", "amber"), strict=False):
            length = min(len(x) for x, _ in seeds)
            drawn = [thin(x[:length], y[:length]) for x, y in seeds]
            x = np.mean([x for x, _ in drawn], axis=0)
            y = np.array([moving_mean(y) if len(y) >= FEW else y for _, y in drawn])
            axes.fill_between(x, y.min(0), y.max(0), color=color(role), alpha=0.18, linewidth=0)
            style = {"marker": "o", "markersize": 3.6} if len(x) < FEW else {}
            axes.plot(x, y.mean(0), color=color(role), linewidth=1.8, label=label, **style)
        _linear(axes, unit, [value for seeds in groups.values() for _, y in seeds for value in y], from_zero=False)
        _finish(figure, axes, x_label, legend=len(groups) > 1)
    return out[0]


def forest(name: str, rows: Sequence[tuple[str, str, float, float, float]]) -> str:
    """(label, role, low, mean, high) from top to bottom on one axis around 0, which is a dashed line."""
    with _axes(name, (900.0, 26.0 * len(rows) + 34)) as (figure, axes, out):
        for place, (_, role, low, mean, high) in enumerate(rows):
            axes.plot([low, high], [place, place], color=color(role), linewidth=2.2, solid_capstyle="butt")
            axes.plot([mean], [place], color=color(role), marker="o", markersize=5.5)
        axes.axvline(0, linestyle=(0, (4, 3)), linewidth=1.1, color=color("muted"))
        axes.set_xlim(-1.15, 1.15)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xticks([])
        axes.set_yticks(range(len(rows)), [row[0] for row in rows], color=color("ink"))
        axes.tick_params(length=0, labelsize=10.5)
        for side in axes.spines.values():
            side.set_visible(False)
        _place(figure, axes, 0)
    return out[0]


def standalone(svg: str) -> str:
    """A plot as a file of its own, to be shown as an image: it brings the colours of both schemes along."""
    light, dark = (";".join(f"--{role}:{each[i]}" for role, each in PALETTE.items()) for i in (0, 1))
    style = f"svg{{{light};font-family:system-ui,sans-serif}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
    head, rest = svg.split(">", 1)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    assert size is not None
    head = head.replace("<svg", f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[1]}" height="{size[2]}"')
    return f"{head}><style>{style}</style>{rest}\n"
