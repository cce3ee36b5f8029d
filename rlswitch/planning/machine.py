"""The machine a plan is for: its memory, its copy rates, and the seconds a switch takes there.

Memory is in bytes, rates in GB/s (1e9 bytes).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import psutil
import torch

from rlswitch.switch.device import Device

GIB = 2**30
PROBE_BYTES = 1 << 26
PER_GB = 1e-9  # seconds for a byte at 1 GB/s
MAP = 2.5e-3 * PER_GB  # CUDA maps or unmaps a GB in 2 to 3 ms: fitted to vLLM's sleep-mode article
CALL_SECONDS = {"cuda": 0.01, "cpu": 0.02}  # a call to the engine: 5 to 20 ms
PAGEABLE = PER_GB / 3  # GPU to unpinned host memory at 2.8 to 4.1 GB/s: sglang#32032
RELOAD, RELOAD_SECONDS = PER_GB / 4, 0.2  # vLLM's loader, from page cache: vllm#48382


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """Facts about the machine that a plan depends on."""

    kind: str
    """`cuda`, or `cpu`: the device is host memory."""
    name: str
    total_bytes: int
    free_bytes: int
    host_free_bytes: int
    h2d_gbps: float
    """Pinned host memory to device; on a CPU a copy within memory."""
    d2h_gbps: float
    copy_gbps: float
    """Within host memory, to a freshly allocated target."""

    @classmethod
    def measure(cls) -> Self:
        """Measures this machine; its copy rates take a fraction of a second."""
        device = Device.detect()
        free, source = device.free_bytes(), torch.ones(PROBE_BYTES, dtype=torch.uint8)
        h2d = d2h = copied = _gbps(lambda: torch.empty_like(source).copy_(source))
        if device.kind == "cuda":
            pinned, there = source.pin_memory(), source.to(device.torch)
            h2d = _gbps(lambda: there.copy_(pinned, non_blocking=True))
            d2h = _gbps(lambda: pinned.copy_(there, non_blocking=True))
        return cls(
            kind=device.kind,
            name=device.name,
            total_bytes=device.total_bytes(),
            free_bytes=free,
            host_free_bytes=psutil.virtual_memory().available,
            h2d_gbps=h2d,
            d2h_gbps=d2h,
            copy_gbps=copied,
        )


def switch_seconds(
    facts: DeviceFacts, level: str, weights: int, kv: int, published: int, parked: int
) -> dict[str, float]:
    """Predicted seconds by phase of a round trip of the device, from the bytes that each phase moves.

    `offload` and `onload` are the trainer's, `sleep` and what wakes the engine's.
    """
    cuda, call, copied = facts.kind == "cuda", CALL_SECONDS[facts.kind], PER_GB / facts.copy_gbps
    backup = weights if cuda and level == "1" else 0
    called = call if level in ("1", "2") else 0
    remapped = weights * MAP if cuda and called else 0
    kv_moved = 0 if level == "0" else kv * (MAP if cuda else copied)
    return {
        "offload": parked * PER_GB / facts.d2h_gbps,
        "publish": published * ((PAGEABLE if cuda else copied) + copied),
        "wake_weights": called + remapped + backup * PER_GB / facts.h2d_gbps,
        "reload": weights * RELOAD + RELOAD_SECONDS if cuda else weights * copied + call,
        "wake_kv_cache": (0 if level == "0" else call) + kv_moved,
        "sleep": call + remapped + (kv_moved if cuda else 0) + backup * PER_GB / facts.d2h_gbps,
        "onload": parked * PER_GB / facts.h2d_gbps,
    }


def _gbps(transfer: Callable[[], object]) -> float:
    """Rate of moving PROBE_BYTES, the better of two tries after a warm-up."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        transfer()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return PROBE_BYTES / min(seconds[1:]) / 1e9


def gib(size: int) -> str:
    """GiB with two decimals; `-` for zero."""
    return f"{size / GIB:.2f}" if size else "-"
