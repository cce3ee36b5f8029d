"""A sweep: Hydra's launchers and sweepers, a process per job, one table at the end."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep
from rich.console import Console
from rich.table import Table

from rlswitch.command.arguments import Arguments, refuse_broken_environment, run_hydra
from rlswitch.command.compose import Setting, Source, compose_run, quoted, read, unique
from rlswitch.errors import ConfigError
from rlswitch.processes.exit import (
    DONE,
    FAILED,
    INTERRUPTED,
    NOT_PROVEN,
    POLITE,
    PREEMPTED,
    WRONG_CONFIG,
    leave,
)
from rlswitch.processes.fork_server import prepare, start_process
from rlswitch.processes.signals import handling
from rlswitch.records import jsonl as records

STATUS = {
    DONE: "done",
    WRONG_CONFIG: "wrong input",
    NOT_PROVEN: "not proven",
    PREEMPTED: "preempted",
}
SWEEP_ROOTS = ("output_dir", "hydra.sweep.dir")

RunJob = Callable[[list[str]], object]
"""Does a job, whose words it gets, in a process of the job's own; ends it by leaving with an exit code."""


def run_job(words: list[str]) -> None:
    from rlswitch.command.cli import main

    sys.argv[1:] = words  # what the run's record of its own command is taken from
    leave(main(words))


@dataclass(kw_only=True, slots=True)
class Job:
    """How one job of a sweep ended: a row of the table."""

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


def sweep(arguments: Arguments, job: RunJob = run_job) -> int:
    """A process per job: the state of vLLM and CUDA in a process does not survive a second job."""
    settings, wrong = read(arguments.overrides, arguments.source)
    wrong += _sweep_problems(settings, arguments.source)
    if wrong:
        raise ConfigError(*unique(wrong))
    refuse_broken_environment()
    prepare()
    root = _sweep_root(settings)
    notes = root / ".jobs"  # a file per job, since a launcher may run them on other machines
    notes.mkdir(parents=True, exist_ok=True)
    for note in notes.iterdir():
        note.unlink()  # of an earlier sweep in the same directory
    words = [item.word for item in settings if item.key not in SWEEP_ROOTS]
    words += [f"hydra.sweep.dir={quoted(str(root))}", "--multirun"]
    stopped = 0
    try:
        code = run_hydra(_job_task(job, notes, arguments.source), words, arguments)
    except KeyboardInterrupt as stop:
        code = stopped = stop.args[0] if stop.args else INTERRUPTED
    jobs = [Job(**json.loads(note.read_text())) for note in notes.glob("*.json")]
    jobs.sort(key=lambda job: job.number)
    shutil.rmtree(notes)
    _summarise(jobs, root)
    if stopped:
        print(f"rlswitch: stopped; add output_dir={root} to go on", file=sys.stderr)
        return stopped
    return FAILED if code or not jobs or any(job.exit_code for job in jobs) else DONE


def _sweep_problems(settings: list[Setting], source: Source) -> Iterator[str]:
    """What is wrong with any job of the sweep, before the first one starts."""
    sweepers = [item.text for item in settings if item.key == "hydra/sweeper"]
    for item in settings:
        if item.is_sweep and item.key in SWEEP_ROOTS:
            yield item.says("a sweep has one directory, its jobs are numbered in it; give one")
        if item.parsed.is_interval_sweep() and sweepers[-1:] in ([], ["basic"]):
            yield item.says("only a sweeper that samples can use an interval, such as hydra/sweeper=optuna")
    with source.loader() as loader:
        for item in settings:
            item.parsed.config_loader = loader  # what glob(*) looks the options up with
        jobs = list(itertools.product(*(_values(item) for item in settings)))
    from rlswitch.inputs import refuse_wrong_inputs  # numpy comes with it

    looked_at = set[str]()
    for job in jobs:
        try:
            run = compose_run(job, source)
            inputs = repr((run.model, run.data, run.reward, run.judge, run.reward_model, run.engine))
            if inputs not in looked_at and run.mode != "plan":
                looked_at.add(inputs)
                refuse_wrong_inputs(run)
        except ConfigError as error:
            yield from error.problems


