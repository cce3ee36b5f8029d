"""How far the engine's log-probabilities are from the trainer's: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def mismatch_metrics(rollout_logprobs: Tensor, trainer_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """The gap at one policy version, all [B, T]; importance ratios are trainer over rollout, per token.

    `mismatch/kl` is the k3 estimate of KL(rollout || trainer); `mismatch/is_ess` is the effective
    sample size of the ratios as a share of the tokens (1: no mismatch).
    """
    assert rollout_logprobs.shape == trainer_logprobs.shape == mask.shape
    log_ratio = (trainer_logprobs - rollout_logprobs)[mask].to(torch.float64)
    ratio = log_ratio.exp()
    gap = log_ratio.abs()
    return {
        "mismatch/logp_abs_diff_mean": float(gap.mean()),
        "mismatch/logp_abs_diff_max": float(gap.max()),
        "mismatch/kl": float((ratio - 1 - log_ratio).mean()),
        "mismatch/is_mean": float(ratio.mean()),
        "mismatch/is_max": float(ratio.max()),
        "mismatch/is_ess": float(ratio.sum() ** 2 / (ratio**2).sum() / ratio.numel()),
    }
