"""The outputs of gpu_check.py's stages, and how figures and their limits become a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rlswitch.records import jsonl

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"
LOG = "log.txt"


class Limit(NamedTuple):
    """A bound on a figure: `sign` is <=, >= or >. None: the figure is only recorded."""

    sign: str
    cuda: float | None
    cpu: float | None

    def allows(self, value: float, kind: str) -> bool:
        bound = self.bound(kind)
        if bound is None:
            return True
        return {"<=": value <= bound, ">=": value >= bound, ">": value > bound}[self.sign]

    def bound(self, kind: str) -> float | None:
        return self.cuda if kind == "cuda" else self.cpu


Limits = dict[str, Limit]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What a stage left behind: its files and exit code."""

    directory: Path
    """The stage's directory, a sibling of the other stages'."""
    machine: Mapping[str, Any]
    """The document written by the stage `machine`."""
    exit_code: int | None = 0
    """None: killed at its cap."""

    @property
    def kind(self) -> str:
        return self.machine.get("kind", "cpu")

    def document(self, name: str) -> dict[str, Any]:
        return document(self.directory / name)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return rows(self.directory / name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    verdict: str
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


class Findings:
    """Figures, their limits, and the problems found so far."""

    def __init__(self, outputs: Outputs, limits: Limits):
        self.outputs, self.limits = outputs, limits
        self.figures: dict[str, Any] = {}
        self.problems: list[str] = []
        if outputs.exit_code is None:
            self.problems.append(f"killed at its cap; the log ends with: {last_line(outputs.directory)}")
        elif outputs.exit_code:
            self.problems.append(f"exit code {outputs.exit_code}: {last_line(outputs.directory)}")

    def add(self, **figures: float | str | None) -> None:
        for name, value in figures.items():
            self.figures[name] = float(f"{value:.6g}") if isinstance(value, float) else value

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    def verdict(self) -> Verdict:
        for name, limit in self.limits.items():
            value, bound = self.figures.get(name), limit.bound(self.outputs.kind)
            if bound is None:
                continue
            if value is None or not math.isfinite(value):
                if self.outputs.exit_code == 0:  # otherwise the exit code explains it
                    self.problems.append(f"{name} was not measured")
            elif not limit.allows(value, self.outputs.kind):
                self.problems.append(f"{name} = {value:.4g}, must be {limit.sign} {bound:g}")
        verdict = FAIL if self.problems else PASS
        return Verdict(verdict=verdict, reason="; ".join(self.problems), figures=self.figures)


def rows(file: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file; skips torn lines, empty if there is no file."""
    if file.name in ("metrics.jsonl", "switch.jsonl"):
        return list(jsonl.read(file))
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def document(file: Path) -> dict[str, Any]:
    """A JSON file's content; empty if the file is missing or torn."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def last_line(directory: Path) -> str:
    """The log's last rlswitch error if there is one, else its last line."""
    file = directory / LOG
    text = file.read_text(errors="replace") if file.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("rlswitch: error:")]
    return (errors or lines or ["nothing"])[-1][:300]


def largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def smallest(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
