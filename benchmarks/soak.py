"""A run with random faults must end like one without, and must not leak."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from rlswitch.checkpoint.resume import step_directory
from rlswitch.command.cli import main
from rlswitch.engines.vllm.backend import VLLMBackend
from rlswitch.errors import RLSwitchError
from rlswitch.processes.exit import DONE, FAILED, PREEMPTED, leave
from rlswitch.processes.fork_server import start_process
from rlswitch.records import jsonl as records
from rlswitch.records.monitor import METRICS, ROLLOUTS, Monitor
from rlswitch.records.provenance import versions
from rlswitch.switch.device import Device, resident_bytes
from rlswitch.switch.ledger import SWITCH, Ledger
from rlswitch.training.publish import SHM

from .settings import SoakSettings
from .tables import hardware

FAULTS = {
    "engine worker killed": 3,
    "engine core killed": 3,
    "engine stopped": 1,
    "fork server killed": 1,
    "reward workers killed": 2,
    "run killed": 1,
    "run told to stop": 1,
}
"""The faults and their relative weights."""
LATE = ("run killed", "run told to stop", "fork server killed")
"""Only injected in the second half: the first half needs one long-lived process to show leaks."""
MAX_DELAY_SECONDS = 0.05
"""A fault strikes within so many seconds after its phase begins."""
CLOCKS = ("timing_s/", "perf/", "switch/")
"""Metrics that differ between two identical runs."""
SLACK = {"rss_mib": 64.0, "engine_rss_mib": 64.0, "descriptors": 4.0, "threads": 3.0, "shm_mib": 0.5}
"""Allowed growth from the first to the last third of a process's steps."""
FAULT_LOG, SAMPLES = "faults.jsonl", "samples.jsonl"


@dataclass(kw_only=True, slots=True)
class Report:
    seed: int
    steps: int
    hand_overs: int = 0
    """Hand-overs of the disturbed run, including repeated ones."""
    faults: dict[str, int] = field(default_factory=dict)
    engine_restarts: int = 0
    run_starts: int = 0
    stale_rollouts: int = 0
    """Rollouts sampled from another policy version than the step's."""
    unproven_steps: int = 0
    differing: list[str] = field(default_factory=list)
    """Files that differ from the undisturbed run's."""
    growth: dict[str, dict[str, float]] = field(default_factory=dict)
    """By run and resource, over the longest life of the run's process."""
    watched_steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        grown = [
            f"{name} grew by {by:g}, {run}"
            for run, found in self.growth.items()
            for name, by in found.items()
            if by > SLACK[name]
        ]
        stale = [f"{self.stale_rollouts} rollouts of a wrong version"] if self.stale_rollouts else []
        unproven = [f"{self.unproven_steps} steps not proven"] if self.unproven_steps else []
        return [*(f"{name} differs" for name in self.differing), *stale, *unproven, *grown]


def soak(settings: SoakSettings) -> int:
    """Runs twice, compares, prints a summary and writes OUTPUT_DIR/soak.json. Returns the exit code."""
    root = Path(settings.output_dir).absolute()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
    console = Console(highlight=False, markup=False)
    console.print(f"seed={seed}  {settings.num_steps} steps per run, without and with faults")
    report = Report(seed=seed, steps=settings.num_steps)
    for name, rate in (("straight", 0.0), ("disturbed", settings.rate)):
        began = time.monotonic()
        report.run_starts = run_until_complete(settings, root / name, seed, rate)
        report.seconds[name] = round(time.monotonic() - began, 1)
        console.print(f"{name}: {report.seconds[name]:.0f} s, started {report.run_starts} times")
    judge(report, root / "straight", root / "disturbed", settings.num_steps)
    console.print(render(report))
    used = {name: value for name, value in asdict(settings).items() if name != "output_dir"}
    facts = {"hardware": hardware(Device.detect()), "versions": versions(), "settings": used}
    (root / "soak.json").write_text(json.dumps(asdict(report) | facts, indent=1))
    console.print(f"written: {root / 'soak.json'}")
    for failure in report.failures:
        console.print(f"FAILED: {failure}")
    return FAILED if report.failures else DONE


