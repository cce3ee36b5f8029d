"""One job of a sweep: its process, and how it ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlswitch.processes.exit import POLITE
from rlswitch.processes.fork_server import start_process
from rlswitch.processes.signals import handling
from rlswitch.records.jsonl import read

RunJob = Callable[[list[str]], object]
"""Runs a job, given its words, in the job's own process, and exits that process with the job's exit code."""


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


def run_child(target: RunJob, words: list[str]) -> tuple[int, int]:
    """The exit code of a process that runs `target(words)`, and the signal that was passed on to it, or 0.

    It writes to the same terminal in its own process group: Ctrl-C reaches it once, through us.
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
        for signum in received:  # one arrived while the child was starting
            os.kill(child.pid, signum)
        child.join()
    code = child.exitcode or 0
    return (128 - code if code < 0 else code), (received[0] if received else 0)
