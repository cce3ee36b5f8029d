"""What a run writes down, one JSON object a line: append, read, trim, and sum up."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = ("rollout", "reward", "prepare", "update", "switch", "evaluation", "checkpoint")
"""What a step's time is spent on, in the order of the step; what is left over is `other`."""
PART_COLORS = dict(
    zip(
        (*PARTS, "other"),
        "#5b8def #b07cc6 #4fb0b5 #5fad6b #e5a13a #9aa3af #7c8490 #565c66".split(),
        strict=True,
    )
)
"""The same on the console and in the report, on light and on dark."""


class LineFile:
    """A JSON Lines file that only ever holds whole lines.

    A batch of records goes out in one write: a kill falls between two batches, not into a line.
    """

    def __init__(self, path: Path, end: str = "\n", allow_nan: bool = False):
        self._end = end
        self._allow_nan = allow_nan
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(record, allow_nan=self._allow_nan) + self._end for record in records]
        rest = memoryview("".join(lines).encode())
        before = os.fstat(self._handle).st_size
        try:
            while rest:  # a full disk or a signal can cut a write short
                rest = rest[os.write(self._handle, rest) :]
        except OSError:
            os.ftruncate(self._handle, before)
            raise

    def sync(self) -> None:
        """To the disk: what was appended outlives a power failure."""
        os.fsync(self._handle)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file in order; a torn or foreign line, or a missing file, gives none."""
    return (record for _, record in _lines(path))


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record


def trim(path: Path, last_step: int) -> None:
    """Drops records after `last_step` and torn lines; the file is replaced in one stroke."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("wb") as kept:
        for line, record in _lines(path):
            if record["step"] <= last_step:
                kept.write(line.rstrip(b"\n") + b"\n")
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(draft, path)


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record: what is neither a note nor null."""
    return {
        key: value
        for key, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def time_by_part(record: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each of PARTS that took any, and `other`: the rest of timing_s/step."""
    seconds = {part: record.get(f"timing_s/{part}", 0.0) for part in PARTS}
    other = record.get("timing_s/step", 0.0) - sum(seconds.values())
    return {part: value for part, value in [*seconds.items(), ("other", other)] if value > 0}


@dataclass(slots=True)
class Summary:
    """The run so far in a few numbers: fed record by record."""

    last_step: int = 0
    first: dict[str, float] = field(default_factory=dict)
    """First value of reward/mean and of every val/* metric."""
    last: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """By part of the step, summed over the run."""
    versions: dict[float, bool] = field(default_factory=dict)
    """Policy version -> whether its push was proven. An evaluation and the rollouts after it share
    one push, so records cannot be counted."""

    def add(self, record: Mapping[str, float]) -> None:
        self.last_step = max(self.last_step, int(record.get("step", 0)))
        for key, value in record.items():
            if key == "reward/mean" or key.startswith("val/"):
                self.first.setdefault(key, value)
                self.last[key] = value
        for part, value in time_by_part(record).items():
            self.seconds[part] = self.seconds.get(part, 0.0) + value
        if "switch/verified" in record:
            version = record.get("training/policy_version", record.get("step", 0))
            proven = record["switch/verified"] > 0
            self.versions[version] = proven or self.versions.get(version, False)

    @property
    def pushes(self) -> int:
        return len(self.versions)

    @property
    def proven(self) -> int:
        return sum(self.versions.values())

    @property
    def wall_seconds(self) -> float:
        """Time in recorded steps, resumed sessions included; starting up is not a step."""
        return sum(self.seconds.values())

    def shares(self) -> dict[str, float]:
        """Share of the run's time by part, in the order of the step."""
        total = self.wall_seconds
        return {part: self.seconds[part] / total for part in (*PARTS, "other") if part in self.seconds}
