"""The three checks: what passes, and every failure with its error message."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rlswitch.errors import ProofError
from rlswitch.proof.checks import (
    LEARNED_CEILING,
    LEARNED_FLOOR,
    Tolerance,
    check_canary,
    check_fingerprint,
    check_prefix_cache,
)
from rlswitch.proof.fingerprint import named_fingerprints, total_fingerprint
from rlswitch.types import Canary, PolicyWeights

NAMES = [f"layers.{i}.weight" for i in range(12)]


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(16, 16, generator=generator) for name in NAMES}


@pytest.fixture
def weights(tmp_path: Path) -> PolicyWeights:
    tensors = make_tensors()
    for shard in (0, 1):
        names = NAMES[shard::2]
        save_file({name: tensors[name] for name in names}, tmp_path / f"model-{shard}.safetensors")
    return described(tmp_path, tensors)


def described(path: Path, tensors: dict[str, torch.Tensor]) -> PolicyWeights:
    fingerprints = named_fingerprints(tensors.items())
    return PolicyWeights(
        version=7,
        path=path,
        nbytes=1,
        fingerprint=total_fingerprint(fingerprints.values()),
        tensors=fingerprints,
        canary=Canary(sequences=[[1, 2, 3], [4, 5]], logprobs=[[-1.0, -2.0], [-3.0]]),
    )


def refusal(check: Callable, *arguments) -> str:
    with pytest.raises(ProofError) as caught:
        check(*arguments)
    assert str(caught.value).startswith("push of version 7 is not proven: ")
    return str(caught.value)


def report(weights: PolicyWeights, **changes: int) -> dict:
    received = weights.tensors | changes
    return {"received": received, "live": total_fingerprint(received.values())}


# -- fingerprint -------------------------------------------------------------------------------


def test_what_was_published_is_accepted_from_every_worker(weights: PolicyWeights):
    check_fingerprint(weights, [report(weights), report(weights)])


def test_a_worker_that_cannot_say_what_it_holds_is_judged_by_what_it_received(weights):
    check_fingerprint(weights, [report(weights) | {"live": None}])


def test_a_missing_tensor_is_named(weights: PolicyWeights):
    partial = report(weights)
    del partial["received"][NAMES[3]]
    message = refusal(check_fingerprint, weights, [partial])
    assert f"tensors missing: {NAMES[3]} (1 in all)" in message


def test_a_differing_tensor_is_named_and_counted(weights: PolicyWeights):
    stale = report(weights, **dict.fromkeys(NAMES[:5], 1))
    message = refusal(check_fingerprint, weights, [stale])
    assert f"tensors differ: {', '.join(sorted(NAMES[:5])[:3])} (5 in all)" in message


def test_an_extra_tensor_is_named(weights: PolicyWeights):
    message = refusal(check_fingerprint, weights, [report(weights, **{"lm_head.weight": 5})])
    assert "extra tensors: lm_head.weight" in message


def test_nothing_loaded_is_said(weights: PolicyWeights):
    message = refusal(check_fingerprint, weights, [{"received": {}, "live": None}])
    assert "nothing was loaded" in message


def test_the_worker_at_fault_is_named(weights: PolicyWeights):
    message = refusal(check_fingerprint, weights, [report(weights), report(weights, **{NAMES[0]: 1})])
    assert "worker 1 received" in message


def test_live_parameters_that_differ_from_what_was_received_are_refused(weights: PolicyWeights):
    message = refusal(check_fingerprint, weights, [report(weights) | {"live": 3}])
    assert f"holds {3:016x} instead of {weights.fingerprint:016x}" in message


def test_intact_files_put_the_blame_on_what_was_loaded(weights: PolicyWeights):
    message = refusal(check_fingerprint, weights, [report(weights, **{NAMES[0]: 1})])
    assert f"the files in {weights.path} are as published" in message


def test_changed_files_are_blamed(weights: PolicyWeights):
    file = weights.path / "model-1.safetensors"
    tensors = load_file(file)
    tensors[NAMES[1]] = tensors[NAMES[1]] + 1
    save_file(tensors, file)
    message = refusal(check_fingerprint, weights, [report(weights, **{NAMES[1]: 1})])
    assert f"the files in {weights.path} are not what was published" in message


def test_unreadable_files_are_blamed(weights: PolicyWeights):
    file = weights.path / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    message = refusal(check_fingerprint, weights, [report(weights, **{NAMES[1]: 1})])
    assert f"the files in {weights.path} cannot be read" in message


@given(name=st.sampled_from(NAMES), bit=st.integers(0, 63))
def test_any_difference_in_any_tensor_is_refused(name: str, bit: int):
    weights = described(Path("/nowhere"), make_tensors())
    wrong = report(weights, **{name: weights.tensors[name] ^ (1 << bit)})
    assert f"tensors differ: {name} (1 in all)" in refusal(check_fingerprint, weights, [wrong])


# -- prefix cache ------------------------------------------------------------------------------


def test_only_an_empty_prefix_cache_is_accepted(weights: PolicyWeights):
    check_prefix_cache(weights, 0)
    message = refusal(check_prefix_cache, weights, 16)
    assert "16 tokens would be served from keys and values of older weights" in message


# -- canary ------------------------------------------------------------------------------------


def moved(weights: PolicyWeights, gap: float) -> list[list[float]]:
    """The trainer's answer, with the second token of the first sequence off by `gap`."""
    first, *rest = weights.canary.logprobs
    return [[first[0], first[1] + gap], *rest]


