"""Which checkpoint a run goes on from, and whether it would go on as the same run. Loads no tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlswitch.checkpoint.atomic import DRAFT, find_fault, remove, tidy
from rlswitch.checkpoint.exactness import NOT_SET, changes
from rlswitch.errors import ConfigError
from rlswitch.run import Run

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
    skipped_in_a_row: int = 0
    flat_in_a_row: int = 0
    """As health.py counts them."""


class Start(NamedTuple):
    """Where a run begins."""

    path: Path | None
    """The checkpoint that it goes on from."""
    state: LoopState
    kept: int
    """Up to this step the records in its directory are its own past; 0: none are."""
    given_up: list[Path]
    """Checkpoints there that are not."""


def step_directory(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def steps_in(checkpoints: Path) -> list[Path]:
    """The directories of checkpoints, whole or not, the oldest first."""
    return sorted((it for it in checkpoints.glob("step_*") if it.name[5:].isdecimal()), key=step_of)


def whole_in(checkpoints: Path) -> Iterator[Path]:
    """Those that are whole, the newest first. Reads every byte of each that is looked at."""
    return (path for path in reversed(steps_in(checkpoints)) if find_fault(path) is None)


def finished(run: Run) -> str | None:
    """What to tell somebody who starts a run again that has nothing left to do.

    Raises ConfigError when it would have been another run.
    """
    if run.resume not in ("auto", CHANGED) or run.output_dir is None:
        return None
    for path in reversed(steps_in(Path(run.output_dir) / "checkpoints")):
        step = step_of(path)
        if step < run.num_steps:
            break
        if find_fault(path) is None:
            read_state(path, run, allowed=run.resume == CHANGED)
            return (
                f"run is complete: {run.output_dir} has step {step} of {run.num_steps};"
                " raise num_steps to go on, or set resume=never or another output_dir to start afresh"
            )
    return None


def choose(run: Run, output_dir: Path, say: Say) -> Start:
    """The checkpoint to go on from and its state, or None and a new one. Raises ConfigError.

    Only for whoever holds the lock of `output_dir`: what interrupted saves left there is removed.
    """
    checkpoints = output_dir / "checkpoints"
    tidy(checkpoints)
    if run.resume == "never":
        return Start(None, LoopState(), kept=0, given_up=steps_in(checkpoints))
    allowed = run.resume == CHANGED or run.resume.startswith(f"{CHANGED}:")
    where = run.resume.removeprefix(CHANGED).removeprefix(":") if allowed else run.resume
    if where not in ("auto", ""):
        return _start_from(Path(where), run, checkpoints, allowed, say)
    path = newest(checkpoints, say)
    if path is None:
        return Start(None, LoopState(), kept=0, given_up=[])
    state = read_state(path, run, allowed, say)
    return Start(path, state, kept=state.step, given_up=[])


def _start_from(path: Path, run: Run, checkpoints: Path, allowed: bool, say: Say) -> Start:
    """At the checkpoint that `resume` names: this run goes back to it, or is a branch of another run."""
    fault = find_fault(path) if path.is_dir() else "there is no such directory"
    if fault:
        raise ConfigError(f"resume = {run.resume}: {fault}; set resume=auto or another checkpoint")
    state = read_state(path, run, allowed, say)
    steps = steps_in(checkpoints)
    if path.resolve().parent == checkpoints.resolve():
        return Start(path, state, kept=state.step, given_up=[it for it in steps if step_of(it) > state.step])
    if steps:
        raise ConfigError(
            f"resume = {run.resume}: {checkpoints.parent} has checkpoints of its own, which would be lost;"
            f" set resume=auto to go on from {steps[-1].name}, or another output_dir"
        )
    state.wandb_id = None  # that run's: this one is another
    return Start(path, state, kept=0, given_up=[])


def give_up(checkpoints: Iterable[Path]) -> None:
    """Removes them, the newest first: whenever it is broken off, what is left is the run cut back."""
    for path in sorted(checkpoints, key=step_of, reverse=True):
        draft = path.with_name(f".{path.name}{DRAFT}")  # a start removes it, should we not
        os.replace(path, draft)
        remove(draft)


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


def read_state(path: Path, run: Run, allowed: bool = False, say: Say = lambda _: None) -> LoopState:
    """The loop's part of a checkpoint. Raises ConfigError where going on from it would be another run.

    With `allowed` settings may differ, and `say` gets a line for each that does; never model or critic.
    """
    details = read_details(path)
    state = LoopState(**{name: details[name] for name in LoopState.__slots__ if name in details})
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
    found = changes(details["settings"], run)
    if found and not allowed:
        raise ConfigError(*(_refusal(path, run, *change) for change in found))
    for key, old, new in found:
        say(f"{key} = {new}: was {old} when {path.name} was saved; goes on with {new}")
    return state


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
