"""A run directory: owned by one run at a time, on a disk with room for its checkpoints."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path

from rlswitch.errors import ConfigError
from rlswitch.planning.footprint import ModelShape
from rlswitch.run import Run

LOCK = ".lock"
FLOAT32 = 4
TRAINED = 3 * FLOAT32
"""Bytes of a trained parameter with Adam's two moments."""


@contextmanager
def only_run_in(directory: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Creates `directory` and locks it. Raises ConfigError if another run holds it or it is not writable.

    The lock ends with its owner: no program that the owner starts inherits the file (PEP 446). A directory
    left empty is removed.
    """
    path = directory / LOCK
    with ExitStack() as stack:
        try:
            while True:
                directory.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("ab+", buffering=0))
                _lock(file, directory, log)
                if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    break  # otherwise the previous owner has just removed the file: retry with the new one
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError as error:
            raise ConfigError(
                f"output_dir = {directory}: cannot be written to ({error.strerror}); set a writable directory"
            ) from error
        try:
            yield
        finally:
            with suppress(OSError):  # the directory has been removed
                if os.listdir(directory) == [LOCK]:
                    path.unlink()
                    directory.rmdir()


def _lock(file: FileIO, directory: Path, log: Callable[[str], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = "another run"
        with suppress(ValueError, KeyError, TypeError):  # it has only just taken the lock
            file.seek(0)
            who = "a run with pid {pid} on host {host}".format_map(json.load(file))
        raise ConfigError(
            f"output_dir = {directory}: {who} is using it; both would write the same files; wait until it"
            " ends, or set another output_dir"
        ) from error
    except OSError as error:  # some network file systems
        log(f"{directory} cannot be locked ({error.strerror}): make sure that no second run uses it")


def checkpoint_size(run: Run, shape: ModelShape, itemsize: int) -> int:
    """Bytes of one checkpoint's tensors. `itemsize`: of the engine's dtype, which the reference has too."""
    size = TRAINED * (shape.adapters or shape.parameters)
    if run.algorithm.needs_critic:
        size += TRAINED * ((shape.adapters or shape.backbone) + shape.hidden)
    if run.algorithm.needs_reference and run.algorithm.reference_refresh:
        size += FLOAT32 * shape.adapters if shape.adapters else itemsize * shape.parameters
    if run.checkpoint.merged:
        size += FLOAT32 * shape.parameters
    return size


def room_needed(run: Run, size: int, first_step: int, kept: int) -> int:
    """Bytes that checkpoints of `size` will take in addition to the `kept` existing ones.

    The oldest is removed only once the newest is complete, so there is briefly one more than checkpoint.keep.
    """
    every = run.checkpoint.every or run.num_steps
    saves = -(-run.num_steps // every) - first_step // every
    return size * max(min(saves, run.checkpoint.keep + 1 - kept), 1)


def check_disk_space(run: Run, output_dir: Path, need: int, published: int) -> None:
    """Raises ConfigError unless `need` bytes of checkpoints and `published` bytes of pushes fit the disk."""
    free = shutil.disk_usage(output_dir).free
    if free < need + published:
        also = f" and pushes {_gb(published)}" if published else ""
        raise ConfigError(
            f"output_dir = {output_dir}: {_gb(free)} free, checkpoints need {_gb(need)} more{also}; a save"
            f" would fail; free space, lower checkpoint.keep={run.checkpoint.keep}, or set another output_dir"
        )
    checkpoints = output_dir / "checkpoints"
    if checkpoints.is_dir() and not os.access(checkpoints, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output_dir = {output_dir}: its checkpoints/ cannot be written to; a save would fail; fix the"
            " permissions, or set another output_dir"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
