"""Which checkpoint a run goes on from, and whether it would go on as the same run. Loads no tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlswitch.config import Run
from rlswitch.durable import find_fault, tidy
from rlswitch.exactness import NOT_SET, changes
from rlswitch.types import ConfigError

CHANGED = "changed"

Say = Callable[[str], None]


@dataclass(kw_only=True, slots=True)
class LoopState:
    """What a run has to remember besides tensors. Everything random is derived from (seed, step)."""

    step: int = 0
    cursor: int = 0
    """Training prompts handed out so far."""
    wandb_id: str | None = None
    model: str = ""
    """model.path of the run: the checkpoint of another model is refused."""


def step_directory(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def steps_in(checkpoints: Path) -> list[Path]:
    """The directories of checkpoints, whole or not, the oldest first."""
    return sorted((it for it in checkpoints.glob("step_*") if it.name[5:].isdecimal()), key=step_of)


def finished(run: Run) -> str | None:
    """What to tell somebody who starts a run again that has nothing left to do."""
    if run.resume == "never" or run.output_dir is None:
        return None
    for path in reversed(steps_in(Path(run.output_dir) / "checkpoints")):
        step = step_of(path)
        if step < run.num_steps:
            break
        if find_fault(path) is None:
            return (
                f"run is complete: {run.output_dir} has step {step} of {run.num_steps};"
                " raise num_steps to go on, or set resume=never or another output_dir to start afresh"
            )
    return None


def choose(run: Run, output_dir: Path, say: Say) -> tuple[Path | None, LoopState]:
    """The checkpoint to go on from and its state, or None and a new one. Raises ConfigError.

    Only for whoever holds the lock of `output_dir`: what interrupted saves left there is removed.
    """
    checkpoints = output_dir / "checkpoints"
    tidy(checkpoints)
    if run.resume == "never":
        return None, LoopState()
    allowed = run.resume == CHANGED or run.resume.startswith(f"{CHANGED}:")
    where = run.resume.removeprefix(CHANGED).removeprefix(":") if allowed else run.resume
    if where in ("auto", ""):
        path = newest(checkpoints, say)
    else:
        path = Path(where)
        fault = find_fault(path) if path.is_dir() else "there is no such directory"
        if fault:
            raise ConfigError(f"resume = {run.resume}: {fault}; set resume=auto or another checkpoint")
    if path is None:
        return None, LoopState()
    state = read_state(path, run)
    refuse_changes(path, run, allowed, say)
    return path, state


def newest(checkpoints: Path, say: Say) -> Path | None:
    """The newest checkpoint that is whole; others are named and passed over. None where there is none at all.

    Raises ConfigError when not one is whole: to start afresh would replace what may still be of use.
    """
    steps = steps_in(checkpoints)
    for path in reversed(steps):
        fault = find_fault(path)
        if fault is None:
            return path
        say(f"checkpoint {path} is passed over: {fault}")
    if steps:
        raise ConfigError(
            f"resume = auto: none of the {len(steps)} checkpoints in {checkpoints} is whole; started afresh"
            " the run would replace them; set resume=never if it may, or another output_dir"
        )
    return None


def read_state(path: Path, run: Run) -> LoopState:
    """The loop's part of a checkpoint. Raises ConfigError for another model or kind of algorithm."""
    details = read_details(path)
    state = LoopState(**{name: details[name] for name in LoopState.__slots__})
    if state.model != run.model.path:
        raise ConfigError(
            f"resume = {path}: it is of model.path {state.model}, the run says {run.model.path};"
            " set resume=never or another output_dir"
        )
    if (path / "critic.safetensors").exists() != run.algorithm.needs_critic:
        having = "without" if run.algorithm.needs_critic else "with"
        raise ConfigError(
            f"resume = {path}: it was trained by an algorithm {having} a critic; set the algorithm it"
            " had, or another output_dir"
        )
    return state


def refuse_changes(path: Path, run: Run, allowed: bool, say: Say) -> None:
    """Names each setting that would make it another run; raises ConfigError unless that is `allowed`."""
    found = changes(read_details(path)["settings"], run)
    if allowed:
        for key, old, new in found:
            say(f"{key} = {new}: was {old} when {path.name} was saved; goes on with {new}")
    elif found:
        raise ConfigError(*(_refusal(path, run, *change) for change in found))


def _refusal(path: Path, run: Run, key: str, old: str, new: str) -> str:
    back = "leave it out" if old == NOT_SET else f"set {key}={old}"
    allowing = CHANGED if run.resume == "auto" else f"{CHANGED}:{run.resume}"
    return (
        f"{key} = {new}: was {old} when {path.name} was saved; going on it would not be the run that it was;"
        f" {back}, set another output_dir, or resume={allowing} to go on with it"
    )


def read_details(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that is whole."""
    details: dict[str, Any] = json.loads((path / "state.json").read_bytes())
    return details
