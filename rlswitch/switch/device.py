"""The accelerator that the tenants share: how much is free, and who holds it.

Without a GPU the "device" is host memory, so the code above works unchanged.
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
        """Free memory of the whole device: counts all processes, unlike torch's own statistics."""
        if self.kind == "cuda":
            return torch.cuda.mem_get_info()[0]
        return psutil.virtual_memory().available

    def total_bytes(self) -> int:
        if self.kind == "cuda":
            return torch.cuda.mem_get_info()[1]
        return psutil.virtual_memory().total

    def used_bytes(self, pids: list[int]) -> int:
        """Memory in use: on a GPU by all processes, on a CPU by `pids` alone."""
        if self.kind == "cuda":
            return self.total_bytes() - self.free_bytes()
        return resident_bytes(pids)

    def reclaim(self) -> None:
        """Returns unused memory to the driver or the kernel."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        else:
            trim_heap()

    def describe_holders(self) -> str:
        """Who holds memory now, largest first, for the message of a failed hand-over."""
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        held = sorted(((resident_bytes([p.pid]), p) for p in processes), key=lambda pair: -pair[0])
        rows = [f"{p.name()} (pid {p.pid}) {size / 2**30:.2f} GiB of RAM" for size, p in held[:4]]
        if self.kind == "cuda":
            rows.insert(0, f"this process {torch.cuda.memory_reserved() / 2**30:.2f} GiB of the GPU")
        return ", ".join(rows)


def resident_bytes(pids: list[int]) -> int:
    """Total resident memory of these processes; one that has ended counts as 0."""
    total = 0
    for pid in pids:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
        total += pages * 4096
    return total


def trim_heap() -> None:
    """Returns memory that glibc has freed but kept to the kernel; does nothing with other C libraries."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        return
