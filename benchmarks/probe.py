"""What works with one model, this vLLM and this device: a verdict for each sleep level and transport."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import rlswitch
from rlswitch.engines.engine import Engine
from rlswitch.engines.vllm.local import NO_KV_LEVEL, can_release_kv_cache
from rlswitch.errors import RLSwitchError
from rlswitch.records.provenance import versions
from rlswitch.switch.device import resident_bytes
from rlswitch.switch.switch import Switch
from rlswitch.text import first_line
from rlswitch.training.publish import choose_directory

from .models import made_on_the_spot
from .settings import SLEEPING, ProbeSettings
from .tables import hardware

SLACK = 16 * 2**20
"""Bytes by which an engine may be larger asleep in the last cycle than in the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One row: whether memory came back, outputs stayed, and nothing grew."""

    level: str
    transport: str
    """none: the engine goes back to its own checkpoint; disk or shm: a push goes through it."""
    works: bool
    why: str
    seconds: float | None = None
    """Median of a hand-over there and back, the proof included."""
    freed_bytes: int | None = None


def probe(settings: ProbeSettings) -> int:
    """Prints the verdicts and writes them as JSON."""
    console = Console(highlight=False, markup=False)
    with tempfile.TemporaryDirectory(prefix="rlswitch-probe-") as scratch:
        model = made_on_the_spot(settings.model, Path(scratch))
        options: dict[str, Any] = {
            "max_model_len": settings.max_model_len,
            "kv_cache_gib": settings.kv_cache_gib,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
        }
        cases = [*((level, "none") for level in SLEEPING), ("2", "disk"), ("2", "shm")]
        verdicts: list[Verdict] = []
        while len(verdicts) < len(cases):  # a failed engine is gone for good: the next row gets a new one
            with rlswitch.serve(model, **options) as (switch, restarting):
                for level, transport in cases[len(verdicts) :]:
                    console.print(f"level {level}, transport {transport}")
                    verdicts.append(judge(switch, restarting.engine, level, transport, settings))
                    if not verdicts[-1].works:
                        break
        device = switch.ledger.device
    table = Table(box=box.SIMPLE)
    for heading in ("level", "transport", "works", "seconds", "freed, MiB", ""):
        table.add_column(heading)
    for row in verdicts:
        seconds = f"{row.seconds:.3f}" if row.seconds is not None else ""
        freed = f"{row.freed_bytes / 2**20:,.0f}" if row.freed_bytes is not None else ""
        table.add_row(row.level, row.transport, "yes" if row.works else "NO", seconds, freed, row.why)
    console.print(table)
    facts: dict[str, Any] = {"model": Path(model).name, "hardware": hardware(device), "versions": versions()}
    facts |= {"settings": asdict(settings), "verdicts": [asdict(row) for row in verdicts]}
    output = Path(settings.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(facts, indent=1) + "\n")
    console.print(f"written: {output}")
    return 0


def judge(switch: Switch, engine: Engine, level: str, transport: str, settings: ProbeSettings) -> Verdict:
    """Cycles of sleep and wake-up, each proven and each with the same answer as before."""
    own = engine.base_weights
    assert own is not None
    if level == "kv" and not can_release_kv_cache():
        return Verdict(level=level, transport=transport, works=False, why=NO_KV_LEVEL)
    try:
        switch.give_to(engine)
        before, seconds, freed, asleep = answer(engine, settings), [], [], []
        engine.level = level
        for cycle in range(settings.cycles):
            awake, began = resident_bytes(engine.backend.pids), time.monotonic()
            switch.vacate()
            asleep.append(resident_bytes(engine.backend.pids))
            freed.append(awake - asleep[-1])
            if transport == "none":
                switch.give_to(engine)
            else:
                push_copy(switch, engine, transport, cycle + 1)
            seconds.append(time.monotonic() - began)
            if answer(engine, settings) != before:
                return Verdict(level=level, transport=transport, works=False, why="the answer changed")
    except RLSwitchError as error:
        return Verdict(level=level, transport=transport, works=False, why=first_line(error))
    finally:
        engine.base_weights, engine.level = own, "2"
    growth = asleep[-1] - asleep[0]
    why = f"asleep it grew by {growth / 2**20:.0f} MiB" if growth > SLACK else ""
    return Verdict(
        level=level,
        transport=transport,
        works=not why,
        why=why,
        seconds=median(seconds),
        freed_bytes=int(median(freed)),
    )


def push_copy(switch: Switch, engine: Engine, transport: str, version: int) -> None:
    """The engine's own checkpoint as a push of a new version, through a directory of its own."""
    own = engine.base_weights
    assert own is not None
    parent = choose_directory(transport, own.nbytes, Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix="rlswitch-probe-", dir=parent) as directory:
        path = Path(directory) / f"v{version}"
        shutil.copytree(own.path, path)
        engine.base_weights = None
        switch.give_to(engine, replace(own, version=version, path=path))
        engine.base_weights = own


def answer(engine: Engine, settings: ProbeSettings) -> list[str]:
    text = rlswitch.complete(engine, [settings.prompt], max_new_tokens=settings.max_new_tokens)
    engine.forget_prefixes()
    return text
