"""What the additive hash ignores, and what it always detects."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from rlswitch.proof import fingerprint
from rlswitch.proof.fingerprint import (
    checkpoint_elements,
    named_fingerprints,
    tensor_fingerprint,
    total_fingerprint,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 999))
def test_order_and_shape_do_not_matter(seed: int):
    tensor = noise(6, 8, seed=seed)
    hashed = tensor_fingerprint(tensor)
    shuffled = tensor.flatten()[torch.randperm(48)]
    assert tensor_fingerprint(shuffled) == hashed
    assert tensor_fingerprint(tensor.reshape(4, 12)) == hashed
    assert tensor_fingerprint(tensor.t()) == hashed


@given(rows=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_fusion_and_sharding_do_not_matter(rows: list[int], seed: int):
    parts = [noise(n, 4, seed=seed + i) for i, n in enumerate(rows)]
    fused = tensor_fingerprint(torch.cat(parts))
    assert total_fingerprint(map(tensor_fingerprint, parts)) == fused
    shards = torch.cat(parts).chunk(2, dim=1)
    assert total_fingerprint(map(tensor_fingerprint, shards)) == fused


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_padding_does_not_show(dtype: torch.dtype):
    tensor = noise(3, 4).to(dtype)
    wider = torch.cat([tensor, torch.zeros(2, 4).to(dtype)])
    assert tensor_fingerprint(wider) == tensor_fingerprint(tensor) != 0
    assert tensor_fingerprint(torch.zeros(5).to(dtype)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_one_flipped_bit_anywhere_shows(dtype: torch.dtype, data: st.DataObject):
    tensor = noise(5, 7).to(dtype)
    before = tensor_fingerprint(tensor)
    raw = tensor.flatten().view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert tensor_fingerprint(tensor) != before


@given(position=st.integers(0, 34), factor=st.sampled_from([1 + 2**-23, 1 - 2**-23, -1.0]))
def test_the_smallest_possible_update_shows(position: int, factor: float):
    tensor = noise(35)
    before = tensor_fingerprint(tensor)
    tensor[position] *= factor
    assert tensor_fingerprint(tensor) != before


@given(first=st.integers(0, 16), second=st.integers(17, 34), step=st.integers(1, 9))
def test_two_changes_that_make_up_for_each_other_show(first: int, second: int, step: int):
    tensor = noise(35)
    before = tensor_fingerprint(tensor)
    bits = tensor.view(torch.int32)
    bits[first] += step
    bits[second] -= step
    assert tensor_fingerprint(tensor) != before


def test_every_16_bit_pattern_has_a_hash_of_its_own():
    patterns = torch.arange(2**16).to(torch.int32).to(torch.int16)
    assert len({tensor_fingerprint(pattern) for pattern in patterns[::7]}) == len(patterns[::7])


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    tensor = noise(10, 10)
    whole = tensor_fingerprint(tensor)
    monkeypatch.setattr(fingerprint, "_CHUNK", 7)
    assert tensor_fingerprint(tensor) == whole


@given(seed=st.integers(0, 99), size=st.integers(0, 300))
def test_a_hash_is_a_64_bit_number(seed: int, size: int):
    assert 0 <= tensor_fingerprint(noise(size, seed=seed)) < 2**64


def test_floating_tensors_are_hashed_as_the_engine_holds_them_and_others_as_they_are():
    tensors = {"w": noise(8), "steps": torch.arange(1, 4)}
    cast = named_fingerprints(tensors.items(), torch.bfloat16)
    assert cast["w"] == tensor_fingerprint(tensors["w"].to(torch.bfloat16))
    assert cast["w"] != tensor_fingerprint(tensors["w"])
    assert cast["steps"] == tensor_fingerprint(tensors["steps"])


def test_a_shared_storage_counts_once():
    weight = noise(3, 4)
    assert list(named_fingerprints([("embed", weight), ("head", weight)])) == ["embed"]
    assert list(named_fingerprints([("embed", weight), ("head", weight.clone())])) == [
        "embed",
        "head",
    ]


def test_empty_tensors_are_not_taken_for_one_shared_storage():
    empty = {"a": torch.empty(0), "b": torch.empty(0, 3)}
    assert named_fingerprints(empty.items()) == {"a": 0, "b": 0}


def test_tensors_read_one_after_another_into_the_same_memory_all_count():
    def one_at_a_time():
        for i in range(6):
            tensor = noise(1000, seed=i)
            yield f"w{i}", tensor
            del tensor  # the next one may reuse its address

    apart = {f"w{i}": tensor_fingerprint(noise(1000, seed=i)) for i in range(6)}
    assert named_fingerprints(one_at_a_time()) == apart


def test_two_tensors_exchanged_are_the_blind_spot_that_the_canary_covers():
    a, b = noise(4, seed=1), noise(4, seed=2)
    straight = named_fingerprints([("a", a), ("b", b)])
    exchanged = named_fingerprints([("a", b), ("b", a)])
    assert total_fingerprint(straight.values()) == total_fingerprint(exchanged.values())
    assert straight != exchanged


def test_a_checkpoints_elements_are_counted_from_its_headers(tmp_path):
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    save_file({"c": torch.zeros(())}, tmp_path / "y.safetensors")
    assert checkpoint_elements(tmp_path) == 3 * 4 + 5 + 1
