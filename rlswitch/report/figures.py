"""Figures as Vega-Lite specifications: a page draws them in the browser, svg() and png() draw them here."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import vl_convert

from rlswitch.text import printable

Spec = dict[str, Any]
Point = tuple[float, float]

COLORS = "#4a7fe8 #dd8a25 #45a05c #a565c4 #2f9ba3 #d1504a #94822f #7d8896 #e377c2 #6b5b95".split()
MAX_POINTS, MAX_BARS = 1000, 200
"""Per curve and per chart: longer runs are averaged over neighboring steps."""
MAX_DOTS = 40
"""Points up to which each one is marked."""
THEME: Spec = json.loads(Path(__file__).with_name("theme.json").read_text())
"""Vega-Lite's `config`; a dark page sets other values for its parameters."""
ON_PAPER = {"background": "#ffffff", "padding": 14, "width": 640, "height": 240}
"""Of a figure in a file of its own; a page sets other values."""
SMALL = "datum.value && abs(datum.value) < 1e-3"
VALUES = {"labelExpr": f"{SMALL} ? format(datum.value, '~e') : datum.value ? datum.label : '0'"}
ROUND = "indexof([1, 2, 5], round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))) >= 0"
LOG_VALUES = {
    "labelExpr": f"!({ROUND}) ? '' : {SMALL} ? format(datum.value, '~e') : format(datum.value, '~g')",
    "gridOpacity": {"condition": {"test": ROUND, "value": 1}, "value": 0},
}
_STEPS = {"format": "~d", "tickMinStep": 1}
_X = {"type": "quantitative", "scale": {"zero": False, "nice": False}, "axis": _STEPS}
_Y = {"field": "y", "type": "quantitative"}
DRAG = (  # on a touch screen Vega finds the chart below a finger by touchstart alone
    "[pointerdown, window:pointerup] > window:pointermove!, [touchstart, window:touchend] > window:touchmove"
)
ZOOM = {"name": "zoom", "select": {"type": "interval", "encodings": ["x"], "on": DRAG}}
"""The dragged range; the page redraws its figures with these steps."""
SHOWN = {"name": "shown", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"}
HOVER = {
    "name": "hover",
    "select": {"type": "point", "fields": ["x"], "nearest": True, "on": "pointerover", "clear": "pointerout"},
}


def lines(
    title: str,
    curves: Mapping[str, Sequence[Point]],
    *,
    x: str = "step",
    log: bool = False,
    zero: bool = False,
    colors: Sequence[str] = COLORS,
) -> list[Spec]:
    """A figure with a line per curve of (x, y), ordered by x; none without points. `log`: values > 0 only."""
    kept = [thinned([(at, y) for at, y in points if y > 0 or not log]) for points in curves.values()]
    rows: dict[float, dict[str, float]] = {}
    for i, points in enumerate(kept):
        for at, y in points:
            rows.setdefault(at, {"x": at})[f"s{i}"] = y
    names = {f"s{i}": name for i, name in enumerate(curves) if kept[i]}
    if not names:
        return []
    scale = {"type": "log" if log else "linear", "zero": zero, "nice": not log}
    drawn = {
        "transform": [*_folded(names), {"filter": "isValid(datum.y)"}],
        "params": [ZOOM, SHOWN],
        "mark": {"type": "line", "point": {"size": 22} if len(rows) <= MAX_DOTS else False},
        "encoding": {
            "y": _Y | {"scale": scale, "axis": LOG_VALUES if log else VALUES},
            "color": colored(names, colors),
            "opacity": {"condition": {"param": "shown", "value": 1}, "value": 0.1},
        },
    }
    ruler = {
        "params": [HOVER],
        "mark": {"type": "rule", "color": {"expr": "muted"}, "tooltip": _tooltip(names, x)},
        "encoding": {"opacity": {"condition": {"param": "hover", "value": 0.6, "empty": False}, "value": 0}},
    }
    figure = base(title, [rows[at] for at in sorted(rows)], x, names)
    return [figure | {"encoding": {"x": _X | {"field": "x", "title": x}}, "layer": [drawn, ruler]}]


def stacked(title: str, bars: Sequence[tuple[float, Mapping[str, float]]], colors: Mapping[str, str]) -> Spec:
    """A bar per step, made of parts in the order of `colors`."""
    names = {f"s{i}": part for i, part in enumerate(colors) if any(part in values for _, values in bars)}
    size = max(math.ceil(len(bars) / MAX_BARS), 1)
    rows = []
    for start in range(0, len(bars), size):
        steps, parts = zip(*bars[start : start + size], strict=True)
        means = {key: fmean(values.get(name, 0.0) for values in parts) for key, name in names.items()}
        rows.append({"x": steps[0], "from": steps[0] - 0.5, "to": steps[-1] + 0.5} | means)
    drawn = {
        "transform": _folded(names),
        "params": [ZOOM],
        "mark": {"type": "bar", "binSpacing": 0.5, "tooltip": _tooltip(names, "step")},
        "encoding": {
            "x": _X | {"field": "from", "title": "step", "bin": {"binned": True}},
            "x2": {"field": "to"},
            "y": _Y | {"axis": VALUES},
            "color": colored(names, [colors[name] for name in names.values()]),
            "order": {"field": "key"},
        },
    }
    return base(title, rows, "step", names) | {"layer": [drawn]}


def svg(figure: Spec) -> str:
    return vl_convert.vegalite_to_svg(ON_PAPER | figure)


def png(figure: Spec) -> bytes:
    return vl_convert.vegalite_to_png(ON_PAPER | figure, scale=1.5)


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points, each the mean of its neighbors."""
    size = math.ceil(len(points) / limit) or 1
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(chunk[-1][0], fmean(y for _, y in chunk)) for chunk in chunks]


def base(title: str, rows: Sequence[Mapping[str, Any]], x: str, names: Mapping[str, str]) -> Spec:
    """The parts common to all figures: title, data, column names, and in `usermeta` what x is."""
    known = {"name": "names", "value": {key: printable(name) for key, name in names.items()}}
    return {
        "title": printable(title),
        "description": printable(title),
        "usermeta": {"x": x},
        "data": {"values": list(rows)},
        "params": [known],
        "config": THEME,
    }


def colored(names: Mapping[str, str], colors: Sequence[str]) -> Spec:
    """The encoding that colors the series `names`; one alone needs no legend."""
    labels = [printable(name) for name in names.values()]
    scale = {"domain": labels, "range": [colors[i % len(colors)] for i in range(len(labels))]}
    legend = {} if len(labels) > 1 else {"legend": None}
    return {"field": "series", "type": "nominal", "scale": scale} | legend


def _folded(names: Mapping[str, str]) -> list[Spec]:
    """A row per curve out of one row per x."""
    return [{"fold": list(names), "as": ["key", "y"]}, {"calculate": "names[datum.key]", "as": "series"}]


def _tooltip(names: Mapping[str, str], x: str) -> Spec:
    """The values of all curves at an x. For the nearest x Vega-Lite wraps the row in another `datum`."""
    row = "(datum.datum || datum)"
    texts = [f"{json.dumps(x)}: format({row}.x, '~g')"]
    for key, name in names.items():
        number = f"isValid({row}.{key}) ? format({row}.{key}, '.4~g') : '-'"
        texts.append(f"{json.dumps(printable(name))}: {number}")
    return {"expr": f"{{{', '.join(texts)}}}"}
