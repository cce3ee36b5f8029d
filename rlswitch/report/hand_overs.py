"""The report on the switch: what each phase of a hand-over costs, and who holds memory."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rlswitch.records.jsonl import finite
from rlswitch.report.figures import Point, Spec, lines

GIB = 2**30
LEAVING = ("offload", "publish", "sleep")
"""Phases of the tenant that gives the device away; the others belong to the one that takes it."""
RELEASING = ("offload", "sleep")
"""Of these, the ones that free memory."""
SAWTOOTH_STEPS = 6
HEAD = "hand-over|phase|times|median s|max s|share|MiB moved|GB/s|device free, GiB|resident, GiB".split("|")
Row = Mapping[str, Any]


def phase_table(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Seconds, bytes and memory of each phase, in the order in which they first occurred."""
    grouped: dict[tuple[str, str], list[Row]] = defaultdict(list)
    each: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        grouped[_way(row), str(row["phase"])].append(row)
        each[_way(row)][row["step"]] += _number(row, "seconds")
    total = sum(_number(row, "seconds") for row in rows) or 1.0
    cells, last = [], ""
    for (way, phase), group in grouped.items():
        seconds, moved = ([_number(row, key) for row in group] for key in ("seconds", "bytes"))
        is_moved = median(moved) > 0
        cells.append(
            [
                f"{way}\n{median(each[way].values()):.3f} s each" if way != last else "",
                phase,
                f"{len(group)}",
                f"{median(seconds):.3f}",
                f"{max(seconds):.3f}",
                f"{sum(seconds) / total:.1%}",
                f"{median(moved) / 2**20:,.1f}" if is_moved else "",
                f"{sum(moved) / (sum(seconds) or 1.0) / 1e9:.2f}" if is_moved else "",
                _before_after(group, "device_free"),
                _before_after(group, "resident"),
            ]
        )
        last = way
    return {"head": HEAD, "rows": cells, "text_columns": 2} if cells else None


def memory_figures(rows: Sequence[Row]) -> list[Spec]:
    """Memory of each tenant and free on the device, over the phases of the newest steps."""
    steps = sorted({row["step"] for row in rows})[-SAWTOOTH_STEPS:]
    resident: dict[str, list[Point]] = defaultdict(list)
    free: list[Point] = []
    left: dict[str, dict[float, float]] = defaultdict(dict)
    for i, row in enumerate(row for row in rows if row["step"] in steps):
        tenant = str(row.get("from" if row["phase"] in LEAVING else "to") or "")
        for x, when in ((i, "before"), (i + 0.5, "after")):
            if tenant and (held := _number(row, f"resident_{when}")):
                resident[tenant].append((x, held / GIB))
            if unused := _number(row, f"device_free_{when}"):
                free.append((x, unused / GIB))
    for row in rows:
        if row["phase"] in RELEASING and row.get("from") and (held := _number(row, "resident_after")):
            left[str(row["from"])][row["step"]] = held / GIB
    span = f"GiB, steps {steps[0]} to {steps[-1]}" if steps else ""
    after = {tenant: sorted(by_step.items()) for tenant, by_step in left.items()}
    return [
        *lines(f"Resident memory of each tenant, {span}", resident, x="phase", zero=True),
        *lines(f"Free on the device, {span}", {"free": free}, x="phase"),
        *lines("Resident memory after release, GiB; a line that climbs is a leak", after, zero=True),
    ]


def _way(row: Row) -> str:
    source, target = row.get("from"), row.get("to")
    return f"{source or 'nobody'} to {target or 'nobody'}" if source or target else "in between"


def _before_after(rows: Sequence[Row], key: str) -> str:
    before, after = (
        [value for row in rows if (value := _number(row, f"{key}_{when}"))] for when in ("before", "after")
    )
    return f"{median(before) / GIB:.2f} \u2192 {median(after) / GIB:.2f}" if before and after else ""


def _number(row: Row, key: str) -> float:
    return finite(row.get(key)) or 0.0
