"""Tests every sleep level and transport with one model, on this vLLM and this device."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
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
from rlswitch.switch.switch import Switch
from rlswitch.text import first_line
from rlswitch.training.publish import choose_directory

from .models import model_path
from .settings import SLEEPING, ProbeSettings
from .tables import hardware

SLACK = 16 * 2**20
"""Bytes by which a sleeping engine may grow from the first cycle to the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One row: whether memory was freed, outputs stayed the same, and nothing grew."""

    level: str
    transport: str
    """none: the engine reloads its own checkpoint; disk or shm: it receives a push that way."""
    works: bool
    why: str
    seconds: float | None = None
    """Median of a sleep and a wake-up, including the proof."""
    freed_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that an engine held during one cycle."""

    awake: int
    asleep: int

    @property
    def freed(self) -> int:
        return self.awake - self.asleep


def probe(settings: ProbeSettings) -> int:
    """Prints the verdicts and writes them to a JSON file."""
    console = Console(highlight=False, markup=False)
    with tempfile.TemporaryDirectory(prefix="rlswitch-probe-") as scratch:
        model = model_path(settings.model, Path(scratch))
        options: dict[str, Any] = {
            "max_model_len": settings.max_model_len,
            "kv_cache_gib": settings.kv_cache_gib,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
        }
        cases = [*((level, "none") for level in SLEEPING), ("2", "disk"), ("2", "shm")]
        verdicts: list[Verdict] = []
        while len(verdicts) < len(
            cases
        ):  # a failed engine cannot be reused: start a new one for the next row
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
    """Runs cycles of sleep and wake-up; each must be proven and give the same answer."""
    base_weights = engine.base_weights
    assert base_weights is not None
    if level == "kv" and not can_release_kv_cache():
        return Verdict(level=level, transport=transport, works=False, why=NO_KV_LEVEL)
    device = switch.ledger.device
    try:
        switch.give_to(engine)
        before, seconds, memory = answer(engine, settings), [], []
        engine.level = level
        for cycle in range(settings.cycles):
            awake, began = device.used_bytes(engine.backend.pids), time.monotonic()
            switch.vacate()
            memory.append(Memory(awake=awake, asleep=device.used_bytes(engine.backend.pids)))
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
        engine.base_weights, engine.level = base_weights, "2"
    why = memory_problem(level, memory)
    return Verdict(
        level=level,
        transport=transport,
        works=not why,
        why=why,
        seconds=median(seconds),
        freed_bytes=int(median(it.freed for it in memory)),
    )


def memory_problem(level: str, memory: Sequence[Memory]) -> str:
    """What is wrong with the memory figures at `level`; empty if nothing."""
    growth = memory[-1].asleep - memory[0].asleep
    if growth > SLACK:
        return f"grew by {growth / 2**20:.0f} MiB while asleep"
    if level != "0" and median(it.freed for it in memory) <= 0:
        return "holds as much memory asleep as awake"
    return ""


def push_copy(switch: Switch, engine: Engine, transport: str, version: int) -> None:
    """Pushes a copy of the engine's own checkpoint as a new version."""
    base_weights = engine.base_weights
    assert base_weights is not None
    parent = choose_directory(transport, base_weights.nbytes, Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix="rlswitch-probe-", dir=parent) as directory:
        path = Path(directory) / f"v{version}"
        shutil.copytree(base_weights.path, path)
        engine.base_weights = None
        switch.give_to(engine, replace(base_weights, version=version, path=path))
        engine.base_weights = base_weights


def answer(engine: Engine, settings: ProbeSettings) -> list[str]:
    text = rlswitch.complete(engine, [settings.prompt], max_new_tokens=settings.max_new_tokens)
    engine.forget_prefixes()
    return text
