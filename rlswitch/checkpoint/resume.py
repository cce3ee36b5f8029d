"""Which checkpoint a run resumes from, and whether it then reproduces the original run. Loads no tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlswitch.checkpoint.atomic import DRAFT, checkpoint_problems, remove, tidy
from rlswitch.config.sections import TENANTS
from rlswitch.errors import ConfigError
from rlswitch.records.provenance import flattened, redacted, resolved
from rlswitch.run import OPTIONS, Run

CHANGED = "changed"

FREE = {
    "length, place and logging of a run": (
        *("num_steps", "recipe", "output_dir", "resume", "mode", "logger", "project"),
        "checkpoint",
    ),
    "an evaluation has its own seeds and leaves neither weights nor prefixes behind": ("evaluation",),
    "every push delivers the same weights, and no sampled token depends on how": (
        *("switch", *(f"{name}.level" for name in TENANTS)),
    ),
    "where tensors lie while others compute": ("trainer.park",),
    "how the engine is started and reached; local and server engines sample the same tokens": (
        *("engine.start_timeout_s", "engine.fork_server", "engine.listen", "engine.url"),
        *("engine.allow_remote", "engine.request_timeout_s", "engine.max_restarts"),
    ),
    "limits of the reward processes, not their results": (
        *("reward.workers", "reward.timeout_s", "reward.memory_gib", "reward.max_error_rate"),
        "reward.allow_unsandboxed",
    ),
    "a permission": ("model.trust_remote_code",),
    "another model is rejected in any case": ("model.path",),
}
"""Settings and sections that may change on resume, each with its reason. All others decide the numbers,
new ones included, until they are listed here."""

OPEN = ("engine.vllm.", "trainer.lr_schedule_kwargs.")
"""Free-form sections: a key that is missing there was not set. Elsewhere a missing key belongs to another
version or algorithm."""
NOT_SET = "not set"
EVALUATES = "evaluation.every"
"""Decides only by being 0 or not, and only if evaluation rows are cut from the training rows."""

Log = Callable[[str], None]


class Resume(NamedTuple):
    """The `resume` setting, parsed.

    resume        the run begins at                                 settings that differ from the saved ones
    never         step 0; the checkpoints there are removed         -
    auto          the newest valid checkpoint, or step 0 if there   are rejected
                  are none; if all are damaged it is an error
    changed       as auto                                           are logged and used
    PATH          that checkpoint; later ones of the run are        are rejected
                  removed; from another run it is a branch, whose
                  output_dir must have no checkpoints yet
    changed:PATH  as PATH                                           are logged and used
    """

    never: bool
    path: Path | None
    allows_changes: bool

    @classmethod
    def parse(cls, text: str) -> Resume:
        word, _, rest = text.partition(":")
        allows_changes = word == CHANGED
        where = rest if allows_changes else text
        named = where not in ("", "auto") and text != "never"
        return cls(text == "never", Path(where) if named else None, allows_changes)


@dataclass(kw_only=True, slots=True)
class LoopState:
    """What a run remembers besides tensors. Everything random is derived from (seed, step)."""

    step: int = 0
    cursor: int = 0
    """Training prompts used so far."""
    wandb_id: str | None = None
    model: str = ""
    """model.path of the run."""
    skipped_in_a_row: int = 0
    flat_in_a_row: int = 0
    """As counted by Health."""


class Start(NamedTuple):
    """Where a run begins."""

    path: Path | None
    """The checkpoint to resume from."""
    state: LoopState
    kept: int
    """Records in the run directory up to this step belong to this run; 0: none do."""
    given_up: list[Path]
    """Checkpoints there that do not belong to this run any more."""


def step_directory(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def steps_in(checkpoints: Path) -> list[Path]:
    """The checkpoint directories, valid or not, oldest first."""
    return sorted((it for it in checkpoints.glob("step_*") if it.name[5:].isdecimal()), key=step_of)


def valid_checkpoints(checkpoints: Path) -> Iterator[Path]:
    """The valid checkpoints, newest first. Reads every byte of each one it visits."""
    return (path for path in reversed(steps_in(checkpoints)) if not any(checkpoint_problems(path)))


def finished(run: Run) -> str | None:
    """The message for a run that has no steps left, else None. Raises ConfigError if it was another run."""
    resume = Resume.parse(run.resume)
    if resume.never or resume.path or run.output_dir is None:
        return None
    steps = steps_in(Path(run.output_dir) / "checkpoints")
    reached = (path for path in reversed(steps) if step_of(path) >= run.num_steps)
    path = next((path for path in reached if not any(checkpoint_problems(path))), None)
    if path is None:
        return None
    read_state(path, run, resume.allows_changes)
    return (
        f"run is complete: {run.output_dir} has step {step_of(path)} of {run.num_steps}; raise num_steps to"
        " continue, or set resume=never or another output_dir to start over"
    )


def choose(run: Run, output_dir: Path, log: Log) -> Start:
    """Where `run` begins. Raises ConfigError if it cannot resume as configured.

    The caller must hold the lock of `output_dir`: leftovers of interrupted saves are removed.
    """
    checkpoints = output_dir / "checkpoints"
    tidy(checkpoints)
    resume, steps = Resume.parse(run.resume), steps_in(checkpoints)
    if resume.never:
        return Start(None, LoopState(), kept=0, given_up=steps)
    path = resume.path or newest(checkpoints, log)
    if path is None:
        return Start(None, LoopState(), kept=0, given_up=[])
    if resume.path:
        problem = next(checkpoint_problems(path), None) if path.is_dir() else "there is no such directory"
        if problem:
            raise ConfigError(f"resume = {run.resume}: {problem}; set resume=auto or another checkpoint")
    state = read_state(path, run, resume.allows_changes, log)
    if resume.path is None:
        return Start(path, state, kept=state.step, given_up=[])
    if path.resolve().parent == checkpoints.resolve():
        later = [it for it in steps if step_of(it) > state.step]
        return Start(path, state, kept=state.step, given_up=later)
    if steps:
        raise ConfigError(
            f"resume = {run.resume}: {checkpoints.parent} has other checkpoints, which would be lost; set"
            f" resume=auto to resume from {steps[-1].name}, or another output_dir"
        )
    state.wandb_id = None  # a branch is a W&B run of its own
    return Start(path, state, kept=0, given_up=[])


def give_up(checkpoints: Iterable[Path]) -> None:
    """Removes them, newest first: an interrupted removal leaves a shorter run, never a gap."""
    for path in sorted(checkpoints, key=step_of, reverse=True):
        draft = path.with_name(f".{path.name}{DRAFT}")  # removed by the next start if not below
        os.replace(path, draft)
        remove(draft)


def newest(checkpoints: Path, log: Log) -> Path | None:
    """The newest valid checkpoint; logs the invalid ones that it skips. None if there are none at all.

    Raises ConfigError if all are invalid: starting over would replace files that may still be of use.
    """
    steps = steps_in(checkpoints)
    for path in reversed(steps):
        problem = next(checkpoint_problems(path), None)
        if problem is None:
            return path
        log(f"skipping checkpoint {path}: {problem}")
    if steps:
        raise ConfigError(
            f"resume = auto: none of the {len(steps)} checkpoints in {checkpoints} is valid; starting over"
            " would replace them; set resume=never to allow that, or another output_dir"
        )
    return None


def read_state(path: Path, run: Run, allows_changes: bool = False, log: Log = lambda _: None) -> LoopState:
    """The loop's part of a checkpoint. Raises ConfigError if resuming would not reproduce the original run.

    With `allows_changes` settings may differ, each logged; the model and the use of a critic never may.
    """
    details = read_details(path)
    state = LoopState(**{name: details[name] for name in LoopState.__slots__ if name in details})
    if state.model != run.model.path:
        raise ConfigError(
            f"resume = {path}: it was saved with model.path {state.model}, the run has {run.model.path};"
            " set resume=never or another output_dir"
        )
    if (path / "critic.safetensors").exists() != run.algorithm.needs_critic:
        having = "without" if run.algorithm.needs_critic else "with"
        raise ConfigError(
            f"resume = {path}: it was trained by an algorithm {having} a critic; set that algorithm, or"
            " another output_dir"
        )
    found = changes(details["settings"], run)
    if found and not allows_changes:
        raise ConfigError(*(_rejection(path, run, *change) for change in found))
    for key, old, new in found:
        log(f"{key} = {new}: was {old} when {path.name} was saved; continuing with {new}")
    return state


def _rejection(path: Path, run: Run, key: str, old: str, new: str) -> str:
    back = "leave it out" if old == NOT_SET else f"set {key}={old}"
    allowing = CHANGED if run.resume == "auto" else f"{CHANGED}:{run.resume}"
    return (
        f"{key} = {new}: was {old} when {path.name} was saved; resuming with it would not reproduce the"
        f" original run; {back}, set another output_dir, or resume={allowing} to continue with {new}"
    )


def read_details(path: Path) -> dict[str, Any]:
    """state.json of a valid checkpoint."""
    details: dict[str, Any] = json.loads((path / "state.json").read_bytes())
    return details


def deciding(run: Run) -> dict[str, Any]:
    """The settings that decide a run's numbers, by dotted key, as JSON values without secrets."""
    free = tuple(f"{key}." for keys in FREE.values() for key in keys)
    settings = flattened(redacted(resolved(run)))
    found = {key: value for key, value in settings.items() if not f"{key}.".startswith(free)}
    return found | ({EVALUATES: run.evaluation.every} if run.data.cuts_held_out_rows else {})


def changes(saved: Mapping[str, Any], run: Run) -> list[tuple[str, str, str]]:
    """Key, old and new value of each deciding setting that differs from the saved one."""
    now = deciding(run)
    keys = [key for key in now if key in saved or key.startswith(OPEN)]
    keys += [key for key in saved if key not in now and key.startswith(OPEN)]
    return [
        (key.removesuffix(".class"), _text(key, saved), _text(key, now))
        for key in keys
        if not _same(key, saved.get(key), now.get(key))
    ]


def _same(key: str, old: Any, new: Any) -> bool:
    return bool(old) == bool(new) if key == EVALUATES else old == new


def _text(key: str, settings: Mapping[str, Any]) -> str:
    """A value as a user writes it."""
    if key not in settings:
        return NOT_SET
    value = settings[key]
    if key == "algorithm.class":
        return next((name for name, it in OPTIONS["algorithm"].items() if it.__name__ == value), str(value))
    return value if isinstance(value, str) else json.dumps(value)