def run_until_complete(settings: SoakSettings, out: Path, seed: int, rate: float) -> int:
    """Restarts the run until it completes; returns the number of starts. Raises RLSwitchError."""
    words = [
        *("recipe=grpo", f"model.path={settings.model}", f"data.path={settings.data}", "logger=[]"),
        *(f"num_steps={settings.num_steps}", f"output_dir={out}", "data.eval_rows=32"),
        *(
            "rollout.num_prompts=8",
            "rollout.group_size=4",
            "trainer.lr=3e-5",
            "evaluation.every=10",
            "checkpoint.every=5",
        ),
        *(f"engine.request_timeout_s={settings.request_timeout_s}", "engine.max_restarts=9"),
    ]
    out.mkdir()
    ended = out / "exit_code"  # the fork server, which knows the exit code, may be killed too
    for life in range(1, 1000):
        with open(out / "output.txt", "ab") as output:
            process = start_process(
                run_with_faults,
                [str(out), f"{seed}/{life}", rate, settings.num_steps, words],
                outputs=(output.fileno(), output.fileno()),
            )
        process.join()
        code = int(ended.read_text()) if ended.exists() else -signal.SIGKILL
        ended.unlink(missing_ok=True)
        if code == DONE:
            return life
        if code not in (PREEMPTED, -signal.SIGKILL):
            raise RLSwitchError(f"the run exited with {code}; see {out / 'output.txt'}")
    raise RLSwitchError(f"the run did not complete within {life} starts; lower rate")


def run_with_faults(out: str, seed: str, rate: float, num_steps: int, words: list[str]) -> None:
    """train.py with a fault injector in its process."""
    FaultInjector(Path(out), seed, rate, num_steps).install()
    code = main(words)
    Path(out, "exit_code").write_text(str(code))
    leave(code)


class FaultInjector:
    """Injects faults into phases; logs them, and after every step the resources in use."""

    def __init__(self, out: Path, seed: str, rate: float, num_steps: int):
        self._rng, self._seed = random.Random(seed), seed
        self._rate, self._num_steps = rate, num_steps
        self._faults, self._samples = (records.LineFile(out / name) for name in (FAULT_LOG, SAMPLES))
        self._engine: list[psutil.Process] = []
        """The engine's worker and core."""

    def install(self) -> None:
        def watched(enter: Callable) -> Callable:
            @contextmanager
            def phase(ledger: Ledger, name: str, *args: Any) -> Iterator[Any]:
                with enter(ledger, name, *args) as it:
                    if self._rng.random() < self._rate:
                        self._schedule(ledger.step, name)
                    yield it

            return phase

        log, start = Monitor.log, VLLMBackend.__init__

        def logged(monitor: Monitor, step: int, *args: Any) -> None:
            log(monitor, step, *args)
            self._samples.append([{"step": step, "life": self._seed, **resources(self._engine)}])

        def started(backend: VLLMBackend, *args: Any, **kwargs: Any) -> None:
            self._engine = backend.family.vital
            start(backend, *args, **kwargs)

        Ledger.phase, Ledger.work = watched(Ledger.phase), watched(Ledger.work)  # type: ignore[method-assign]
        Monitor.log, VLLMBackend.__init__ = logged, started  # type: ignore

    def _schedule(self, step: int, phase: str) -> None:
        kinds = [it for it in FAULTS if it not in LATE or step > self._num_steps / 2]
        kind = self._rng.choices(kinds, [FAULTS[it] for it in kinds])[0]
        seconds = self._rng.uniform(0, MAX_DELAY_SECONDS)
        timer = threading.Timer(seconds, self._inject, [step, phase, kind])
        timer.daemon = True
        timer.start()

    def _inject(self, step: int, phase: str, kind: str) -> None:
        victims, number = self._victims(kind)
        self._faults.append([{"step": step, "phase": phase, "fault": kind, "victims": len(victims)}])
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(number)

    def _victims(self, kind: str) -> tuple[list[psutil.Process], int]:
        process = psutil.Process()
        victims = {
            "engine worker killed": self._engine[:1],
            "engine core killed": self._engine[1:],
            "engine stopped": self._engine[1:],
            "fork server killed": [psutil.Process(os.getppid())],
            "reward workers killed": [
                worker
                for supervisor in process.children()
                if any("supervisor" in word for word in supervisor.cmdline())
                for worker in supervisor.children()
            ],
        }
        number = {"engine stopped": signal.SIGSTOP, "run told to stop": signal.SIGTERM}
        return victims.get(kind, [process]), number.get(kind, signal.SIGKILL)


