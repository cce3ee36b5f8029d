"""The accelerator that the tenants share: how much of it is free, and who holds it.

On a machine without a GPU the "device" is the host's memory, so that everything above works the same.
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True, slots=True)
class Device:
    kind: str
    """`cuda` or `cpu`."""

    @classmethod
    def detect(cls) -> Device:
        return cls("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def torch(self) -> torch.device:
        return torch.device(self.kind)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.kind == "cuda" else "CPU"

    def free_bytes(self) -> int:
        """Free memory of the whole device: all processes count, unlike torch's own statistics."""
        if self.kind == "cuda":
            return torch.cuda.mem_get_info()[0]
        return psutil.virtual_memory().available

    def total_bytes(self) -> int:
        if self.kind == "cuda":
            return torch.cuda.mem_get_info()[1]
        return psutil.virtual_memory().total

    def reclaim(self) -> None:
        """Hands memory that nothing uses any more back to the driver or the kernel."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        else:
            trim_heap()

    def describe_holders(self) -> str:
        """Who holds memory now, largest first, for the message of a hand-over that did not come off."""
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        held = sorted(((resident_bytes([p.pid]), p) for p in processes), key=lambda pair: -pair[0])
        rows = [f"{p.name()} (pid {p.pid}) {size / 2**30:.2f} GiB of RAM" for size, p in held[:4]]
        if self.kind == "cuda":
            rows.insert(0, f"this process {torch.cuda.memory_reserved() / 2**30:.2f} GiB of the GPU")
        return ", ".join(rows)


def resident_bytes(pids: list[int]) -> int:
    """Resident memory of these processes together; one that has gone counts nothing."""
    total = 0
    for pid in pids:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
        total += pages * 4096
    return total


def trim_heap() -> None:
    """glibc keeps freed memory; this gives it back to the kernel. Elsewhere there is nothing to do."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        return
