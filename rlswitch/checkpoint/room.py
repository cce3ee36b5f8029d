"""Whether a run's checkpoints fit on the disk, told before anything is started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rlswitch.errors import ConfigError
from rlswitch.planning.footprint import ModelShape
from rlswitch.run import Run

FLOAT32 = 4
ADAM = 2
"""Its moments, as large as what is trained, in float32 too."""


def checkpoint_size(run: Run, shape: ModelShape, itemsize: int) -> int:
    """Bytes of one checkpoint: its tensors. `itemsize` is the engine's, in which a reference is kept."""
    trained = shape.adapters or shape.parameters
    size = FLOAT32 * (1 + ADAM) * trained
    if run.algorithm.needs_critic:
        size += FLOAT32 * (1 + ADAM) * ((shape.adapters or shape.backbone) + shape.hidden)
    if run.algorithm.needs_reference and run.algorithm.reference_refresh:
        size += FLOAT32 * shape.adapters if shape.adapters else itemsize * shape.parameters
    if run.checkpoint.merged:
        size += FLOAT32 * shape.parameters
    return size


def room_needed(run: Run, size: int, first_step: int, kept: int) -> int:
    """Bytes that checkpoints of `size` will take beside the `kept` that are there already.

    The oldest goes only once the newest is complete: for a moment there is one more than checkpoint.keep.
    """
    every = run.checkpoint.every or run.num_steps
    saves = -(-run.num_steps // every) - first_step // every
    return size * max(min(saves, run.checkpoint.keep + 1 - kept), 1)


def refuse_full_disk(run: Run, output_dir: Path, need: int, published: int) -> None:
    """Raises ConfigError where `need` bytes of checkpoints and `published` of pushes have no room."""
    free = shutil.disk_usage(output_dir).free
    if free < need + published:
        also = f" and pushes {_gb(published)}" if published else ""
        raise ConfigError(
            f"output_dir = {output_dir}: {_gb(free)} free, checkpoints need {_gb(need)} more{also}; a save"
            f" would fail half-way; make room, keep fewer than checkpoint.keep={run.checkpoint.keep}, or set"
            " another output_dir"
        )
    checkpoints = output_dir / "checkpoints"
    if checkpoints.is_dir() and not os.access(checkpoints, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output_dir = {output_dir}: its checkpoints/ cannot be written to; a save would fail; set the"
            " permissions, or another output_dir"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
