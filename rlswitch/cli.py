"""The commands behind train.py: one run, a sweep, and Hydra's questions about the configuration.

Nothing here imports torch or vLLM before the whole configuration is known to be right.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep
from rich.console import Console
from rich.table import Table

from rlswitch import records
from rlswitch.compose import Setting, Source, compose_run, planned, quoted, read, unique
from rlswitch.config import Run, register
from rlswitch.leave import leave
from rlswitch.types import ConfigError, Preempted, ProofError, RLSwitchError

DONE, FAILED, WRONG_CONFIG, NOT_PROVEN, PREEMPTED, INTERRUPTED = 0, 1, 2, 3, 75, 130
STATUS = {
    DONE: "done",
    WRONG_CONFIG: "wrong input",
    NOT_PROVEN: "not proven",
    PREEMPTED: "preempted",
}
NOT_IN_DIRECTORY_NAME = {"recipe", "num_steps", "resume", "mode", "output_dir"}
DIRECTORY_NAME_LENGTH = 100
SWEEP_ROOTS = ("output_dir", "hydra.sweep.dir")

Command = Callable[[list[str]], list[str]]
"""Makes the command of a job's process from that job's words."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line `words` (by default this process's) and returns the exit code."""
    try:
        arguments = parse(sys.argv[1:] if words is None else words)
        if arguments.multirun:
            return sweep(arguments)
        return ask_hydra(arguments) if arguments.is_question else train_once(arguments)
    except ConfigError as error:
        return _report(error.problems, WRONG_CONFIG)
    except ProofError as error:
        return _report([str(error)], NOT_PROVEN)
    except Preempted as error:
        print(f"rlswitch: {error}", file=sys.stderr)
        return PREEMPTED
    except RLSwitchError as error:
        return _report(str(error).splitlines(), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # train.py --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception:
        traceback.print_exc()
        return FAILED


@dataclass(kw_only=True, slots=True)
class Arguments:
    """A command line, taken apart."""

    overrides: list[str]
    flags: list[str]
    """Everything else, for Hydra."""
    source: Source
    multirun: bool
    is_question: bool
    """--help, --cfg, --info and the like: Hydra answers, nothing is trained."""
    about_hydra: bool
    """--hydra-help and --shell-completion: the overrides are not ours."""


def parse(words: Sequence[str]) -> Arguments:
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print its usage, which lists none of our settings
    given = parser.parse_intermixed_args(list(words))
    if given.config_path or given.experimental_rerun:
        raise ConfigError(
            "--config-path, --experimental-rerun: not supported; --config-dir DIR adds to conf/"
        )
    source = Source.default()
    source.name = given.config_name or source.name
    source.extra = Path(given.config_dir).absolute() if given.config_dir else None
    about_hydra = given.hydra_help or given.shell_completion
    return Arguments(
        overrides=given.overrides,
        flags=[word for word in words if word not in given.overrides],
        source=source,
        multirun=given.multirun or "hydra.mode=MULTIRUN" in given.overrides,
        is_question=bool(given.help or given.cfg or given.info or about_hydra),
        about_hydra=about_hydra,
    )


def train_once(arguments: Arguments) -> int:
    run = compose_run(arguments.overrides, arguments.source)
    run.output_dir = run.output_dir or default_output_dir(run, arguments)
    _check_environment()
    if run.mode == "plan":
        from rlswitch.plan import show

        show(run)
        return DONE
    from rlswitch.loop import train  # torch and vLLM come with it

    train(run)
    return DONE


def default_output_dir(run: Run, arguments: Arguments) -> str:
    """runs/<recipe> and what differs from it: the same command finds its checkpoints again."""
    named = {}
    for item in read(arguments.overrides, arguments.source)[0]:
        if item.key in NOT_IN_DIRECTORY_NAME or item.is_hydra:
            continue
        value = item.text if item.is_choice or item.is_free else attrgetter(item.key)(run)
        named[item.key] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = "-".join([run.recipe or "run", *(f"{key}={named[key]}" for key in sorted(named))])
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "_", text)
    if len(name) > DIRECTORY_NAME_LENGTH:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{name[: DIRECTORY_NAME_LENGTH - 1 - len(digest)]}-{digest}"
    return f"runs/{name}"


