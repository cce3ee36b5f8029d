"""Small charts as inline SVG, without scripts; colors are CSS classes, for light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from rlswitch.text import printable

WIDTH, HEIGHT = 560, 210
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 8, 24
MAX_POINTS, MAX_BARS = 240, 110
LEGEND_COLUMNS = 4
COLORS = "#3568d4 #d07f1e #3f9152 #9a5fb5 #2f949b #c2413b #7a6a2b #67717e #e377c2 #17202a".split()
STANDALONE_CSS = (
    "text{font-family:system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
    ".rule{stroke:#e3e7ec}.tick{fill:#67717e;font-size:11px}.title{fill:#1b232d;font-size:13px;font-weight:600}"
    ".line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}"
    ".dots{fill:#ffffff;stroke-width:1.8}"
    + "".join(f".c{i}{{stroke:{color}}}" for i, color in enumerate(COLORS))
)

Point = tuple[float, float]


@dataclass(slots=True)
class Series:
    """One line of a chart; `css` names its color."""

    name: str
    points: Sequence[Point]
    css: str = "c0"
    faint: bool = False
    dots: bool = False


@dataclass(slots=True)
class Axes:
    """Where numbers land on the paper."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False

    def at_x(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        low, high = (_log(v) for v in self.y) if self.log else self.y
        value = _log(value) if self.log else value
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    x_name: str = "step",
    log: bool = False,
    zero: bool = False,
) -> str:
    """Lines over steps; with `log`, values that are not positive are left out."""
    series = [s for s in (_drawable(s, log) for s in series) if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + ([0.0] if zero else [])
    axes = Axes((min(xs), max(xs)), _padded(min(ys), max(ys), log), log)
    body = _grid(axes) + "".join(_line(s, axes) for s in series) + _tooltips(series, axes, x_name)
    legend = [(s.name, s.css) for s in series if not s.faint]
    return _figure(title, body, legend if len(legend) > 1 else [], note)


def standalone_chart(title: str, series: Sequence[Series], *, x_name: str) -> str:
    """Lines over steps as an SVG file of its own: light, with its style, its legend and a white page."""
    series = [s for s in series if s.points]
    xs, ys = ([point[i] for s in series for point in s.points] for i in (0, 1))
    axes = Axes((min(xs), max(xs)), _padded(min(ys), max(ys), False))
    keys, rows = [], 0
    for i, s in enumerate(series):
        column, rows = i % LEGEND_COLUMNS, i // LEGEND_COLUMNS + 1
        x, y = LEFT + column * (WIDTH - LEFT) / LEGEND_COLUMNS, HEIGHT + 14 + 18 * (rows - 1)
        keys.append(
            f'<line class="line {s.css}" x1="{x:.0f}" x2="{x + 16:.0f}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{x + 22:.0f}" y="{y + 4}">{_text(s.name)}</text>'
        )
    height = HEIGHT + 26 + 18 * rows
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -22 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}" role="img" aria-label="{_text(title)}"><style>{STANDALONE_CSS}</style>'
        f'<rect x="0" y="-22" width="{WIDTH}" height="{height}" fill="#ffffff"/>'
        f'<text class="title" x="{LEFT}" y="-6">{_text(title)}</text>'
        f'<text class="tick" text-anchor="end" x="{WIDTH - RIGHT}" y="-6">by {_text(x_name)}</text>'
        f"{_grid(axes)}{''.join(_line(s, axes) for s in series)}{''.join(keys)}</svg>\n"
    )


def stacked_chart(
    title: str, bars: Sequence[tuple[float, Mapping[str, float]]], parts: Sequence[str], note: str
) -> str:
    """A bar per step, made of its parts; neighbors are averaged where there are too many."""
    bars = _averaged(bars, parts)
    if not bars:
        return ""
    step = bars[1][0] - bars[0][0] if len(bars) > 1 else 1
    top = max(sum(values.values()) for _, values in bars) or 1.0
    axes = Axes((bars[0][0] - step / 2, bars[-1][0] + step / 2), (0.0, top * 1.05))
    width = max((WIDTH - LEFT - RIGHT) / len(bars) * 0.86, 0.8)
    body = _grid(axes) + "".join(_bar(x, values, parts, axes, width) for x, values in bars)
    used = [part for part in parts if any(values.get(part) for _, values in bars)]
    return _figure(title, body, [(part, f"p-{part}") for part in used], note)


