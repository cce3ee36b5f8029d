"""Estimators of KL(policy || reference) from samples of the policy: pure functions of tensors.

Source: J. Schulman, "Approximating KL Divergence" (2020).
"""

from __future__ import annotations

from torch import Tensor


def kl_divergence(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate, same shape as its arguments. k1 and k3 are unbiased, k2 and k3 never negative."""
    assert logprobs.shape == reference_logprobs.shape and logprobs.is_floating_point()
    assert reference_logprobs.is_floating_point()
    log_ratio = logprobs - reference_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    assert estimator == "k3", estimator
    return (-log_ratio).expm1() + log_ratio  # exp(-x) - 1 + x can round below zero


def adapted_coefficient(coefficient: float, kl: float, target: float, share: float) -> float:
    """The next coefficient of a KL penalty that steers the divergence towards `target`.

    It moves in proportion to the relative error, clipped to 20 %, and to `share`: the rollouts of the step
    over the horizon. Source: Ziegler et al. 2019 (arXiv:1909.08593, section 2.2).

    Example: adapted_coefficient(0.1, kl=0.3, target=0.1, share=0.5) == 0.1 * (1 + 0.2 * 0.5)
    """
    assert target > 0 and share > 0
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * min(share, 1.0))
