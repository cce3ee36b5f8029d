"""How the jobs of a sweep ended, compared: grouped over seeds, as a table, in Markdown and as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from rlswitch.records.jsonl import read
from rlswitch.report.figures import lines, svg

TARGET = 0.8
"""The accuracy whose first step is reported."""
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
        for row in read(Path(self.directory, "metrics.jsonl")):
            self.steps = row["step"]
            self.reward = row.get("reward/mean", self.reward)
            self.accuracies |= {k: v for k, v in row.items() if k.startswith("val/") and k.endswith("/acc")}


def write_comparison(jobs: Sequence[Job], root: Path) -> Table | None:
    """Writes comparison.md and comparison.svg into `root`; None where there is nothing to compare."""
    dataset = next((name for job in jobs for name in sorted(job.accuracies)), None)
    points = read_points(jobs, dataset) if dataset else pd.DataFrame()
    if len(jobs) < 2 or points.empty:
        return None
    arms = points.groupby("arm", sort=False)
    counts = arms["job"].nunique()
    runs = " to ".join(map(str, sorted({counts.min(), counts.max()})))
    [figure] = lines(f"{dataset}, means of {runs} runs", {str(name): mean_curve(arm) for name, arm in arms})
    (root / "comparison.svg").write_text(svg(figure))
    table = Table(*HEADINGS, title=dataset, title_justify="left")
    with (root / "comparison.md").open("w") as file:
        file.write(f"| {' | '.join(HEADINGS)} |\n{'| --- ' * len(HEADINGS)}|\n")
        for name, arm in arms:
            row = [str(name), *cells(arm)]
            file.write(f"| {' | '.join(row)} |\n")
            table.add_row(*row)
    return table


def read_points(jobs: Sequence[Job], dataset: str) -> pd.DataFrame:
    """A row per evaluation of a finished job: arm, job, step, seconds, accuracy.

    An arm is the jobs that differ only in their seed, named by the overrides that the others lack. `seconds`
    are those in steps so far, evaluations included, start-up not.
    """
    kept = {job.number: [word for word in job.overrides if not word.startswith("seed=")] for job in jobs}
    shared = set.intersection(*(set(words) for words in kept.values()))
    rows: list[dict[str, Any]] = []
    for job in jobs:
        own = [word.removeprefix("recipe=") for word in kept[job.number] if word not in shared]
        seconds = 0.0
        for record in read(Path(job.directory, "metrics.jsonl")) if job.exit_code == 0 else ():
            seconds += record.get("timing_s/step", 0.0)
            if dataset in record:
                row = {"step": record["step"], "seconds": seconds, "accuracy": record[dataset]}
                rows.append({"arm": " ".join(own) or "all", "job": job.number} | row)
    return pd.DataFrame(rows)


def mean_curve(arm: pd.DataFrame) -> list[tuple[float, float]]:
    """Mean accuracy by step, over the steps that all of the arm's runs have."""
    by_step = arm.groupby("step")
    complete = by_step["job"].nunique() == arm["job"].nunique()
    return list(by_step["accuracy"].mean()[complete].items())


def cells(arm: pd.DataFrame) -> list[str]:
    """The cells under HEADINGS, without the arm's name."""
    runs = arm.groupby("job")["accuracy"]
    first, final = runs.first(), runs.last()
    reached = arm[arm["accuracy"] >= TARGET].groupby("job")[["seconds", "step"]].first()
    missed = f" ({len(reached)} of {len(final)})" if len(reached) < len(final) else ""
    times = [f"{reached['seconds'].mean():.0f}{missed}", f"{reached['step'].mean():.1f}"]
    return [
        str(len(final)),
        f"{first.mean():.3f}",
        f"{final.mean():.3f}",
        f"{final.min():.3f} - {final.max():.3f}",
        *(times if len(reached) else ["not reached", "-"]),
    ]
