"""JSON Lines records of a run: append, read, trim and summarise them."""

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

PARTS = ("rollout", "reward", "prepare", "update", "switch", "evaluation", "checkpoint")
"""The timed parts of a step, in order; `other` is the rest of timing_s/step."""
HEX = "5b8def b07cc6 4fb0b5 5fad6b e5a13a 9aa3af 7c8490 565c66"
PART_COLORS = {part: f"#{color}" for part, color in zip((*PARTS, "other"), HEX.split(), strict=True)}
"""Colours of the parts in the console and the report, on light and dark backgrounds."""


class LineFile:
    """A JSON Lines file that only ever holds whole lines.

    Each batch of records is one write, so a kill cannot fall inside a line.
    """

    def __init__(self, path: Path, end: str = "\n"):
        self._end = end
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(record, allow_nan=False) + self._end for record in records]
        rest = memoryview("".join(lines).encode())
        before = os.fstat(self._handle).st_size
        try:
            while rest:  # a full disk or a signal can cut a write short
                rest = rest[os.write(self._handle, rest) :]
        except OSError:
            os.ftruncate(self._handle, before)
            raise

    def sync(self) -> None:
        """Flushes to disk, so that the records survive a power failure."""
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)
        self._handle = -1  # its number may become another file's


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` when the block succeeds: readers see the old content or the new, whole."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records in order; skips torn and foreign lines. A missing file has none."""
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
    """Drops torn lines and records after `last_step`."""
    with replacing(path) as kept:
        for line, record in _lines(path):
            if record["step"] <= last_step:
                kept.write(line.rstrip(b"\n") + b"\n")


def finite(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite metrics of a record."""
    return {key: value for key, value in record.items() if finite(value) is not None}


def accuracies(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """(val/<dataset>, accuracy) of each evaluated dataset."""
    keys = [key for key in metrics if key.startswith("val/") and key.endswith("/acc")]
    return [(key.removesuffix("/acc"), metrics[key]) for key in keys]


def time_by_part(record: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each part of the step that took any time, `other` included."""
    seconds = {part: record.get(f"timing_s/{part}", 0.0) for part in PARTS}
    other = record.get("timing_s/step", 0.0) - sum(seconds.values())
    return {part: value for part, value in [*seconds.items(), ("other", other)] if value > 0}


def shares(steps: Collection[Mapping[str, float]]) -> dict[str, float]:
    """Share of the time by part, in the order of the step; `steps` as from time_by_part."""
    sums = {part: sum(step.get(part, 0.0) for step in steps) for part in PART_COLORS}
    total = sum(sums.values())
    return {part: seconds / total for part, seconds in sums.items() if seconds > 0}


@dataclass(slots=True)
class Summary:
    """Totals of a run, accumulated record by record."""

    last_step: int = 0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    """First and latest value of every metric."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By part of the step, summed over the run."""
    pushes: dict[float, bool] = field(default_factory=dict)
    """Policy version -> whether its push was proven. An evaluation and the next rollouts share one push."""

    def add(self, record: Mapping[str, float]) -> None:
        self.last_step = max(self.last_step, int(record.get("step", 0)))
        self.first = {**record, **self.first}
        self.last.update(record)
        for part, value in time_by_part(record).items():
            self.seconds[part] = self.seconds.get(part, 0.0) + value
        if "switch/verified" in record:
            version = record.get("training/policy_version", record.get("step", 0))
            self.pushes[version] = record["switch/verified"] > 0 or self.pushes.get(version, False)

    @property
    def wall_seconds(self) -> float:
        """Seconds in recorded steps, resumed sessions included; start-up is not a step."""
        return sum(self.seconds.values())
