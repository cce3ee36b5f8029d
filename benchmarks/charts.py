"""The experiment as a picture: seconds on a logarithmic scale, for each mode and model."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from rlswitch.report_style import CSS

from .experiment import BASE, Result
from .settings import RESTART, BenchSettings
from .tables import ARTICLE_SOURCE, SECONDS, restart_of, summary

WIDTH, LEFT, RIGHT, TOP, ROW, FOOT = 1400, 300, 330, 110, 34, 60
PARTS = {
    "restart": "#67717e",
    "wake_weights": "#3568d4",
    "reload": "#d07f1e",
    "wake_kv_cache": "#3f9152",
    "reset_prefix_cache": "#9a5fb5",
}
INK, MUTED, RULE, PAPER = "#1b232d", "#67717e", "#e3e7ec", "#ffffff"


@dataclass(frozen=True, slots=True)
class Bar:
    """One mode and model: its parts in seconds, medians."""

    label: str
    parts: dict[str, float]
    note: str

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def bars(result: Result, settings: BenchSettings) -> list[Bar]:
    """A bar for every mode and model that was measured, restarts first."""
    spreads, found = summary(result.samples), []
    for transport in settings.transports:
        for mode in settings.modes:
            for model in "AB":
                key, restart = (BASE, transport, mode, model), restart_of(spreads, model, transport)
                names = tuple(PARTS)[1:]
                parts = {name: spreads[*key, name].median for name in names if (*key, name) in spreads}
                if mode == RESTART and (own := spreads.get((*key, "load"))):
                    parts = {"restart": own.median}
                if not parts:
                    continue
                total = sum(parts.values())
                times = f"  {restart.median / total:,.0f}x" if restart and mode != RESTART else ""
                what = "restart" if mode == RESTART else "kv only" if mode == "kv" else f"level {mode}"
                found.append(Bar(f"{transport}, {what}, {model}", parts, f"{_seconds(total)}{times}"))
    return found


def draw(found: list[Bar], title: str, subtitle: str) -> Image.Image:
    """Horizontal bars; a bar's length is the logarithm of its seconds, its colors are linear shares."""
    height = TOP + ROW * len(found) + FOOT
    image = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((24, 18), title, INK, _font(26))
    pen.text((24, 54), subtitle, MUTED, _font(16))
    low = 10.0 ** math.floor(math.log10(min(bar.seconds for bar in found)))
    high = 10.0 ** math.ceil(math.log10(max(bar.seconds for bar in found)))
    span = max(math.log10(high / low), 1.0)

    def place(seconds: float) -> float:
        return LEFT + math.log10(seconds / low) / span * (WIDTH - LEFT - RIGHT)

    for power in range(round(span) + 1):
        x = place(low * 10.0**power)
        pen.line((x, TOP - 8, x, height - FOOT), RULE, 2)
        pen.text((x, height - FOOT + 8), _seconds(low * 10.0**power), MUTED, _font(15), anchor="ma")
    for row, bar in enumerate(found):
        top = TOP + ROW * row
        pen.text((LEFT - 14, top + ROW / 2), bar.label, INK, _font(17), anchor="rm")
        x, end = float(LEFT), place(bar.seconds)
        for part, seconds in bar.parts.items():
            width = (end - LEFT) * seconds / bar.seconds
            pen.rectangle((x, top + 6, x + width, top + ROW - 6), PARTS[part])
            x += width
        pen.text((end + 10, top + ROW / 2), bar.note, INK, _font(17), anchor="lm")
    _legend(pen, found, height)
    return image


def write(result: Result, settings: BenchSettings, models: str, directory: Path) -> list[Path]:
    """switch.png, and switch.html with the picture and the numbers; nothing when nothing was measured."""
    found = bars(result, settings)
    if not found:
        return []
    title = "Seconds until a model can answer: a restart against a wake-up"
    image = draw(found, title, f"{models}; logarithmic scale, colors show each bar's shares")
    picture = directory / "switch.png"
    image.save(picture, optimize=True)
    encoded = io.BytesIO()
    image.save(encoded, "PNG", optimize=True)
    page = directory / "switch.html"
    page.write_text(_page(found, title, models, base64.b64encode(encoded.getvalue()).decode()))
    return [picture, page]


def _legend(pen: ImageDraw.ImageDraw, found: list[Bar], height: int) -> None:
    x = float(LEFT)
    for part, color in PARTS.items():
        if not any(part in bar.parts for bar in found):
            continue
        name = SECONDS.get(part, part)
        pen.rectangle((x, height - 24, x + 12, height - 12), color)
        pen.text((x + 18, height - 18), name, MUTED, _font(15), anchor="lm")
        x += 18 + pen.textlength(name, _font(15)) + 24


def _page(found: list[Bar], title: str, models: str, picture: str) -> str:
    rows = "".join(
        f"<tr><td>{escape(bar.label)}</td>"
        + "".join(f"<td>{bar.parts[part]:.4f}</td>" if part in bar.parts else "<td></td>" for part in PARTS)
        + f"<td>{escape(bar.note)}</td></tr>"
        for bar in found
    )
    heads = "".join(f"<th>{escape(SECONDS.get(part, part))}</th>" for part in PARTS)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{CSS} img {{ max-width: 100%; border-radius: 8px; }}</style><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(models)}</p></header>"
        f'<p><img alt="{escape(title)}" src="data:image/png;base64,{picture}"></p>'
        f'<div class="scroll"><table class="numbers"><tr><th>seconds, median</th>{heads}<th>in all</th></tr>'
        f"{rows}</table></div><p>For comparison: {escape(ARTICLE_SOURCE)}.</p></main></html>"
    )


def _seconds(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
