"""Experiment trackers: W&B, TensorBoard and the others that accelerate knows. One that fails is dropped."""

from __future__ import annotations

import json
import logging
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from rlswitch.config.fields import did_you_mean
from rlswitch.processes.signals import reraise_interrupts
from rlswitch.records.provenance import flattened
from rlswitch.run import Run
from rlswitch.text import shortened

if TYPE_CHECKING:  # accelerate imports torch
    from accelerate.tracking import GeneralTracker

TRACKERS = {name: (name,) for name in "aim clearml comet_ml dvclive mlflow swanlab trackio wandb".split()} | {
    "tensorboard": ("tensorboard", "tensorboardX")
}
"""Accelerate's trackers and the modules that provide each; asking accelerate itself would import torch."""


def tracker_problems(names: Sequence[str]) -> list[str]:
    """One line for each tracker that is unknown or not installed; starts nothing."""
    installed = [name for name in names if any(map(find_spec, TRACKERS.get(name, ())))]
    problems = []
    for name in dict.fromkeys(names):
        if name not in TRACKERS:
            fix = f"set one of {', '.join(TRACKERS)}, or logger=[] for none{did_you_mean(name, TRACKERS)}"
            problems.append(f"logger = {name}: no such tracker, nothing would be logged to it; {fix}")
        elif name not in installed:
            fix = f"install {name.replace('_', '-')} or set logger=[{','.join(installed)}]"
            problems.append(f"logger = {name}: not installed, nothing would be logged to it; {fix}")
    return problems


class Trackers:
    """The trackers of a run, started. After its first failure a tracker is dropped with one line."""

    def __init__(
        self,
        run: Run,
        output_dir: Path,
        wandb_id: str | None,
        settings: Mapping[str, Any],
        log_line: Callable[[str], None],
    ):
        self._log_line = log_line
        self.started: dict[str, GeneralTracker] = {}
        for name in dict.fromkeys(run.logger):
            self._attempt(name, self._start, name, settings, run.project, output_dir, wandb_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self.started.items()):
            self._attempt(name, tracker.log, dict(values), step=step)

    def finish(self) -> None:
        for name, tracker in list(self.started.items()):
            self._attempt(name, tracker.finish)

    def _start(self, name: str, settings: Mapping[str, Any], *where: Any) -> None:
        tracker = self.started[name] = build_tracker(name, *where)
        tracker.start()
        # Scalars are the only values that every tracker takes.
        flat = flattened(settings).items()
        scalars = {key: it if isinstance(it, str | int | float) else json.dumps(it) for key, it in flat}
        tracker.store_init_configuration(scalars)
        if name == "wandb" and not wandb_is_offline():
            self._log_line(f"wandb: {tracker.tracker.url}")

    def _attempt(self, name: str, call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        try:
            with reraise_interrupts():
                call(*args, **kwargs)
        except (Exception, SystemExit) as error:
            self.started.pop(name, None)
            cause = shortened(f"{type(error).__name__}: {' '.join(str(error).split())}", 200)
            self._log_line(f"warning: {name} failed: {cause}; the run continues without it")


def build_tracker(name: str, project: str, output_dir: Path, wandb_id: str | None) -> GeneralTracker:
    """An accelerate tracker, not yet started."""
    from accelerate import tracking

    # Accelerate's logger raises before an Accelerator exists, and creating a PartialState here would pick
    # the trainer's device. For the same reason nothing below may ask which process is the main one.
    tracking.logger = logging.getLogger(tracking.__name__)
    cls = tracking.LOGGER_TYPE_TO_CLASS[name]
    where = [str(output_dir / name)] if cls.requires_logging_directory else []
    options = wandb_options(output_dir, wandb_id) if name == "wandb" else {}
    tracker = cls(project, *where, **options)
    tracker.main_process_only = False
    return tracker


def wandb_options(output_dir: Path, run_id: str | None) -> dict[str, Any]:
    """Arguments of wandb.init: files under `output_dir`, quiet, offline without a key."""
    import wandb

    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it advertises when vLLM imports openai
    settings = wandb.Settings(silent=True, console="off", init_timeout=60)
    options = {"dir": str(output_dir), "name": output_dir.name, "id": run_id, "resume": "allow"}
    return options | {"settings": settings} | ({"mode": "offline"} if wandb_is_offline() else {})


def wandb_is_offline() -> bool:
    """Whether W&B only writes files: WANDB_MODE says so, or there is no key for its server."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"] in ("offline", "dryrun")
    if os.environ.get("WANDB_API_KEY"):
        return False
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(server or "") is None
    except (OSError, netrc.NetrcParseError):
        return True
