"""The one place where metrics leave the program: local files, trackers, the console.

The local files are the record and come first; trackers and the console are conveniences that may
fail, hang or be closed without the run taking notice of more than one line.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from rlswitch.config.fields import did_you_mean
from rlswitch.errors import ConfigError
from rlswitch.records.console import SAMPLE_EVERY, Sample, View, make_display, stdout_console
from rlswitch.records.facts import summary_rows
from rlswitch.records.jsonl import LineFile, Summary, numbers, read, trim
from rlswitch.records.provenance import write_config
from rlswitch.types import Group, Rollout

if TYPE_CHECKING:  # accelerate imports torch
    from accelerate.tracking import GeneralTracker
    from rich.console import Console

    from rlswitch.run import Run

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"
TRACKERS = {name: (name,) for name in "aim clearml comet_ml dvclive mlflow swanlab trackio wandb".split()} | {
    "tensorboard": ("tensorboard", "tensorboardX")
}
"""Accelerate's trackers, and the modules that each is had by: asking accelerate itself would import torch."""
QUEUE_SIZE = 1000
HANG_SECONDS = 120.0
"""A tracker that works on one record for longer is left alone; training never waits for one."""
FINISH_SECONDS = 30.0


class Monitor:
    """Writes metrics.jsonl, rollouts.jsonl and config.yaml; feeds the trackers and the console.

    The files go back to the step `kept`, so that a resumed run leaves the files of an
    uninterrupted one; without it they start empty. For the main process only.
    Example: `with Monitor(run, output_dir) as monitor: monitor.log(1, metrics, groups)`
    """

    def __init__(
        self,
        run: Run,
        output_dir: Path,
        kept: int = 0,
        wandb_id: str | None = None,
        console: Console | None = None,
    ):
        problems = tracker_problems(run.logger)
        if problems:
            raise ConfigError(*problems)
        self.output_dir = output_dir
        self._began = time.monotonic()
        self._given_wandb_id = wandb_id
        self._wandb_id = wandb_id or f"{secrets.randbits(40):08x}"
        self._uses_wandb = "wandb" in run.logger
        self._non_finite: set[str] = set()
        self._sampled_at: int | None = None
        self._closed = False
        output_dir.mkdir(parents=True, exist_ok=True)
        config = write_config(run, output_dir / "config.yaml")
        for name in (METRICS, ROLLOUTS):
            # Before the first checkpoint nothing counts, the evaluation at step 0 included.
            trim(output_dir / name, kept if kept > 0 else -1)
        self._metrics, self._rollouts = (LineFile(output_dir / n) for n in (METRICS, ROLLOUTS))
        self._summary = Summary()
        view = View(title=run.recipe or output_dir.name, num_steps=run.num_steps)
        for record in read(output_dir / METRICS):
            self._summary.add(numbers(record))
            view.add(record["step"], numbers(record))
        self._display = make_display(console or stdout_console(), view)
        self._trackers = self._start_trackers(run, config)

    @property
    def wandb_id(self) -> str | None:
        """What a checkpoint keeps so that a resumed run goes on in the same W&B run."""
        return self._wandb_id if self._uses_wandb else self._given_wandb_id

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("done" if kind is None else f"stopped: {kind.__name__}")

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[Group] = (),
        advantages: Sequence[float] = (),
    ) -> None:
        """One record for `step`; `advantages` are one per rollout, in the order of `groups`."""
        values = {key: plain_number(value) for key, value in metrics.items()}
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        self._metrics.append([metrics_record(step, values)])
        if groups:
            self._rollouts.append(rollout_records(step, groups, advantages))
        self._warn_of_non_finite(step, [key for key in values if key not in finite])
        self._summary.add({"step": step, **finite})
        for tracker in self._trackers:
            tracker.put(step, values)
        self._display.show(step, finite, self._sample(step, groups))

    def phase(self, name: str) -> None:
        """Shows what is going on now."""
        self._display.phase(name)

    def sync(self) -> None:
        """Forces the records to the disk: before a checkpoint, which is to have all those before it."""
        self._metrics.sync()
        self._rollouts.sync()

    def say(self, line: str) -> None:
        """A line that stays on the console."""
        self._display.say(line)

    def close(self, outcome: str = "done") -> None:
        """Ends the trackers and prints what the run came to; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._trackers:
            self._display.phase("finishing " + ", ".join(t.name for t in self._trackers))
        deadline = time.monotonic() + FINISH_SECONDS
        for tracker in self._trackers:
            tracker.finish()
        for tracker in self._trackers:
            tracker.join(deadline - time.monotonic())
        rows = summary_rows(self._summary, time.monotonic() - self._began)
        rows += [("run", str(self.output_dir))]
        rows += [("report", f"python scripts/report.py {self.output_dir}")]
        if self._uses_wandb and wandb_is_offline():
            rows += [("W&B", f"offline; wandb sync {self.output_dir}/wandb/offline-run-*")]
        self._display.close(outcome, rows)
        self._metrics.close()
        self._rollouts.close()

    def _start_trackers(self, run: Run, config: dict[str, Any]) -> list[TrackerThread]:
        threads, flat = [], flattened(config)
        for name in dict.fromkeys(run.logger):
            try:
                tracker = build_tracker(name, run.project, self.output_dir, self._wandb_id)
            except Exception as error:
                self.say(lost(name, f"could not be made: {short(error)}"))
            else:
                threads.append(TrackerThread(name, tracker, flat, self.say))
        return threads

    def _warn_of_non_finite(self, step: int, keys: Iterable[str]) -> None:
        for key in keys:
            if key not in self._non_finite:
                self._non_finite.add(key)
                self.say(f"warning: {key} is not finite at step {step}; written as null")

    def _sample(self, step: int, groups: Sequence[Group]) -> Sample | None:
        """A completion now and then, of another prompt each time."""
        due = self._sampled_at is None or step - self._sampled_at >= SAMPLE_EVERY
        if not due or not groups:
            return None
        self._sampled_at = step
        rollouts = groups[step % len(groups)].rollouts
        if not rollouts:
            return None
        rollout = rollouts[0]
        return Sample(prompt=rollout.prompt.messages, completion=rollout.text, reward=rollout.reward)


def plain_number(value: Any) -> float:
    """An int or float, also from numpy's and torch's scalars."""
    return int(value) if isinstance(value, int) else float(value)


def metrics_record(step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """JSON knows no nan: such a metric is null, and `non_finite` says what it was."""
    record: dict[str, Any] = {"step": step}
    record |= {key: value if math.isfinite(value) else None for key, value in values.items()}
    odd = {key: str(value) for key, value in values.items() if not math.isfinite(value)}
    return record | ({"non_finite": odd} if odd else {})


def rollout_records(step: int, groups: Sequence[Group], advantages: Sequence[float]) -> list[dict[str, Any]]:
    """One record per rollout; those without a reward come last, with `errors` instead of one."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert not advantages or len(advantages) == len(rollouts), "one advantage per rollout"
    records = []
    for i, rollout in enumerate(rollouts):
        record = rollout_record(step, rollout) | {"reward": finite_or_none(rollout.reward)}
        if advantages:
            record["advantage"] = finite_or_none(advantages[i])
        records.append(record)
    failed = [rollout for group in groups for rollout in group.failed]
    return [*records, *(rollout_record(step, it) | {"errors": it.errors} for it in failed)]


