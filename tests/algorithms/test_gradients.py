"""Gradients in float64: autograd against finite differences and against the papers' closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from rlswitch.algorithms.grpo import GRPO
from rlswitch.algorithms.losses import (
    clipped_surrogate,
    kl_divergence,
    sequence_log_ratio,
    value_loss,
    weighted_surrogate,
)
from rlswitch.training.logprobs import token_statistics
from rlswitch.types import Batch

SHAPE = (3, 5)
MASK = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]])


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(at).sum(), at)
    return found


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "clipped": lambda x: clipped_surrogate(x, noise(1), clip_low=0.2, clip_high=0.3)[0],
    "dual clip": lambda x: clipped_surrogate(x, noise(1), clip_low=0.2, clip_high=0.3, dual_clip=2.0)[0],
    "sequence ratio": lambda x: clipped_surrogate(
        sequence_log_ratio(x, MASK), noise(1), clip_low=0.2, clip_high=0.3
    )[0],
    "value": lambda x: value_loss(x, noise(1), noise(2), clip=0.5)[0],
    "k1": lambda x: kl_divergence(x, noise(1), "k1"),
    "k2": lambda x: kl_divergence(x, noise(1), "k2"),
    "k3": lambda x: kl_divergence(x, noise(1), "k3"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_autograd_agrees_with_finite_differences(name: str):
    assert gradcheck(LOSSES[name], noise(0).requires_grad_())


def test_log_probabilities_and_entropies_agree_with_finite_differences(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # it computes in float32 on purpose
    targets = torch.tensor([0, 3, 1])
    assert gradcheck(lambda x: token_statistics(x, targets, 0.7), noise(0, (3, 4)).requires_grad_())


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["off", "tis", "icepop"])
def test_the_whole_policy_loss_agrees_with_finite_differences(correction: str, level: str, kl_coef: float):
    algorithm = GRPO(mismatch_correction=correction, ratio_level=level, kl_coef=kl_coef, dual_clip=3.0)
    rows = SHAPE[0]
    batch = Batch(
        token_ids=torch.zeros(rows, 1, dtype=torch.long),
        attention_mask=torch.ones(rows, 1, dtype=torch.long),
        prompt_lengths=torch.ones(rows, dtype=torch.long),
        completion_mask=MASK,
        loss_mask=MASK,
        rollout_logprobs=noise(1),
        rewards=noise(2, (rows,)),
        group=torch.zeros(rows, dtype=torch.long),
        truncated=torch.zeros(rows, dtype=torch.bool),
        old_logprobs=noise(3),
        reference_logprobs=noise(4),
        advantages=noise(5),
    )
    entropy = torch.zeros(SHAPE, dtype=torch.float64)
    assert gradcheck(lambda x: algorithm.policy_loss(batch, x, entropy, {})[0], noise(0).requires_grad_())


# -- closed forms ------------------------------------------------------------------------------


def test_an_unclipped_token_pulls_by_ratio_times_advantage():
    at, advantages = 0.1 * noise(0), noise(1)
    found = gradient(lambda x: clipped_surrogate(x, advantages, clip_low=0.9, clip_high=9.0)[0], at)
    torch.testing.assert_close(found, -advantages * at.exp())


def test_every_token_of_cispo_pulls_by_its_bounded_weight_times_advantage():
    at, advantages = noise(0), noise(1)
    found = gradient(lambda x: weighted_surrogate(x, x, advantages, clip_low=0.5, clip_high=0.5)[0], at)
    torch.testing.assert_close(found, -advantages * at.exp().clamp(0.5, 1.5))


def test_a_sequence_ratio_shares_its_gradient_among_its_tokens():
    """GSPO, equation 10: each token of a completion gets the same pull, ratio x advantage / length."""
    at, advantages = 0.01 * noise(0) * MASK, noise(1)[:, :1].expand(SHAPE)

    def loss(x: Tensor) -> Tensor:
        return clipped_surrogate(sequence_log_ratio(x, MASK), advantages, clip_low=0.9, clip_high=9)[0] * MASK

    lengths = MASK.sum(-1, keepdim=True)
    ratio = (at.sum(-1, keepdim=True) / lengths).exp()
    # the sum over its tokens counts the completion `length` times
    torch.testing.assert_close(gradient(loss, at), -advantages * ratio * MASK)


def test_gradients_of_the_kl_estimators():
    at, reference = noise(0), noise(1)
    expected = {
        "k1": torch.ones(SHAPE, dtype=torch.float64),
        "k2": at - reference,
        "k3": 1 - (reference - at).exp(),
    }
    for estimator, pull in expected.items():
        found = gradient(lambda x, it=estimator: kl_divergence(x, reference, it), at)
        torch.testing.assert_close(found, pull)


def test_a_value_pulls_by_its_error_and_stops_where_it_moved_too_far():
    values, old, returns = (
        torch.tensor([[1.0, 3.0]]).double(),
        torch.zeros(1, 2).double(),
        torch.tensor([[2.0, 9.0]]).double(),
    )
    found = gradient(lambda x: value_loss(x, old, returns, clip=2.0)[0], values)
    assert found.tolist() == [[-1.0, 0.0]]
