"""The one clock: seconds, bytes and memory of every phase, in switch.jsonl, trace.json and the metrics.

trace.json opens in chrome://tracing or Perfetto. The format does not need the closing bracket, so a killed
run leaves a readable trace.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlswitch.records.jsonl import LineFile, replacing, trim
from rlswitch.switch.device import Device, resident_bytes

SWITCH = "switch.jsonl"

SWITCH_PHASES = (
    "restart",
    "offload",
    "publish",
    "wake_weights",
    "reload",
    "verify",
    "wake_kv_cache",
    "reset_prefix_cache",
    "sleep",
    "onload",
)
WORK_PHASES = ("rollout", "reward", "prepare", "update", "evaluation", "checkpoint")


@dataclass(slots=True)
class Phase:
    """A running phase."""

    bytes: int = 0
    """How many it moved; set inside the `with` block."""


class Ledger:
    """Times every phase of a step. Owned by the switch; tenants record through it.

    Example: `with ledger.phase("reload") as phase: ...; phase.bytes = weights.nbytes`
    """

    def __init__(self, device: Device, output_dir: Path, kept: int = 0, step: int = 0):
        """Keeps old records up to the step `kept`; new ones get `step`."""
        self.device = device
        self.step = step
        self.hand_over = ("", "")
        self.on_phase: Callable[[str], None] = lambda name: None
        trim(output_dir / SWITCH, kept if kept > 0 else -1)
        self._switch_log = LineFile(output_dir / SWITCH)
        self._trace = Trace(output_dir / "trace.json", fresh=kept == 0)
        self._seconds: dict[str, float] = defaultdict(float)
        self._bytes = 0
        self._working = ""
        self._step_began = self._origin = time.monotonic()

    def restart(self) -> None:
        """Discards what was counted since the last record."""
        self._seconds.clear()
        self._bytes = 0
        self._step_began = time.monotonic()

    @contextmanager
    def between(self, source: str, target: str) -> Iterator[None]:
        """Attributes phases inside to a hand-over of the device from `source` to `target`."""
        self.on_phase("switch")
        self.hand_over = (source, target)
        try:
            yield
        finally:
            self.hand_over = ("", "")
            if self._working:
                self.on_phase(self._working)

    @contextmanager
    def phase(self, name: str, pids: list[int] | None = None) -> Iterator[Phase]:
        """One phase of a hand-over; `pids` are the processes of the tenant concerned."""
        assert name in SWITCH_PHASES, name
        phase = Phase()
        free_before, resident_before = self.device.free_bytes(), resident_bytes(pids or [])
        began = time.monotonic()
        yield phase
        seconds = time.monotonic() - began
        self._seconds[name] += seconds
        self._bytes += phase.bytes
        source, target = self.hand_over
        row = {
            "step": self.step,
            "from": source,
            "to": target,
            "phase": name,
            "seconds": round(seconds, 6),
            "bytes": phase.bytes,
            "device_free_before": free_before,
            "device_free_after": self.device.free_bytes(),
            "host_rss": resident_bytes([os.getpid()]),
            "resident_before": resident_before,
            "resident_after": resident_bytes(pids or []),
        }
        self._switch_log.append([row])
        self._trace_event(name, "switch", began, seconds, row)

    @contextmanager
    def work(self, name: str) -> Iterator[None]:
        """A stretch of the tenants' own work, such as rollout or update.

        A hand-over inside it, to a judge and back, counts as switch time only.
        """
        assert name in WORK_PHASES, name
        self.on_phase(name)
        began, switching = time.monotonic(), self._switch_seconds()
        self._working = name
        try:
            yield
        finally:
            self._working = ""
        seconds = time.monotonic() - began
        self._seconds[name] += seconds - (self._switch_seconds() - switching)
        self._trace_event(name, "work", began, seconds, {"step": self.step})

    def step_metrics(self) -> dict[str, float]:
        """switch/* and timing_s/* since the last record, and starts the next one; absent phases are 0.

        A checkpoint is saved after its step's record, so its seconds appear in the next one.
        """
        step = time.monotonic() - self._step_began
        switch = self._switch_seconds()
        metrics = {f"switch/{name}_s": self._seconds[name] for name in SWITCH_PHASES}
        metrics |= {"switch/total_s": switch, "switch/bytes": self._bytes}
        metrics |= {"switch/share": switch / step if step > 0 else 0.0}
        metrics |= {f"timing_s/{name}": self._seconds[name] for name in WORK_PHASES}
        self.restart()
        return metrics | {"timing_s/switch": switch, "timing_s/step": step}

    def _switch_seconds(self) -> float:
        return sum(self._seconds[name] for name in SWITCH_PHASES)

    def _trace_event(self, name: str, lane: str, began: float, seconds: float, arguments: dict) -> None:
        event = {
            "name": name,
            "cat": lane,
            "ph": "X",
            "ts": round((began - self._origin) * 1e6),
            "dur": round(seconds * 1e6),
            "pid": os.getpid(),
            "tid": lane,
            "args": arguments,
        }
        self._trace.append(event)


class Trace:
    """Appends events to a Chrome trace, a JSON array without its closing bracket."""

    def __init__(self, path: Path, fresh: bool):
        old = path.read_bytes().splitlines() if path.exists() and not fresh else []
        whole = [line for line in old[1:] if line.endswith(b"},")]  # a kill may cut the last line short
        with replacing(path) as file:
            file.write(b"\n".join([b"[", *whole]) + b"\n")
        self._events = LineFile(path, end=",\n")

    def append(self, event: dict) -> None:
        self._events.append([event])
