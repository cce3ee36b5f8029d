"""Estimators of KL(policy || reference) from samples of the policy: pure functions of tensors.

Source: J. Schulman, "Approximating KL Divergence" (2020).
"""

from __future__ import annotations

from torch import Tensor


def kl_divergence(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate, same shape as its arguments. k1 and k3 are unbiased, k2 and k3 never negative."""
    assert logprobs.shape == reference_logprobs.shape
    log_ratio = logprobs - reference_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    assert estimator == "k3", estimator
    return (-log_ratio).expm1() + log_ratio  # exp(-x) - 1 + x would round to below zero