def chart_grid(charts: Sequence[str]) -> str:
    """The charts that have something to show, side by side where there is room."""
    drawn = "".join(chart for chart in charts if chart)
    return f'<div class="grid">{drawn}</div>' if drawn else ""


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers between `low` and `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers; twos and fives too where those are few."""
    powers = range(math.floor(_log(low)), math.ceil(_log(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        ticks = [m * 10.0**p for p in powers for m in factors if low <= m * 10.0**p <= high]
        if len(ticks) >= 3:
            break
    return ticks


def smoothed(points: Sequence[Point]) -> list[Point]:
    """A running mean over a tenth of the curve, to lay over a noisy one."""
    reach = max(len(points) // 20, 1)
    windows = [points[max(i - reach, 0) : i + reach + 1] for i in range(len(points))]
    return [
        (x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)
    ]


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points, each the mean of its neighbors."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(c[-1][0], sum(y for _, y in c) / len(c)) for c in chunks]


def short_number(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:,.4g}"
    return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")


def _drawable(series: Series, log: bool) -> Series:
    points = [(x, y) for x, y in series.points if y > 0 or not log]
    return Series(series.name, thinned(points), series.css, series.faint, series.dots)


def _averaged(
    bars: Sequence[tuple[float, Mapping[str, float]]], parts: Sequence[str]
) -> list[tuple[float, dict[str, float]]]:
    size = max(math.ceil(len(bars) / MAX_BARS), 1)
    chunks = [bars[i : i + size] for i in range(0, len(bars), size)]
    return [
        (chunk[0][0], {p: sum(v.get(p, 0.0) for _, v in chunk) / len(chunk) for p in parts})
        for chunk in chunks
    ]


def _text(text: str) -> str:
    return escape(printable(text, keep_newlines=True))


def _log(value: float) -> float:
    return math.log10(value)


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """A little air above and below; a flat line gets some to lie in."""
    if log:
        return low / 1.5, high * 1.5
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    floor = low - air
    return (0.0 if low >= 0 > floor else floor), high + air


def _grid(axes: Axes) -> str:
    ticks = log_ticks(*axes.y) if axes.log else nice_ticks(*axes.y)
    lines = [
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y + 3.5:.1f}">{label}</text>'
        for y, label in ((axes.at_y(t), short_number(t)) for t in ticks)
    ]
    lines += [
        f'<text class="tick" text-anchor="middle" x="{axes.at_x(t):.1f}" y="{HEIGHT - 7}">'
        f"{short_number(t)}</text>"
        for t in nice_ticks(*axes.x, 6)
        if t == int(t)
    ]
    return "".join(lines)


def _line(series: Series, axes: Axes) -> str:
    places = [(axes.at_x(x), axes.at_y(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    css = f"line {series.css}" + (" faint" if series.faint else "")
    drawn = f'<polyline class="{css}" points="{path}"/>'
    if series.dots or len(places) == 1:
        dots = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places)
        drawn += f'<g class="dots {series.css}">{"".join(dots)}</g>'
    return drawn


def _tooltips(series: Sequence[Series], axes: Axes, x_name: str) -> str:
    """A strip over each step that names its values when the mouse rests there."""
    texts: dict[float, list[str]] = {}
    for s in series:
        for x, y in s.points:
            texts.setdefault(x, [f"{x_name} {short_number(x)}"]).append(f"{s.name} {short_number(y)}")
    width = (WIDTH - LEFT - RIGHT) / max(len(texts), 1)
    return "".join(
        f'<rect class="hit" x="{axes.at_x(x) - width / 2:.1f}" y="{TOP}" width="{width:.1f}"'
        f' height="{HEIGHT - TOP - BOTTOM}"><title>{_text(chr(10).join(lines))}</title></rect>'
        for x, lines in sorted(texts.items())
    )


def _bar(x: float, values: Mapping[str, float], parts: Sequence[str], axes: Axes, width: float) -> str:
    pieces, below = [], 0.0
    for part in parts:
        value = values.get(part, 0.0)
        if value > 0:
            top, bottom = axes.at_y(below + value), axes.at_y(below)
            pieces.append(
                f'<rect class="p-{part}" x="{axes.at_x(x) - width / 2:.1f}" y="{top:.2f}"'
                f' width="{width:.1f}" height="{bottom - top:.2f}"/>'
            )
            below += value
    listed = "\n".join(f"{part} {short_number(v)} s" for part, v in values.items() if v > 0)
    return f"<g>{''.join(pieces)}<title>{escape(f'step {x:g}' + chr(10) + listed)}</title></g>"


def _figure(title: str, body: str, legend: Sequence[tuple[str, str]], note: str) -> str:
    keys = "".join(f'<span class="key {css}">{_text(name)}</span>' for name, css in legend)
    noted = f'<span class="note">{_text(note)}</span>' if note else ""
    return (
        f"<figure><figcaption><b>{_text(title)}</b>{noted}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(title)}">{body}</svg>'
        f'<div class="legend">{keys}</div></figure>'
    )
