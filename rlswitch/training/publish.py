"""Publishes the trainer's weights: every version is a new checkpoint that the engine reloads.

A path is never reused: an engine may have the old file mapped into memory (vllm#32718).
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from rlswitch.errors import ConfigError
from rlswitch.proof.fingerprint import named_fingerprints, total_fingerprint
from rlswitch.training import lora
from rlswitch.types import Canary, PolicyWeights

SHM = Path("/dev/shm")
PREFIX = "rlswitch-"
LOCK = ".lock"


class Publisher:
    """Owns the directory of published versions; it holds the newest one and the one before."""

    def __init__(self, transport: str, nbytes: int, output_dir: Path):
        """Raises ConfigError when `transport` is shm and two versions of `nbytes` do not fit."""
        parent = choose_directory(transport, nbytes, output_dir)
        for directory in {SHM, parent}:
            sweep_dead_runs(directory)
        self.root = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{owner_tag()}-", dir=parent))
        self._lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.published: list[Path] = []

    def publish(self, model: nn.Module, dtype: torch.dtype, version: int, canary: Canary) -> PolicyWeights:
        """Writes `model`, adapters merged, as safetensors in the engine's dtype."""
        tensors = cast_state(model, dtype)
        fingerprints = named_fingerprints(tensors.items())  # save_pretrained empties the dict
        path = self.root / f"v{version:06d}"
        for old in self.published[:-1]:  # before writing: there is space for two versions
            shutil.rmtree(old, ignore_errors=True)
        del self.published[:-1]
        lora.base_of(model).save_pretrained(path, state_dict=tensors, safe_serialization=True)
        self.published.append(path)
        return PolicyWeights(
            version=version,
            path=path,
            nbytes=sum(file.stat().st_size for file in path.glob("*.safetensors")),
            fingerprint=total_fingerprint(fingerprints.values()),
            tensors=fingerprints,
            canary=canary,
        )

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        os.close(self._lock)


def cast_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint of `model` by name: floating tensors in `dtype`, tied tensors once."""
    tied = set(lora.base_of(model).all_tied_weights_keys)
    return {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        for name, tensor in lora.merged_tensors(model)
        if name not in tied
    }


def choose_directory(transport: str, nbytes: int, output_dir: Path) -> Path:
    """/dev/shm for shm, or for auto if two versions fit there with room to spare; else the run directory."""
    need = 2 * nbytes
    free = shutil.disk_usage(SHM).free if SHM.is_dir() and os.access(SHM, os.W_OK) else 0
    if transport == "shm" and free < need:
        raise ConfigError(
            f"switch.transport = shm: {SHM} has {free / 2**20:.0f} MiB free, two versions of the weights need"
            f" {need / 2**20:.0f} MiB; a push would fail half-way; set switch.transport=disk"
        )
    if transport == "shm" or (transport == "auto" and free > need + (1 << 28)):
        return SHM
    return output_dir


def owner_tag() -> str:
    """Identifies this process by pid and start time: pids are reused."""
    process = psutil.Process()
    return f"{process.pid}-{int(process.create_time() * 100)}"


def sweep_dead_runs(directory: Path) -> None:
    """Removes directories that dead runs of this user left behind."""
    for path in directory.glob(f"{PREFIX}*-*-*"):
        with suppress(OSError, ValueError):  # already removed, or another program's name
            pid, born = map(int, path.name.removeprefix(PREFIX).split("-")[:2])
            ours = path.stat().st_uid == os.getuid()
            if ours and not _alive(pid, born) and not _is_locked(path / LOCK):
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int, born: int) -> bool:
    try:
        return int(psutil.Process(pid).create_time() * 100) == born
    except psutil.NoSuchProcess:
        return False


def _is_locked(path: Path) -> bool:
    """Whether the owner is alive although its pid is not: in another container, or after a clock change."""
    try:
        with path.open("r+") as file:  # NFS locks need write access
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # otherwise there is no lock file, or the file system has no locks
        return isinstance(error, BlockingIOError)
    return False
