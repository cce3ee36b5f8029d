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
    refusal(check_canary, weights, moved(weights, 1.1e-4), tolerance)
    assert tolerance == Tolerance(1e-4)


@given(first=st.floats(0, LEARNED_CEILING))
def test_a_learned_tolerance_allows_four_times_the_first_mean(first: float):
    tolerance = Tolerance(None)
    assert not tolerance.excess([first])
    learned = tolerance.mean
    assert learned == min(max(4 * first, LEARNED_FLOOR), LEARNED_CEILING)
    assert not tolerance.excess([learned])
    assert tolerance.excess([learned * 1.01])
    assert tolerance.mean == learned


def test_a_first_mean_above_the_ceiling_is_refused_and_teaches_nothing(weights: PolicyWeights):
    tolerance = Tolerance(None)
    message = refusal(check_canary, weights, moved(weights, 3 * LEARNED_CEILING * 1.1), tolerance)
    assert f"differ by 0.165 on average, limit {LEARNED_CEILING:.3g} (sequence 0, token 2" in message
    assert tolerance == Tolerance(None)


# -- the canary in bfloat16 --------------------------------------------------------------------

PUBLISHED_GAPS = [
    *(1.6812e-01, 1.6583e-01, 2.2484e-02, 3.1972e-01, 7.9730e-03, 8.2725e-02, 6.6640e-03, 2.7746e-03),
    *(3.0473e-02, 1.3607e-02, 1.0180e-03, 1.1168e-01, 1.1888e-02, 3.8248e-03, 3.9153e-03, 1.0273e-04),
    *(1.3692e-03, 9.0080e-03, 1.0280e-01, 2.4494e-06, 6.2895e-03, 3.4106e-12, 2.6250e-03, 6.7706e-02),
    2.1693e-03,
]
"""Qwen3-1.7B in vLLM and in transformers, 25 tokens of text (vllm-project/vllm#18352)."""

TOKENS = 132
SEEDS = range(50)
NOISE: dict[str, Callable[[torch.Generator, float], torch.Tensor]] = {
    "normal": lambda generator, rms: torch.randn(TOKENS, generator=generator) * rms,
    "laplace": lambda generator, rms: laplace(generator) * rms,
    "mostly small": lambda generator, rms: (
        laplace(generator) * rms * torch.where(torch.rand(TOKENS, generator=generator) < 0.1, 3.0, 0.3)
    ),
}


def laplace(generator: torch.Generator) -> torch.Tensor:
    """Noise with heavy tails, of RMS 1."""
    uniform = torch.rand(TOKENS, generator=generator) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs()) / math.sqrt(2)


def noise(kind: str, seed: int, rms: float = 0.041) -> torch.Tensor:
    return NOISE[kind](torch.Generator().manual_seed(seed), rms)


def proven(gaps: torch.Tensor | list[float], tolerance: Tolerance) -> bool:
    """Whether a canary passes whose log-probabilities are off by `gaps`, in rows of about 33 tokens."""
    ours = [-3.0 - 0.01 * t for t in range(len(gaps))]
    theirs = [a + float(b) for a, b in zip(ours, gaps, strict=True)]
    rows = [[values[i : i + 33] for i in range(0, len(values), 33)] for values in (ours, theirs)]
    weights = PolicyWeights(
        version=7,
        path=Path("/nowhere"),
        nbytes=1,
        fingerprint=0,
        tensors={},
        canary=Canary(sequences=[], logprobs=rows[0]),
    )
    try:
        gap = check_canary(weights, rows[1], tolerance)
    except ProofError:
        return False
    assert gap == pytest.approx(max(abs(float(value)) for value in gaps))  # what the metric reports
    return True


def test_published_gaps_of_two_correct_engines_pass():
    tolerance = Tolerance(None)
    assert proven(PUBLISHED_GAPS, tolerance) and proven(PUBLISHED_GAPS[::-1], tolerance)
    assert not proven(PUBLISHED_GAPS, Tolerance(1e-4))


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("rms", [0.023, 0.031, 0.041])
def test_noise_of_bfloat16_passes_push_after_push(kind: str, rms: float):
    for seed in SEEDS:
        tolerance = Tolerance(None)
        assert all(proven(noise(kind, 5 * seed + push, rms), tolerance) for push in range(5))


@pytest.mark.parametrize("outlier", [0.15, 0.35, 1.5])
def test_one_token_far_off_is_no_reason_to_refuse(outlier: float):
    for seed in SEEDS:
        tolerance, gaps = Tolerance(None), noise("laplace", seed)
        gaps[seed % TOKENS] = outlier
        assert proven(gaps, tolerance) and proven(noise("laplace", seed + 1000), tolerance)


def tens_off(generator: torch.Generator, tokens: int, least: float) -> torch.Tensor:
    """`tokens` tokens off by `least` to `least` + 1 nats, either way, as after a stale prefix."""
    gaps = torch.zeros(TOKENS)
    where = torch.randperm(TOKENS, generator=generator)[:tokens]
    sign = torch.randint(0, 2, (tokens,), generator=generator) * 2 - 1
    gaps[where] = sign * (least + torch.rand(tokens, generator=generator))
    return gaps


DAMAGE: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "stale head": lambda generator: 2 + 2 * torch.rand(TOKENS, generator=generator),
    "permuted tensors": lambda generator: torch.randn(TOKENS, generator=generator) * 1.5,
    "stale prefix, 24 tokens": lambda generator: tens_off(generator, 24, least=0.5),
    "stale prefix, all tokens": lambda generator: tens_off(generator, TOKENS, least=0.5),
    "half a nat in 40 tokens": lambda generator: tens_off(generator, 40, least=0.5).clamp(-0.5, 0.5),
    "one token": lambda generator: tens_off(generator, 1, least=2.2),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("pushes_before", [0, 1])
def test_damage_does_not_pass_for_bfloat16_noise(damage: str, pushes_before: int):
    for seed in SEEDS:
        tolerance = Tolerance(None)
        assert all(proven(noise("normal", seed + push), tolerance) for push in range(pushes_before))
        gaps = noise("normal", seed + 1000) + DAMAGE[damage](torch.Generator().manual_seed(seed))
        assert not proven(gaps, tolerance)


def test_a_frozen_engine_learns_nothing_and_keeps_the_floor():
    tolerance = Tolerance(None, mean=LEARNED_FLOOR)
    assert proven([0.0] * 99 + [0.5], tolerance)
    assert not proven([LEARNED_FLOOR * 1.1] * 100, tolerance)
    assert tolerance.mean == LEARNED_FLOOR
