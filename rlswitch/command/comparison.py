"""What a sweep compared: its jobs grouped over seeds, as a table, in Markdown and as one plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from rich.table import Table

from rlswitch.charts import COLORS, Series, standalone_chart
from rlswitch.records import jsonl as records

TARGET = 0.8
"""Accuracy whose first time is reported."""
HEADINGS = ("", "runs", "start", "final", "lowest - highest", f"seconds to {TARGET:g}", "steps to it")


@dataclass(kw_only=True, slots=True)
class Job:
    """How one job of a sweep ended."""

    number: int
    overrides: list[str]
    exit_code: int
    seconds: float
    directory: str
    steps: int | None = None
    reward: float | None = None
    """The last reward/mean."""
    accuracies: dict[str, float] = field(default_factory=dict)
    """The last val/<dataset>/acc of each dataset."""

    def read_metrics(self) -> None:
        for row in records.read(Path(self.directory, "metrics.jsonl")):
            self.steps = row["step"]
            self.reward = row.get("reward/mean", self.reward)
            self.accuracies |= {k: v for k, v in row.items() if k.startswith("val/") and k.endswith("/acc")}


@dataclass(frozen=True, slots=True)
class Point:
    step: int
    seconds: float
    """In steps so far, evaluations included, start-up not."""
    accuracy: float


@dataclass(frozen=True, slots=True)
class Arm:
    """The jobs that differ in nothing but their seed."""

    name: str
    curves: list[list[Point]]

    @property
    def mean_curve(self) -> list[tuple[float, float]]:
        """Mean accuracy by step, over the steps that all runs have."""
        steps = set.intersection(*({point.step for point in curve} for curve in self.curves))
        by_step = {step: [p.accuracy for c in self.curves for p in c if p.step == step] for step in steps}
        return [(step, fmean(by_step[step])) for step in sorted(steps)]

    @property
    def cells(self) -> list[str]:
        """What HEADINGS announce."""
        final = [curve[-1].accuracy for curve in self.curves]
        reached = [next((p for p in curve if p.accuracy >= TARGET), None) for curve in self.curves]
        there = [point for point in reached if point is not None]
        missed = f" ({len(there)} of {len(reached)})" if len(there) < len(reached) else ""
        return [
            self.name,
            str(len(final)),
            f"{fmean(curve[0].accuracy for curve in self.curves):.3f}",
            f"{fmean(final):.3f}",
            f"{min(final):.3f} - {max(final):.3f}",
            f"{fmean(point.seconds for point in there):.0f}{missed}" if there else "not reached",
            f"{fmean(point.step for point in there):.1f}" if there else "-",
        ]


def write_comparison(jobs: Sequence[Job], root: Path) -> Table | None:
    """Writes comparison.md and comparison.svg into `root`; None where there is nothing to compare."""
    dataset = next((name for job in jobs for name in sorted(job.accuracies)), None)
    arms = list(group_by_seed(jobs, dataset)) if dataset else []
    if len(jobs) < 2 or not arms:
        return None
    table = Table(*HEADINGS, title=dataset, title_justify="left")
    for arm in arms:
        table.add_row(*arm.cells)
    counts = sorted({len(arm.curves) for arm in arms})
    title = f"{dataset}, means of {' to '.join(map(str, {counts[0], counts[-1]}))} runs"
    lines = [Series(arm.name, arm.mean_curve, f"c{i % len(COLORS)}") for i, arm in enumerate(arms)]
    (root / "comparison.svg").write_text(standalone_chart(title, lines, x_name="step"))
    (root / "comparison.md").write_text(
        "".join(
            f"| {' | '.join(row)} |\n"
            for row in (HEADINGS, ["---"] * len(HEADINGS), *(arm.cells for arm in arms))
        )
    )
    return table


def group_by_seed(jobs: Sequence[Job], dataset: str) -> Iterator[Arm]:
    """The jobs that finished, those alike but for the seed together, named by what sets them apart."""
    kept = {job.number: [w for w in job.overrides if not w.startswith("seed=")] for job in jobs}
    shared = set.intersection(*(set(words) for words in kept.values()))
    curves: dict[tuple[str, ...], list[list[Point]]] = {}
    for job in jobs:
        curve = list(read_curve(Path(job.directory, "metrics.jsonl"), dataset))
        if job.exit_code == 0 and curve:
            curves.setdefault(tuple(kept[job.number]), []).append(curve)
    for words, found in curves.items():
        own = [word for word in words if word not in shared]
        yield Arm(" ".join(word.removeprefix("recipe=") for word in own) or "all", found)


def read_curve(path: Path, dataset: str) -> Iterator[Point]:
    seconds = 0.0
    for record in records.read(path):
        seconds += record.get("timing_s/step", 0.0)
        if dataset in record:
            yield Point(record["step"], seconds, record[dataset])