def ask_hydra(arguments: Arguments) -> int:
    words = arguments.overrides
    if arguments.about_hydra:
        register()
    else:
        with planned(words, arguments.source) as plan:
            words = plan.words
        if plan.problems:
            raise ConfigError(*unique(plan.problems))
    return WRONG_CONFIG if _run_hydra(lambda _config: None, words, arguments) else DONE


def job_command(words: list[str]) -> list[str]:
    """train.py of this checkout; the installed module where there is no checkout."""
    script = Path(__file__).resolve().parents[1] / "train.py"
    program = [str(script)] if script.is_file() else ["-m", "rlswitch.cli"]
    return [sys.executable, *program, *words]


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


def sweep(arguments: Arguments, command: Command = job_command) -> int:
    """A process per job: the state of vLLM and CUDA in a process does not survive a second job."""
    settings, wrong = read(arguments.overrides, arguments.source)
    wrong += _sweep_problems(settings, arguments.source)
    if wrong:
        raise ConfigError(*unique(wrong))
    _check_environment()
    root = _sweep_root(settings)
    notes = root / ".jobs"  # a file per job, since a launcher may run them on other machines
    notes.mkdir(parents=True, exist_ok=True)
    for note in notes.iterdir():
        note.unlink()  # of an earlier sweep in the same directory
    words = [item.word for item in settings if item.key not in SWEEP_ROOTS]
    words += [f"hydra.sweep.dir={quoted(str(root))}", "--multirun"]
    stopped = 0
    try:
        code = _run_hydra(_job_task(command, notes, arguments.source), words, arguments)
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
    for job in jobs:
        try:
            compose_run(job, source)
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


def _job_task(command: Command, notes: Path, source: Source) -> Callable[[Any], float]:
    """What Hydra calls for a job. It returns the final reward, for a sweeper that maximises it.

    A failed job returns nan: Hydra's own sweeper goes on, and Optuna's counts the trial as failed.
    """
    flags = ["--config-name", source.name]
    flags += ["--config-dir", str(source.extra)] if source.extra else []

    def run_job(_config: Any) -> float:
        job = HydraConfig.get()
        overrides, directory = list(job.overrides.task), job.runtime.output_dir
        started = time.monotonic()
        code, signum = run_child(command([*flags, *overrides, f"output_dir={quoted(directory)}"]))
        result = Job(
            number=job.job.num,
            overrides=overrides,
            exit_code=code,
            seconds=time.monotonic() - started,
            directory=directory,
        )
        result.read_metrics()
        (notes / f"{result.number}.json").write_text(json.dumps(asdict(result)))
        if signum:
            raise KeyboardInterrupt(PREEMPTED if code == PREEMPTED else 128 + signum)
        return math.nan if code or result.reward is None else result.reward

    return run_job


def run_child(command: list[str]) -> tuple[int, int]:
    """The exit code of `command`, run on our terminal, and the signal that we passed on to it or 0.

    It has a session of its own: a terminal's Ctrl-C reaches it once, through us.
    """
    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(signum: int, _frame: Any) -> None:
        received.append(signum)
        for child in children:
            child.send_signal(signum)

    with _handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), pass_on):
        child = subprocess.Popen(command, start_new_session=True)
        children.append(child)
        for signum in received:  # one came while the child was being made
            child.send_signal(signum)
        code = child.wait()
    return (128 - code if code < 0 else code), (received[0] if received else 0)


@contextmanager
def _handling(signals: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers in the main thread only
        return
    before = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


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


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _run_hydra(task: Callable[[Any], Any], words: list[str], arguments: Arguments) -> int:
    """Hydra's own entry point on `words`: its launchers, sweepers and plugins all work."""
    source, command_line = arguments.source, sys.argv
    sys.argv = [command_line[0], *words, *arguments.flags]
    try:
        hydra.main(version_base="1.3", config_path=str(source.conf), config_name=source.name)(task)()
    except SystemExit as stop:  # Hydra has said why
        return int(bool(stop.code))
    finally:
        sys.argv = command_line
    return DONE


def _check_environment() -> None:
    from rlswitch.environment import check_environment

    if wrong := check_environment():
        raise ConfigError(*wrong)


def _report(lines: Iterable[str], code: int) -> int:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exc()
    for line in lines:
        print(f"rlswitch: error: {' '.join(line.split())}", file=sys.stderr)
    return code


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


if __name__ == "__main__":
    leave(main())
