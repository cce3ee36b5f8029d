"""Compare the jobs of a sweep: grouped over seeds, as a table, in Markdown and as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.table import Table

from rlswitch.records.jsonl import read
from rlswitch.report.figures import lines, svg

if TYPE_CHECKING:
    from rlswitch.command.sweep import Job

TARGET = 0.8
"""Accuracy whose first time is reported."""
HEADINGS = ("", "runs", "start", "final", "lowest - highest", f"seconds to {TARGET:g}", "steps to it")


def write_comparison(jobs: Sequence[Job], root: Path) -> Table | None:
    """Writes comparison.md and comparison.svg into `root`; None where there is nothing to compare."""
    dataset = next((name for job in jobs for name in sorted(job.accuracies)), None)
    points = read_points(jobs, dataset) if dataset else pd.DataFrame()
    if len(jobs) < 2 or points.empty:
        return None
    arms = points.groupby("arm", sort=False)
    rows = [[str(name), *cells(arm)] for name, arm in arms]
    counts = arms["job"].nunique()
    runs = " to ".join(map(str, sorted({counts.min(), counts.max()})))
    curves = {str(name): mean_curve(arm) for name, arm in arms}
    [figure] = lines(f"{dataset}, means of {runs} runs", curves)
    (root / "comparison.svg").write_text(svg(figure))
    lines_of_text = (f"| {' | '.join(row)} |\n" for row in (HEADINGS, ["---"] * len(HEADINGS), *rows))
    (root / "comparison.md").write_text("".join(lines_of_text))
    table = Table(*HEADINGS, title=dataset, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def read_points(jobs: Sequence[Job], dataset: str) -> pd.DataFrame:
    """A row per evaluation of a finished job: arm, job, step, seconds, accuracy.

    An arm are the jobs that differ only in their seed, named by what sets them apart. `seconds` are
    those in steps so far, evaluations included, start-up not.
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
    """What HEADINGS announce after the name."""
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
