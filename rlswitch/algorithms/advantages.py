"""Advantage estimators: pure functions of tensors.

Shapes: B rollouts, T completion tokens padded on the right; mask is bool [B, T], the learned tokens. Values
elsewhere (padding, an environment's tokens) are ignored, and what is returned there is zero.
"""

import torch
from torch import Tensor


def group_relative(rewards: Tensor, group: Tensor, *, scale_by_std: bool) -> Tensor:
    """Reward minus the mean of its group, over the group's standard deviation if asked; [B] -> [B].

    Source: GRPO (arXiv:2402.03300, section 4.1.1); without the scale Dr.GRPO (arXiv:2503.20783).
    A group whose rewards are all equal gets exactly zero.
    """
    assert rewards.dim() == group.dim() == 1 and rewards.is_floating_point()
    wide = rewards.double()  # the sum of equal float32 rewards is exact, so is their mean
    size = torch.bincount(group).double()
    mean = torch.zeros_like(size).index_add_(0, group, wide) / size
    centred = wide - mean[group]
    if not scale_by_std:
        return centred.to(rewards.dtype)
    variance = torch.zeros_like(size).index_add_(0, group, centred**2) / (size - 1).clamp(min=1)
    return (centred / (variance.sqrt()[group] + 1e-6)).to(rewards.dtype)


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """Reward minus the mean reward of the other members of its group; [B] -> [B].

    Source: RLOO (arXiv:2402.14740, equation 8). Equal to G / (G - 1) times the unscaled group_relative
    in a group of G. A group of one has no others: zero.
    """
    assert rewards.dim() == group.dim() == 1 and rewards.is_floating_point()
    size = torch.bincount(group)[group].to(rewards.dtype)
    return group_relative(rewards, group, scale_by_std=False) * size / (size - 1).clamp(min=1)


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Sum of this and all later rewards, each learned token discounted by `gamma`; [B, T] -> [B, T].

    Source: REINFORCE's return to go (Williams 1992); with gamma = 1 REINFORCE++ (arXiv:2501.03262).
    """
    assert rewards.dim() == 2 and rewards.shape == mask.shape and mask.dtype == torch.bool
    assert rewards.is_floating_point()
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = torch.where(mask[:, t], rewards[:, t] + gamma * following, following)
        returns[:, t] = following
    return returns.masked_fill(~mask, 0.0)


def rewards_at_last_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """The reward of each rollout [B] on its last learned token, zero elsewhere; [B, T]."""
    assert rewards.dim() == 1 and mask.dim() == 2 and mask.dtype == torch.bool
    assert rewards.is_floating_point()
    left = mask.flip(-1).cumsum(-1).flip(-1)  # learned tokens from each position on
    return torch.where(mask & (left == 1), rewards[:, None], 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438): advantages and returns, both [B, T].

    A step goes from one learned token to the next, over any tokens between them. The value after the last
    one is zero: a completion ends its episode. With gae_lambda = 1 the advantage is the discounted return
    minus the value.
    """
    assert rewards.dim() == 2 and rewards.shape == values.shape == mask.shape
    assert mask.dtype == torch.bool and rewards.is_floating_point() and values.is_floating_point()
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    return advantages.masked_fill(~mask, 0.0), (advantages + values).masked_fill(~mask, 0.0)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the learned tokens; [B, T] -> [B, T].

    Source: advantage normalisation as in Andrychowicz et al. 2020 (arXiv:2006.05990).
    """
    assert values.dim() == 2 and values.shape == mask.shape and mask.dtype == torch.bool
    assert values.is_floating_point()
    exact = values.double()  # in float32 the mean of equal values may be a rounding away from them
    chosen = exact[mask]
    scaled = (exact - chosen.mean()) / (chosen.var(correction=0).sqrt() + 1e-8)
    return scaled.masked_fill(~mask, 0.0).to(values.dtype)
