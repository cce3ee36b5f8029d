"""Losses and KL per token, and the weights that turn them into one number: pure functions of tensors.

Shapes: B rollouts, T completion tokens padded on the right; mask is bool [B, T], the learned tokens.
"""

import torch
from torch import Tensor


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's pessimistic policy loss (arXiv:1707.06347, equation 7) with a clip for each side; [B, T].

    `dual_clip` > 1 bounds the ratio of tokens with a negative advantage (arXiv:1912.09729); 0: no bound.
    """
    assert log_ratio.shape == advantages.shape and log_ratio.dim() == 2
    assert log_ratio.is_floating_point() and advantages.is_floating_point()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip > 0:
        bounded = torch.minimum(loss, -dual_clip * advantages)
        loss = torch.where(advantages < 0, bounded, loss)
    return loss, _ratio_metrics(log_ratio, advantages, clip_low, clip_high)


def weighted_surrogate(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO (arXiv:2506.13585, equation 4): REINFORCE with a clipped, constant importance weight; [B, T].

    Every token keeps its gradient; the clip bounds its weight.
    """
    assert logprobs.shape == log_ratio.shape == advantages.shape and logprobs.dim() == 2
    assert logprobs.is_floating_point() and advantages.is_floating_point()
    weight = log_ratio.exp().clamp(1 - clip_low, 1 + clip_high).detach()
    metrics = _ratio_metrics(log_ratio, advantages, clip_low, clip_high)
    return -weight * advantages * logprobs, metrics


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """GSPO's ratio (arXiv:2507.18071, equation 7): a completion's mean over its learned tokens; [B, T]."""
    assert log_ratio.dim() == 2 and log_ratio.shape == mask.shape and mask.dtype == torch.bool
    assert log_ratio.is_floating_point()
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    return (log_ratio.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / lengths).expand_as(log_ratio)


def _ratio_metrics(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> dict[str, Tensor]:
    ratio = log_ratio.exp()
    below, above = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    clipped = {"": below | above, "_low": below, "_high": above}
    return {
        "actor/ratio_mean": ratio,
        "actor/ppo_kl": -log_ratio,
        **{f"actor/clip_ratio{side}": tokens.to(ratio.dtype) for side, tokens in clipped.items()},
    }


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the critic, pessimistic about moves beyond `clip` (0: no clip); [B, T].

    Source: the clipped value loss of PPO's first implementation (Engstrom et al. 2020, arXiv:2005.12729).
    """
    assert values.shape == old_values.shape == returns.shape and values.dim() == 2
    assert values.is_floating_point() and returns.is_floating_point()
    loss = (values - returns) ** 2 / 2
    clipped = torch.zeros_like(loss)
    if clip > 0:
        limited = old_values + (values - old_values).clamp(-clip, clip)
        limited_loss = (limited - returns) ** 2 / 2
        clipped = (limited_loss > loss).to(loss.dtype)
        loss = torch.maximum(loss, limited_loss)
    return loss, {"critic/vf_clip_ratio": clipped}


def kl_divergence(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) per token, estimated from the policy's samples; same shape as the arguments.

    k1 and k3 are unbiased, k2 and k3 never negative. Schulman, "Approximating KL Divergence" (2020).
    """
    assert logprobs.shape == reference_logprobs.shape and logprobs.is_floating_point()
    assert reference_logprobs.is_floating_point()
    log_ratio = logprobs - reference_logprobs
    if estimator == "k3":
        return (-log_ratio).expm1() + log_ratio  # exp(-x) - 1 + x can round below zero
    return {"k1": log_ratio, "k2": log_ratio**2 / 2}[estimator]


def adapted_coefficient(coefficient: float, kl: float, target: float, share: float) -> float:
    """The next coefficient of a KL penalty that steers the divergence towards `target`.

    It moves in proportion to the relative error, clipped to 20 %, and to `share`: the rollouts of the step
    over the horizon. Source: Ziegler et al. 2019 (arXiv:1909.08593, section 2.2).

    Example: adapted_coefficient(0.1, kl=0.3, target=0.1, share=0.5) == 0.1 * (1 + 0.2 * 0.5)
    """
    assert target > 0 and share > 0
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * min(share, 1.0))


def token_weights(mask: Tensor, aggregation: str, max_length: int) -> Tensor:
    """Weight of each token in the loss of a minibatch, [B, T], for `weighted_sum`.

    Computed once for a whole minibatch, so how it is cut into micro-batches does not matter.
    token-mean: DAPO (arXiv:2503.14476); seq-mean-token-mean: GRPO; seq-mean-token-sum-norm: a constant
    `max_length` instead of each completion's own length, Dr.GRPO (arXiv:2503.20783).
    """
    assert mask.dim() == 2 and mask.dtype == torch.bool
    ones = mask.to(torch.float32)
    if aggregation == "token-mean":
        return ones / ones.sum().clamp(min=1)
    norms: dict[str, Tensor | int] = {
        "seq-mean-token-sum": 1,
        "seq-mean-token-mean": ones.sum(-1, keepdim=True).clamp(min=1),
        "seq-mean-token-sum-norm": max_length,
    }
    return ones / norms[aggregation] / mask.shape[0]


def weighted_sum(loss: Tensor, weights: Tensor) -> Tensor:
    """The sum of loss x weight, both [B, T], over the tokens that have a weight."""
    return (loss * weights).masked_fill(weights == 0, 0.0).sum()
