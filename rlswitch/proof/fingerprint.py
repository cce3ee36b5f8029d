"""An additive hash of weights: the same number from the trainer's tensors and from the engine's.

Every element's bits are mixed and the results summed modulo 2^64, so the sum does not depend on the
order of elements, nor on how q/k/v or gate/up were fused or sharded. Zeros add nothing, so a padded
vocabulary does not show. One changed bit anywhere changes the sum. What it cannot see is two tensors
of one shape exchanged: that is the canary's part of the proof.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

MASK = (1 << 64) - 1
_CHUNK = 1 << 22  # elements mixed at once: bounds the int64 scratch to 32 MiB
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTORS = (-7046029254386353131, -4658895280553007687)  # odd 64-bit constants of splitmix64


def tensor_fingerprint(tensor: Tensor) -> int:
    """Hash of one tensor's elements, any shape and dtype; 0 <= result < 2^64.

    Example: tensor_fingerprint(torch.zeros(3)) == 0
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = 0
    for start in range(0, bits.numel(), _CHUNK):
        mixed = bits[start : start + _CHUNK].to(torch.int64)
        for factor in _FACTORS:
            mixed = mixed * factor  # wraps modulo 2^64, on every device
            mixed ^= mixed >> 32
        total += int(mixed.sum())
    return total & MASK


def named_fingerprints(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Fingerprint by name, after a cast of floating tensors to `dtype`; a shared storage counts once."""
    seen: dict[tuple[int, int], Tensor] = {}  # keeps them alive: no address is used twice
    result = {}
    for name, tensor in tensors:
        storage = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and storage in seen:
            continue
        seen[storage] = tensor
        cast = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        result[name] = tensor_fingerprint(cast)
    return result


def total_fingerprint(fingerprints: Iterable[int]) -> int:
    """The fingerprint of the union of disjoint tensors."""
    return sum(fingerprints) & MASK


def checkpoint_elements(path: Path) -> int:
    """How many numbers the checkpoint in `path` holds; of its files the headers are read."""
    count = 0
    for file in checkpoint_files(path):
        with safe_open(file, framework="pt") as handle:
            count += sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())  # noqa: SIM118
    return count


def checkpoint_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of the checkpoint in `path`, one at a time."""
    for file in checkpoint_files(path):
        with safe_open(file, framework="pt") as handle:
            for name in handle.offset_keys():
                yield name, handle.get_tensor(name)


def checkpoint_files(path: Path) -> list[Path]:
    """Those that its index names, or, without one, all."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
    return sorted(path.glob("*.safetensors"))
