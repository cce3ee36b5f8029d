"""A sweep: Hydra's launchers and sweepers, one process per job, one table at the end."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep
from rich.console import Console
from rich.table import Table

from rlswitch.command.arguments import Arguments, check_environment, run_hydra
from rlswitch.command.comparison import Job, write_comparison
from rlswitch.command.compose import Setting, Source, compose_run, quoted, read
from rlswitch.errors import ConfigError
from rlswitch.inputs import check_inputs
from rlswitch.processes.driver import forks_are_usable
from rlswitch.processes.exit import DONE, FAILED, INTERRUPTED, NOT_PROVEN, POLITE, PREEMPTED, WRONG_CONFIG
from rlswitch.processes.fork_server import prepare, start_process
from rlswitch.processes.signals import handling

STATUS = {DONE: "done", WRONG_CONFIG: "wrong input", NOT_PROVEN: "not proven", PREEMPTED: "preempted"}
SWEEP_ROOTS = ("output_dir", "hydra.sweep.dir")

RunJob = Callable[[list[str]], object]
"""Runs a job, given its words, in the job's own process, and exits that process with the job's exit code."""


def sweep(arguments: Arguments, run_job: RunJob) -> int:
    """Runs every job in a process: vLLM and CUDA cannot be set up twice in one. Returns the exit code."""
    settings, wrong = read(arguments.overrides, arguments.source)
    wrong += _sweep_problems(settings, arguments.source)
    if wrong:
        raise ConfigError(*dict.fromkeys(wrong))
    check_environment()
    prepare()
    root = _sweep_root(settings)
    notes = root / ".jobs"  # a file per job, because a launcher may run them on other machines
    shutil.rmtree(notes, ignore_errors=True)  # left by an earlier sweep in this directory
    notes.mkdir(parents=True)
    words = [item.word for item in settings if item.key not in SWEEP_ROOTS]
    words += [f"hydra.sweep.dir={quoted(str(root))}", "--multirun"]
    code = stopped = 0
    try:
        code = run_hydra(lambda _config: _run(run_job, notes, arguments.source), words, arguments)
    except KeyboardInterrupt as stop:
        stopped = stop.args[0] if stop.args else INTERRUPTED
    jobs = [Job(**json.loads(note.read_text())) for note in notes.iterdir()]
    jobs.sort(key=lambda job: job.number)
    shutil.rmtree(notes)
    (root / "summary.json").write_text(json.dumps([asdict(job) for job in jobs], indent=2) + "\n")
    _print_summary(jobs, root)
    if stopped:
        print(f"rlswitch: stopped; add output_dir={root} to resume", file=sys.stderr)
        return stopped
    return FAILED if code or not jobs or any(job.exit_code for job in jobs) else DONE


def _sweep_problems(settings: list[Setting], source: Source) -> Iterator[str]:
    """What is wrong with any job of the sweep, before the first one starts."""
    sweepers = [item.text for item in settings if item.key == "hydra/sweeper"]
    for item in settings:
        if item.is_sweep and item.key in SWEEP_ROOTS:
            yield item.line("a sweep has one directory with a numbered one for each job; give one")
        if item.parsed.is_interval_sweep() and sweepers[-1:] in ([], ["basic"]):
            yield item.line("only a sampling sweeper takes an interval, such as hydra/sweeper=optuna")
    with source.loader() as loader:
        for item in settings:
            item.parsed.config_loader = loader  # which expands glob(*)
        jobs = list(itertools.product(*(_words(item) for item in settings)))
    checked = set[str]()
    for job in jobs:
        try:
            run = compose_run(job, source)
            inputs = repr((run.model, run.data, run.reward, run.tenants, run.engine))
            if inputs not in checked and run.mode != "plan":
                checked.add(inputs)
                check_inputs(run)
        except ConfigError as error:
            yield from error.problems


def _words(item: Setting) -> list[str]:
    """The words of a setting, one per value; the middle of an interval stands for all of it."""
    if not item.is_sweep:
        return [item.word]
    interval = item.parsed.value()
    if isinstance(interval, IntervalSweep):
        assert interval.start is not None and interval.end is not None  # the grammar demands both
        middle = (interval.start + interval.end) / 2
        return [f"{item.sign}{item.key}={int(middle) if isinstance(interval.start, int) else middle}"]
    return [f"{item.sign}{item.key}={value}" for value in item.parsed.sweep_string_iterator()]


def _sweep_root(settings: list[Setting]) -> Path:
    given = [item.parsed.value() for item in settings if item.key in SWEEP_ROOTS]
    if given and given[-1]:
        return Path(str(given[-1])).absolute()
    stem = Path("runs", f"sweep-{datetime.now():%Y-%m-%d_%H-%M-%S}").absolute()
    names = itertools.chain([stem], (Path(f"{stem}-{n}") for n in itertools.count(2)))
    return next(path for path in names if not path.exists())


def _run(run_job: RunJob, notes: Path, source: Source) -> float:
    """Hydra's task: runs one job and returns its final reward, for a sweeper that maximises it.

    A failed job returns nan: Hydra's own sweeper continues, and Optuna's counts the trial as failed.
    """
    flags = ["--config-name", source.name]
    flags += ["--config-dir", str(source.extra)] if source.extra else []
    hydra = HydraConfig.get()
    overrides, directory = list(hydra.overrides.task), hydra.runtime.output_dir
    started = time.monotonic()
    code, signum = _run_child(run_job, [*flags, *overrides, f"output_dir={quoted(directory)}"])
    seconds = time.monotonic() - started
    job = Job(number=hydra.job.num, overrides=overrides, exit_code=code, seconds=seconds, directory=directory)
    if code != WRONG_CONFIG:  # what the directory holds is then from another run
        job.read_metrics()
    (notes / f"{job.number}.json").write_text(json.dumps(asdict(job)))
    if signum:
        raise KeyboardInterrupt(PREEMPTED if code == PREEMPTED else 128 + signum)
    return math.nan if code or job.reward is None else job.reward


def _run_child(target: RunJob, words: list[str]) -> tuple[int, int]:
    """The exit code of a process that runs `target(words)`, and the signal that was passed on to it, or 0.

    It writes to the same terminal in its own process group: Ctrl-C reaches it once, through us.
    """
    children, received = list[int](), list[int]()

    def pass_on(signum: int, _frame: Any) -> None:
        received.append(signum)
        for child in children:
            os.kill(child, signum)

    warm = forks_are_usable()
    with handling((signal.SIGINT, *POLITE), pass_on):
        child = start_process(target, [words], warm=warm)
        assert child.pid is not None
        children.append(child.pid)
        for signum in received:  # one arrived while the child was starting
            os.kill(child.pid, signum)
        child.join()
    code = child.exitcode or 0
    return (128 - code if code < 0 else code), (received[0] if received else 0)


def _print_summary(jobs: Sequence[Job], root: Path) -> None:
    """A table of the jobs without the overrides that all of them share, then one of the means over seeds."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    datasets = sorted({name for job in jobs for name in job.accuracies})
    headings = ["#", "overrides", "status", "steps", "reward/mean", *datasets, "seconds", "directory"]
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
    if comparison := write_comparison(jobs, root):
        console.print(comparison)
        console.print(f"compared in {root}/comparison.md and comparison.svg")


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