def test_the_canary_returns_its_largest_gap(weights: PolicyWeights):
    assert check_canary(weights, weights.canary.logprobs, Tolerance(1e-4)) == 0
    gap = check_canary(weights, moved(weights, -5e-5), Tolerance(1e-4))
    assert gap == pytest.approx(5e-5)


def test_the_canary_names_the_token_with_the_largest_gap(weights: PolicyWeights):
    message = refusal(check_canary, weights, moved(weights, 0.25), Tolerance(1e-4))
    assert "differs by 0.25, limit 0.0001 (sequence 0, token 2: -1.75000, trainer -2.00000)" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limit", [1e-4, 1e9, None])
def test_a_canary_that_is_not_finite_is_refused_at_any_tolerance(weights, value, limit):
    for position in range(3):
        answer = [list(row) for row in weights.canary.logprobs]
        answer[position // 2][position % 2] = value
        message = refusal(check_canary, weights, answer, Tolerance(limit))
        assert f"sequence {position // 2}, token {position % 2 + 1}" in message


def test_a_canary_that_is_not_finite_on_both_sides_is_refused(weights: PolicyWeights):
    weights.canary.logprobs[1][0] = -math.inf
    refusal(check_canary, weights, weights.canary.logprobs, Tolerance(1.0))


def test_a_canary_that_is_no_number_for_the_trainer_proves_nothing(weights: PolicyWeights):
    answer = [list(row) for row in weights.canary.logprobs]
    weights.canary.logprobs[1][0] = math.nan
    for told in (answer, weights.canary.logprobs):
        assert "sequence 1, token 1" in refusal(check_canary, weights, told, Tolerance(None))


def test_a_fixed_tolerance_stays_as_it_is(weights: PolicyWeights):
    tolerance = Tolerance(1e-4)
    check_canary(weights, moved(weights, 9e-5), tolerance)
    assert tolerance.limit == 1e-4


@given(first=st.floats(0, LEARNED_CEILING))
def test_a_learned_tolerance_allows_four_times_the_first_gap(first: float):
    tolerance = Tolerance(None)
    assert tolerance.admit(first)
    learned = tolerance.limit
    assert learned == min(max(4 * first, LEARNED_FLOOR), LEARNED_CEILING)
    assert tolerance.admit(learned)
    assert not tolerance.admit(learned * 1.01)
    assert tolerance.limit == learned


def test_a_first_gap_above_the_ceiling_is_refused_and_teaches_nothing(weights: PolicyWeights):
    tolerance = Tolerance(None)
    message = refusal(check_canary, weights, moved(weights, LEARNED_CEILING * 1.1), tolerance)
    assert f"limit {LEARNED_CEILING:.3g}" in message
    assert tolerance.limit is None