def _values(item: Setting) -> list[str]:
    """The words of a setting, one per value; the middle of an interval stands for all of it."""
    if not item.is_sweep:
        return [item.word]
    interval = item.parsed.value()
    if isinstance(interval, IntervalSweep):
        assert interval.start is not None and interval.end is not None  # the grammar has both
        middle = (interval.start + interval.end) / 2
        values = [str(int(middle) if isinstance(interval.start, int) else middle)]
    else:
        values = list(item.parsed.sweep_string_iterator())
    return [f"{item.sign}{item.key}={value}" for value in values]


def _sweep_root(settings: list[Setting]) -> Path:
    given = [item.parsed.value() for item in settings if item.key in SWEEP_ROOTS]
    if given and given[-1]:
        return Path(str(given[-1])).absolute()
    stem = Path("runs", f"sweep-{datetime.now():%Y-%m-%d_%H-%M-%S}").absolute()
    names = itertools.chain([stem], (Path(f"{stem}-{n}") for n in itertools.count(2)))
    return next(path for path in names if not path.exists())


def _job_task(run: RunJob, notes: Path, source: Source) -> Callable[[Any], float]:
    """What Hydra calls for a job. It returns the final reward, for a sweeper that maximises it.

    A failed job returns nan: Hydra's own sweeper goes on, and Optuna's counts the trial as failed.
    """
    flags = ["--config-name", source.name]
    flags += ["--config-dir", str(source.extra)] if source.extra else []

    def task(_config: Any) -> float:
        job = HydraConfig.get()
        overrides, directory = list(job.overrides.task), job.runtime.output_dir
        started = time.monotonic()
        code, signum = run_child(run, [*flags, *overrides, f"output_dir={quoted(directory)}"])
        result = Job(
            number=job.job.num,
            overrides=overrides,
            exit_code=code,
            seconds=time.monotonic() - started,
            directory=directory,
        )
        if code != WRONG_CONFIG:  # what a directory holds that refused it is of another run
            result.read_metrics()
        (notes / f"{result.number}.json").write_text(json.dumps(asdict(result)))
        if signum:
            raise KeyboardInterrupt(PREEMPTED if code == PREEMPTED else 128 + signum)
        return math.nan if code or result.reward is None else result.reward

    return task


def run_child(target: RunJob, words: list[str]) -> tuple[int, int]:
    """The exit code of a process that does `target(words)`, and the signal that we passed on to it or 0.

    It writes where we do, and has a session of its own: a terminal's Ctrl-C reaches it once, through us.
    """
    children: list[int] = []
    received: list[int] = []

    def pass_on(signum: int, _frame: Any) -> None:
        received.append(signum)
        for child in children:
            os.kill(child, signum)

    with handling((signal.SIGINT, *POLITE), pass_on):
        child = start_process(target, [words])
        assert child.pid is not None
        children.append(child.pid)
        for signum in received:  # one came while the child was being made
            os.kill(child.pid, signum)
        child.join()
    code = child.exitcode or 0
    return (128 - code if code < 0 else code), (received[0] if received else 0)


def _summarise(jobs: list[Job], root: Path) -> None:
    """Writes summary.json and prints it as a table, without the overrides that all jobs share."""
    (root / "summary.json").write_text(json.dumps([asdict(job) for job in jobs], indent=2) + "\n")
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    datasets = sorted({name for job in jobs for name in job.accuracies})
    headings = [
        "#",
        "overrides",
        "status",
        "steps",
        "reward/mean",
        *datasets,
        "seconds",
        "directory",
    ]
    table = Table(*headings, title=f"sweep {root}", title_justify="left")
    for job in jobs:
        table.add_row(
            str(job.number),
            " ".join(word for word in job.overrides if word not in shared),
            STATUS.get(job.exit_code, f"failed ({job.exit_code})"),
            "-" if job.steps is None else str(job.steps),
            _decimal(job.reward),
            *(_decimal(job.accuracies.get(name)) for name in datasets),
            f"{job.seconds:.0f}",
            os.path.relpath(job.directory, root),
        )
    # Without a terminal rich assumes 80 columns and would break the overrides apart.
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
    console.print(table)
    from rlswitch.command.comparison import write_comparison  # pandas comes with it

    if comparison := write_comparison(jobs, root):
        console.print(comparison)
        console.print(f"compared in {root}/comparison.md and comparison.svg")


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