def rollout_record(step: int, rollout: Rollout) -> dict[str, Any]:
    record = {
        "step": step,
        "prompt_index": rollout.prompt.index,
        "sample": rollout.sample,
        "prompt": rollout.prompt.messages,
        "completion": rollout.text,
        "rewards": {name: finite_or_none(value) for name, value in rollout.rewards.items()},
        "policy_version": rollout.policy_version,
        "finish_reason": rollout.finish_reason,
    }
    return record | ({"extra": rollout.extra} if rollout.extra else {})


def finite_or_none(value: float) -> float | None:
    number = plain_number(value)
    return number if math.isfinite(number) else None


class TrackerThread:
    """One tracker in a thread of its own: what it raises, or how long it takes, stays there."""

    def __init__(self, name: str, tracker: GeneralTracker, config: dict, say: Callable[[str], None]):
        self.name = name
        self._tracker, self._config, self._say = tracker, config, say
        self._jobs: queue.Queue[Callable[[], Any] | None] = queue.Queue(maxsize=QUEUE_SIZE)
        self._busy_since: float | None = None
        self._lost = False
        self._put(self._start)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: Mapping[str, float]) -> None:
        self._put(lambda: self._tracker.log(dict(values), step=step))

    def finish(self) -> None:
        self._put(self._tracker.finish)
        self._put(None)

    def join(self, seconds: float) -> None:
        if self._lost:
            return
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive():
            self._lose("is still busy at the end of the run")

    def _put(self, job: Callable[[], Any] | None) -> None:
        if self._lost:
            return
        began = self._busy_since
        if began is not None and time.monotonic() - began > HANG_SECONDS:
            self._lose(f"has not answered for {HANG_SECONDS:.0f} s")
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._lose(f"is {QUEUE_SIZE} records behind")

    def _start(self) -> None:
        self._tracker.start()
        self._tracker.store_init_configuration(self._config)
        if self.name == "wandb" and not wandb_is_offline():
            self._say(f"wandb: {self._tracker.tracker.url}")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._lost:
            self._busy_since = time.monotonic()
            try:
                job()
            except BaseException as error:  # a SystemExit would end the thread unnoticed
                self._lose(f"failed: {short(error)}")
            self._busy_since = None

    def _lose(self, reason: str) -> None:
        if not self._lost:
            self._lost = True
            self._say(lost(self.name, reason))


