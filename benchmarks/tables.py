"""Summaries of the measurements: JSON, and console tables next to the article's numbers."""

from __future__ import annotations

import datetime
import os
import platform
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch
from rich import box
from rich.table import Table

from rlswitch.records.provenance import git_state, versions
from rlswitch.switch.device import Device

from .experiment import BASE, Result, Sample
from .models import cpu_info
from .settings import RESTART, BenchSettings

GIB = 2**30
PRIVATE = ("model_a", "model_b", "output_dir")
"""Not published: paths on the user's machine. `models` has the names and sizes."""
SECONDS = {
    "load": "load",
    "warm_up": "warm-up",
    "fingerprint": "fingerprint, canary",
    "sleep": "sleep",
    "wake_weights": "wake weights",
    "reload": "reload",
    "wake_kv_cache": "wake KV cache",
    "reset_prefix_cache": "reset prefix cache",
    "wake": "wake-up, total",
    "verify": "proof",
    "first": "first inference",
    "later": "later inference",
    "close": "close",
    "total": "visit, total",
}
"""Quantities in seconds, in the order of a visit, with their labels."""
SIZES = {"asleep_host": "host RAM asleep", "asleep_device": "device memory asleep"}
ARTICLE = {
    (RESTART, "A"): {"load": 37.96, "first": 3.67},
    (RESTART, "B"): {"load": 58.12, "first": 6.30},
    ("1", "A"): {"wake": 0.26, "sleep": 0.093, "first": 0.43, "warm_up": 2.53},
    ("1", "B"): {"wake": 0.82, "sleep": 0.415, "first": 0.76, "warm_up": 5.95},
    ("2", "A"): {"wake": 0.847, "sleep": 0.113, "first": 0.53},
    ("2", "B"): {"wake": 2.583, "sleep": 0.455, "first": 0.76},
}
ARTICLE_SOURCE = (
    "Zero-Reload Model Switching with vLLM Sleep Mode (vLLM blog, 2025): vLLM 0.11.0, one A100,"
    " A = Qwen3-0.6B, B = Phi-3-vision-128k, events of its chart; outputs were not checked"
)


class Spread(NamedTuple):
    low: float
    median: float
    high: float
    visits: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(min(values), median(values), max(values), len(values))


Key = tuple[str, str, str, str, str]
"""(variant, transport, mode, model, what), as in Sample."""


def summary(samples: list[Sample]) -> dict[Key, Spread]:
    """Minimum, median, maximum and count of every quantity."""
    groups: dict[Key, list[float]] = defaultdict(list)
    for s in samples:
        groups[s.variant, s.transport, s.mode, s.model, s.what].append(s.value)
    return {key: Spread.of(values) for key, values in groups.items()}


def speed_up(result: Result, mode: str, model: str, transport: str = "local") -> float | None:
    """Speed-up of a wake-up at `mode` over a restart, by medians; None if not measured."""
    spreads = summary(result.samples)
    restart = restart_seconds(spreads, model, transport)
    wake = spreads.get((BASE, transport, mode, model, "wake"))
    return restart.median / wake.median if restart and wake else None


def restart_seconds(spreads: dict[Key, Spread], model: str, transport: str) -> Spread | None:
    """Seconds of a restart; for HTTP, of a local engine if no server restart was measured.

    The initial start of the sleeping engines does not count: it forks from a process with vLLM imported.
    """
    measured = (spreads.get((BASE, kind, RESTART, model, "load")) for kind in (transport, "local"))
    return next((spread for spread in measured if spread), None)


def document(
    result: Result, settings: BenchSettings, device: Device, paths: dict[str, str]
) -> dict[str, Any]:
    """The JSON document: results, hardware, versions and settings."""
    keys = ("variant", "transport", "mode", "model", "what")
    return {
        "benchmark": "switch",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": versions(),
        "git": git_state(),
        "settings": {key: value for key, value in asdict(settings).items() if key not in PRIVATE},
        "models": {label: model_facts(path) for label, path in paths.items()},
        "cache": {
            "page_cache": "warm: every checkpoint was read once before the first start",
            "prefix_cache": "reset before every question",
        },
        "outputs": {"differing": result.differing, "compared": "tokens of each answer, greedy"},
        "missing": result.missing,
        "summary": [
            dict(zip(keys, key, strict=True)) | spread._asdict()
            for key, spread in sorted(summary(result.samples).items())
        ],
        "samples": [asdict(sample) for sample in result.samples],
        "article": {"source": ARTICLE_SOURCE},
    }


