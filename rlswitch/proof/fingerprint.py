"""An additive hash of weights: the same number from the trainer's tensors and from the engine's.

Each element's bits are mixed and the results are summed modulo 2^64, so the sum does not depend on the
order of elements, nor on how q/k/v or gate/up are fused or sharded. Zeros add nothing, so a padded
vocabulary makes no difference. One changed bit anywhere changes the sum. It misses two exchanged tensors
of the same shape: the canary catches those.
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
    """Hash of a tensor's elements, any shape and dtype; 0 <= result < 2^64.

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
    """Fingerprints by name, after casting floating tensors to `dtype`; a shared storage counts once."""
    seen: dict[tuple[int, int], Tensor] = {}  # keeps them alive, so that no address is reused
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
    """How many elements the checkpoint in `path` holds; reads only the headers of its files."""
    count = 0
    for file in checkpoint_files(path):
        with safe_open(file, framework="pt") as handle:
            count += sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())  # noqa: SIM118
    return count


def checkpoint_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the checkpoint in `path`, one at a time."""
    for file in checkpoint_files(path):
        with safe_open(file, framework="pt") as handle:
            for name in handle.offset_keys():
                yield name, handle.get_tensor(name)


def checkpoint_files(path: Path) -> list[Path]:
    """The files that its index names, or all of them if it has no index."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
    return sorted(path.glob("*.safetensors"))