def resources(engine: list[psutil.Process]) -> dict[str, float]:
    """Resources that this process, its engine and /dev/shm use now."""
    process = psutil.Process()
    ours = [it for it in SHM.iterdir() if it.name.startswith(("rlswitch-", "psm_", "sem.mp-"))]
    return {
        "rss_mib": process.memory_info().rss / 2**20,
        "engine_rss_mib": resident_bytes([it.pid for it in engine]) / 2**20,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "shm_mib": sum(_size(it) for it in ours) / 2**20,
    }


def _size(path: Path) -> int:
    with suppress(OSError):
        return sum(it.stat().st_size for it in path.rglob("*")) if path.is_dir() else path.stat().st_size
    return 0


def judge(report: Report, straight: Path, out: Path, num_steps: int) -> None:
    """Fills in `report` from the two runs' directories."""
    report.faults = dict(Counter(row["fault"] for row in records.read(out / FAULT_LOG) if row["victims"]))
    switches = list(records.read(out / SWITCH))
    hand_overs = [key for key, _ in groupby((row["step"], row["from"], row["to"]) for row in switches)]
    report.hand_overs = sum(bool(source and target) for _, source, target in hand_overs)
    report.engine_restarts = sum(row["phase"] == "restart" for row in switches)
    report.stale_rollouts = sum(
        row["policy_version"] != row["step"] - 1 for row in records.read(out / ROLLOUTS)
    )
    metrics = list(records.read(out / METRICS))
    report.unproven_steps = sum(row["switch/verified"] != 1 for row in metrics)
    reproducible = [
        [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in records.read(it / METRICS)]
        for it in (straight, out)
    ]
    report.differing += [METRICS] if reproducible[0] != reproducible[1] else []
    last = step_directory(Path("checkpoints"), num_steps)
    names = [Path(ROLLOUTS), *(it.relative_to(straight) for it in (straight / last).rglob("*.safetensors"))]
    report.differing += [
        str(name) for name in names if (straight / name).read_bytes() != (out / name).read_bytes()
    ]
    for run in (straight, out):
        lives = [list(rows) for _, rows in groupby(records.read(run / SAMPLES), key=lambda row: row["life"])]
        longest = max(lives, key=len)
        report.watched_steps[run.name], third = len(longest), max(len(longest) // 3, 1)
        report.growth[run.name] = {
            name: round(median(values[-third:]) - median(values[:third]), 2)
            for name in SLACK
            if (values := [row[name] for row in longest])
        }


def render(report: Report) -> Table:
    table = Table("quantity", "result", box=box.SIMPLE)
    table.add_row("hand-overs", str(report.hand_overs))
    for name, count in sorted(report.faults.items()):
        table.add_row(name, str(count))
    table.add_row("engine restarts", str(report.engine_restarts))
    table.add_row("run starts", str(report.run_starts))
    table.add_row("rollouts of a wrong version", str(report.stale_rollouts))
    table.add_row("steps not proven", str(report.unproven_steps))
    table.add_row(
        "records and weights",
        "; ".join(report.differing) or "identical to the undisturbed run, byte for byte",
    )
    for run, found in report.growth.items():
        for name, by in found.items():
            table.add_row(f"growth of {name}, {run}, over {report.watched_steps[run]} steps", f"{by:g}")
    return table