def hardware(device: Device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": device.name,
        "cpu": cpu_info("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(psutil.virtual_memory().total / GIB, 1),
        "load_average_at_the_end": os.getloadavg()[0],
    }
    if device.kind == "cuda":
        facts |= {
            "gpus": torch.cuda.device_count(),
            "device_gib": round(device.total_bytes() / GIB, 1),
            "cuda": torch.version.cuda,
        }
    return facts


def model_facts(path: str) -> dict[str, Any]:
    """Name and size, without the path."""
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    return {"name": Path(path).name, "checkpoint_bytes": size}


def render(result: Result, settings: BenchSettings) -> Iterator[Table | str]:
    """The console tables, then what was not measured and which outputs differ."""
    spreads = summary(result.samples)
    for transport in settings.transports:
        yield _phases(spreads, BASE, transport)
    for variant in settings.ablations:
        if any(key[0] == variant for key in spreads):
            yield _phases(spreads, variant, "local")
    if table := _warm_up(spreads):
        yield table
    yield _article_table(result, spreads, settings)
    yield f"the article: {ARTICLE_SOURCE}"
    yield from (f"not measured: {what}: {why}" for what, why in result.missing.items())
    count = sum(s.what == "gap" for s in result.samples)
    gap = max((s.value for s in result.samples if s.what == "gap"), default=0.0)
    yield f"outputs: {count} answers match the reference; largest log-probability difference {gap:.2g}"
    yield from (f"outputs DIFFER: {where}" for where in result.differing)


def _phases(spreads: dict[Key, Spread], variant: str, transport: str) -> Table:
    """A row per quantity, a column per mode and model: median (minimum to maximum)."""
    title = f"seconds, {transport}" + ("" if variant == BASE else f", {variant}")
    table = Table(title=f"{title}: median (minimum to maximum)", box=box.SIMPLE, title_justify="left")
    found = {key[2:4] for key in spreads if key[:2] == (variant, transport)}
    columns = sorted(found, key=lambda it: (it[0] != "", it[0] != RESTART, it))
    table.add_column("")
    for mode, model in columns:
        table.add_column(f"{mode_name(mode)}\n{model}", justify="right")
    for what, name in (SECONDS | SIZES).items():
        cells = [spreads.get((variant, transport, *column, what)) for column in columns]
        if any(cells):
            table.add_row(name, *(_cell(cell, what in SIZES) for cell in cells))
    return table


def _article_table(result: Result, spreads: dict[Key, Spread], settings: BenchSettings) -> Table:
    table = Table(title="wake-up vs. restart", box=box.SIMPLE, title_justify="left")
    for heading in ("", "model", "seconds", "speed-up", "article, s", "article, speed-up"):
        table.add_column(heading, justify="left" if heading in ("", "model") else "right")
    for transport in settings.transports:
        for mode in settings.modes:
            what = "load" if mode == RESTART else "wake"
            for model in "AB":
                spread = spreads.get((BASE, transport, mode, model, what))
                theirs = ARTICLE.get((mode, model), {}).get(what)
                load = ARTICLE[RESTART, model]["load"]
                table.add_row(
                    f"{transport}, {mode_name(mode)}",
                    model,
                    f"{spread.median:.3f}" if spread else "-",
                    _times(speed_up(result, mode, model, transport)),
                    f"{theirs:.2f}" if theirs else "-",
                    _times(load / theirs if theirs and mode != RESTART else None),
                )
    return table


def _warm_up(spreads: dict[Key, Spread]) -> Table | None:
    """Engines with and without a warm-up before their first prompt."""
    table = Table(title="with and without warm-up, local", box=box.SIMPLE, title_justify="left")
    for heading in ("", "model", "load", "warm-up", "first inference", "later inference"):
        table.add_column(heading, justify="left" if heading in ("", "model") else "right")
    for name, mode in (("with", ""), ("without", RESTART)):
        for model in "AB":
            cells = [
                spreads.get((BASE, "local", mode, model, what))
                for what in ("load", "warm_up", "first", "later")
            ]
            if cells[0]:
                table.add_row(name, model, *(_cell(cell, False) for cell in cells))
    return table if table.row_count == 4 else None


def mode_name(mode: str) -> str:
    return {"": "start", RESTART: "restart", "kv": "kv only"}.get(mode, f"level {mode}")


def _cell(spread: Spread | None, is_size: bool) -> str:
    if spread is None:
        return ""
    low, middle, high = ((f"{value / GIB:.2f} GiB" if is_size else f"{value:.3f}") for value in spread[:3])
    return middle if spread.visits == 1 or is_size else f"{middle}\n({low} to {high})"


def _times(ratio: float | None) -> str:
    return f"{ratio:,.0f}x" if ratio else ""
