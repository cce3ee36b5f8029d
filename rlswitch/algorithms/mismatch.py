"""The gap between the engine's log-probabilities and the trainer's, and its correction.

Pure functions of tensors. Shapes: B rollouts, T completion tokens padded on the right; mask is bool
[B, T], the learned tokens. Ratios are trainer over rollout, both at the version that sampled.
"""

import torch
from torch import Tensor


def mismatch_metrics(rollout_logprobs: Tensor, trainer_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """Metrics of the gap over the learned tokens; the log-probabilities are [B, T].

    `mismatch/kl` is the k3 estimate of KL(rollout || trainer); `mismatch/is_ess` is the effective sample
    size of the ratios as a share of the tokens (1: no mismatch).
    """
    assert rollout_logprobs.shape == trainer_logprobs.shape == mask.shape
    assert mask.dim() == 2 and mask.dtype == torch.bool
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


def correction_weights(
    log_ratio: Tensor, mask: Tensor, *, kind: str, level: str, low: float, high: float
) -> Tensor:
    """Importance weight of each token's loss; [B, T], constant to the gradient.

    `log_ratio` is log trainer - log rollout. At level "sequence" the ratio is the product over the
    completion's learned tokens. Kinds:
    tis: ratio, at most `high` (truncated importance sampling, Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training");
    mis: ratio, 0 above `high` (masked importance sampling, Liu et al. 2025, "When Speed Kills Stability");
    icepop: ratio, 0 outside `low`..`high` (Ling team 2025, arXiv:2510.18855).
    """
    assert log_ratio.shape == mask.shape and mask.dim() == 2 and mask.dtype == torch.bool
    assert log_ratio.is_floating_point() and level in ("token", "sequence")
    log_ratio = log_ratio.detach().masked_fill(~mask, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(mask)
    ratio = log_ratio.exp()
    if kind == "tis":
        return ratio.clamp(max=high) * mask
    floor = {"mis": 0.0, "icepop": low}[kind]
    return torch.where(mask & (floor <= ratio) & (ratio <= high), ratio, 0.0)
