"""The experiment as an image and a page: seconds on a log scale, by mode and model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlswitch.report.figures import COLORS, Spec, base, colored, png
from rlswitch.report.page import render

from .experiment import BASE, WAKE, Result
from .settings import RESTART, BenchSettings
from .tables import ARTICLE_SOURCE, SECONDS, mode_name, restart_seconds, summary

PARTS = {RESTART: "restart"} | {part: SECONDS[part] for part in WAKE}
PALETTE = {name: COLORS[i] for name, i in zip(PARTS.values(), (7, 0, 1, 2, 3), strict=True)}
TITLE = "Seconds until a model can answer: restart vs. wake-up"


@dataclass(frozen=True, slots=True)
class Bar:
    """One mode and model: median seconds of each part."""

    label: str
    parts: dict[str, float]
    note: str

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def bars(result: Result, settings: BenchSettings) -> list[Bar]:
    """A bar for every measured mode and model, restarts first."""
    spreads, found = summary(result.samples), []
    for transport in settings.transports:
        for mode in settings.modes:
            for model in "AB":
                key, restart = (BASE, transport, mode, model), restart_seconds(spreads, model, transport)
                parts = {PARTS[part]: spreads[*key, part].median for part in WAKE if (*key, part) in spreads}
                if mode == RESTART and (load := spreads.get((*key, "load"))):
                    parts = {PARTS[RESTART]: load.median}
                if not parts:
                    continue
                total = sum(parts.values())
                times = f"  {restart.median / total:,.0f}x" if restart and mode != RESTART else ""
                found.append(
                    Bar(f"{transport}, {mode_name(mode)}, {model}", parts, f"{_seconds(total)}{times}")
                )
    return found


def figure(found: Sequence[Bar], title: str) -> Spec:
    """Horizontal bars on a log scale; within a bar, colors divide its length by each part's share."""
    low = math.floor(math.log10(min(bar.seconds for bar in found)))
    high = math.ceil(math.log10(max(bar.seconds for bar in found)))
    rows: list[dict[str, object]] = []
    for bar in found:
        done, share = 0.0, math.log10(bar.seconds) - low
        for part, seconds in bar.parts.items():
            start, end = (10 ** (low + share * at / bar.seconds) for at in (done, done + seconds))
            rows.append({"label": bar.label, "series": part, "seconds": seconds, "start": start, "end": end})
            done += seconds
        rows.append({"label": bar.label, "note": bar.note, "end": bar.seconds})
    used = {part: part for part in PALETTE if any(part in bar.parts for bar in found)}
    powers = {"grid": True, "values": [10.0**power for power in range(low, high + 1)]}
    labels = {"labelExpr": "datum.value < 1 ? round(1000 * datum.value) + ' ms' : datum.value + ' s'"}
    seconds_scale = {"scale": {"type": "log", "domain": [10.0**low, 10.0**high]}, "axis": powers | labels}
    drawn = {
        "transform": [{"filter": "isValid(datum.series)"}],
        "mark": "bar",
        "encoding": {
            "x": {"field": "start", "type": "quantitative", "title": None} | seconds_scale,
            "x2": {"field": "end"},
            "color": colored(used, [PALETTE[part] for part in used]),
            "tooltip": [{"field": field} for field in ("label", "series", "seconds")],
        },
    }
    notes = {
        "transform": [{"filter": "isValid(datum.note)"}],
        "mark": {"type": "text", "align": "left", "dx": 6},
        "encoding": {"x": {"field": "end", "type": "quantitative"}, "text": {"field": "note"}},
    }
    rows_of = {
        "field": "label",
        "type": "nominal",
        "sort": None,
        "axis": {"labelLimit": 260, "labelFontSize": 12},
    }
    return base(title, rows, "seconds", {}) | {
        "height": {"step": 26},
        "encoding": {"y": rows_of},
        "layer": [drawn, notes],
    }


def write(result: Result, settings: BenchSettings, models: str, directory: Path) -> list[Path]:
    """Writes switch.png, and switch.html with the figure and its numbers; nothing if no mode was measured."""
    found = bars(result, settings)
    if not found:
        return []
    picture, page = directory / "switch.png", directory / "switch.html"
    how = f"{models}; log scale, colors show each part's share of its bar"
    drawn = figure(found, TITLE)
    picture.write_bytes(png(drawn | {"title": {"text": TITLE, "subtitle": how}}))
    cells = [
        [bar.label, *(f"{bar.parts[part]:.4f}" if part in bar.parts else "" for part in PALETTE), bar.note]
        for bar in found
    ]
    table = {"head": ["seconds, median", *PALETTE, "total"], "rows": cells, "text_columns": 1}
    sections = [
        {"title": "", "figures": [drawn], "wide": True},
        {"title": "Numbers", "figures": [], "table": table, "wide": True},
    ]
    facts = [how, f"For comparison: {ARTICLE_SOURCE}."]
    page.write_text(render({"title": "benchmark", "facts": facts, "sections": sections}), encoding="utf-8")
    return [picture, page]


def _seconds(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"