def lost(name: str, reason: str) -> str:
    return f"warning: {name} {reason}; the run goes on without it, {METRICS} has everything"


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def tracker_problems(names: Sequence[str]) -> list[str]:
    """One line for each tracker that is unknown or not installed; starts nothing."""
    installed = [name for name in names if any(map(find_spec, TRACKERS.get(name, ())))]
    problems = []
    for name in names:
        if name not in TRACKERS:
            problems.append(
                f"logger = {name}: no such tracker, nothing would be logged to it; set one of"
                f" {', '.join(TRACKERS)}, or logger=[] for none{did_you_mean(name, TRACKERS)}"
            )
        elif name not in installed:
            problems.append(
                f"logger = {name}: the package is not installed, nothing would be logged to it;"
                f" install {name.replace('_', '-')} or set logger=[{','.join(installed)}]"
            )
    return problems


def build_tracker(name: str, project: str, output_dir: Path, wandb_id: str) -> GeneralTracker:
    """An accelerate tracker, not yet started. Imports happen here, in the main thread."""
    from accelerate import tracking

    # Its own logger raises before an Accelerator exists, and making a PartialState here would pick
    # the device for the trainer. For the same reason nothing below may ask who the main process is.
    tracking.logger = logging.getLogger(tracking.__name__)
    cls = tracking.LOGGER_TYPE_TO_CLASS[name]
    where = [str(output_dir / name)] if cls.requires_logging_directory else []
    options = wandb_options(output_dir, wandb_id) if name == "wandb" else {}
    tracker = cls(project, *where, **options)
    tracker.main_process_only = False
    return tracker


def wandb_options(output_dir: Path, run_id: str) -> dict[str, Any]:
    """Arguments of wandb.init: files under `output_dir`, quiet, offline without a key."""
    import wandb

    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it advertises when vLLM imports openai
    settings = wandb.Settings(silent=True, console="off", init_timeout=60)
    options = {
        "dir": str(output_dir),
        "name": output_dir.name,
        "id": run_id,
        "resume": "allow",
        "settings": settings,
    }
    if wandb_is_offline() and "WANDB_MODE" not in os.environ:
        options["mode"] = "offline"
    return options


def wandb_is_offline() -> bool:
    """Whether W&B will only write files: WANDB_MODE says so, or there is no key for its server."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"] in ("offline", "dryrun")
    if os.environ.get("WANDB_API_KEY"):
        return False
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(server or "") is None
    except (OSError, netrc.NetrcParseError):
        return True


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `trainer.lr: 1e-6`: the only shape that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str | int | float) else json.dumps(value)
    return flat
