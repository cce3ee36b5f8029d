"""The report on the switch: what each phase of a hand-over costs, and who holds memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlswitch.charts import Series, chart_grid, line_chart
from rlswitch.text import printable

GIB = 2**30
LEAVING = ("offload", "publish", "sleep")
"""Phases of the tenant that lets go of the device; the others belong to the one that takes it."""
RELEASING = ("offload", "sleep")
"""Of these, the ones that give memory back."""
SAWTOOTH_STEPS = 6


def switch_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Table and charts of the rows of switch.jsonl; nothing when there are none."""
    return _phase_table(rows) + chart_grid(_memory_charts(rows)) if rows else ""


def _phase_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds, bytes and memory of each phase, in the order in which they first occurred."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((_way(row), str(row["phase"])), []).append(row)
    total = sum(_number(row, "seconds") for row in rows) or 1.0
    head = (
        "<tr><th>hand-over</th><th>phase</th><th>times</th><th>median s</th><th>max s</th>"
        "<th>share of switching</th><th>MiB moved</th><th>GB/s</th><th>device free, GiB</th>"
        "<th>resident, GiB</th></tr>"
    )
    lines, last, each = [], "", _median_seconds(rows)
    for (way, phase), group in grouped.items():
        seconds = [_number(row, "seconds") for row in group]
        moved = statistics.median(_number(row, "bytes") for row in group)
        rate = sum(_number(row, "bytes") for row in group) / (sum(seconds) or 1.0)
        cells = [
            escape(printable(way)) + f"<small>{each[way]:.3f} s each</small>" if way != last else "",
            escape(printable(phase)),
            str(len(group)),
            f"{statistics.median(seconds):.3f}",
            f"{max(seconds):.3f}",
            f"{sum(seconds) / total:.1%}",
            f"{moved / 2**20:,.1f}" if moved else "",
            f"{rate / 1e9:.2f}" if moved else "",
            _before_after(group, "device_free"),
            _before_after(group, "resident"),
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        last = way
    return f'<div class="scroll"><table class="numbers wide">{head}{"".join(lines)}</table></div>'


def _way(row: Mapping[str, Any]) -> str:
    source, target = row.get("from"), row.get("to")
    return f"{source or 'nobody'} to {target or 'nobody'}" if source or target else "in between"


def _median_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a whole hand-over takes, by its direction: all of a step's phases together."""
    steps: dict[str, dict[int, float]] = {}
    for row in rows:
        sums = steps.setdefault(_way(row), {})
        sums[row["step"]] = sums.get(row["step"], 0.0) + _number(row, "seconds")
    return {way: statistics.median(sums.values()) for way, sums in steps.items()}


def _before_after(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    before, after = (
        [value for row in rows if (value := _number(row, f"{key}_{when}"))] for when in ("before", "after")
    )
    if not before or not after:
        return ""
    return f"{statistics.median(before) / GIB:.2f} &rarr; {statistics.median(after) / GIB:.2f}"


def _memory_charts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Memory over the phases of the newest steps: who held how much, and what was left."""
    steps = sorted({row["step"] for row in rows})[-SAWTOOTH_STEPS:]
    resident: dict[str, list[tuple[float, float]]] = {}
    free: list[tuple[float, float]] = []
    for i, row in enumerate(row for row in rows if row["step"] in steps):
        tenant = str(row.get("from" if row["phase"] in LEAVING else "to") or "")
        for x, when in ((i, "before"), (i + 1, "after")):
            if tenant and (held := _number(row, f"resident_{when}")):
                resident.setdefault(tenant, []).append((x, held / GIB))
            if left := _number(row, f"device_free_{when}"):
                free.append((x, left / GIB))
    span = f"GiB, phase by phase, steps {steps[0]} to {steps[-1]}"
    title = "Resident memory after letting go"
    return [
        line_chart("Resident memory of each tenant", _named(resident), note=span, x_name="phase", zero=True),
        line_chart("Free on the device", [Series("free", free)], note=span, x_name="phase"),
        line_chart(title, _named(_left_behind(rows)), note="GiB; a line that climbs is a leak", zero=True),
    ]


def _left_behind(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """By tenant and step: what its processes still held when it had given the device away."""
    held: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["phase"] in RELEASING and row.get("from") and _number(row, "resident_after"):
            by_step = held.setdefault(str(row["from"]), {})
            by_step[row["step"]] = _number(row, "resident_after") / GIB
    return {tenant: sorted(by_step.items()) for tenant, by_step in held.items()}


def _named(curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[Series]:
    return [Series(name, points, f"c{i % 5}") for i, (name, points) in enumerate(curves.items())]


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
