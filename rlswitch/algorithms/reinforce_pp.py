"""REINFORCE++ and its baseline variant (Hu et al. 2025, arXiv:2501.03262)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlswitch.algorithms.base import Algorithm, Memory, sibling_problems
from rlswitch.config.fields import choice, number
from rlswitch.config.sections import RolloutConfig
from rlswitch.types import Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, slots=True)
class ReinforcePP(Algorithm):
    """The return to go of every token, normalised over the batch: no critic, no groups."""

    kl_in: str = choice("reward", "loss")
    kl_estimator: str = choice("k1", "k2", "k3")
    whiten_advantages: bool = True
    gamma: float = number(1.0, at_least=0, at_most=1)
    group_baseline: bool = False
    """Subtract the group's mean reward first (the paper's REINFORCE++-baseline)."""

    def problems(self, rollout: RolloutConfig) -> list[str]:
        return sibling_problems(rollout) if self.group_baseline else []

    def advantages(self, batch: Batch, memory: Memory) -> tuple[Tensor, Tensor | None]:
        from rlswitch.algorithms.advantages import discounted_returns, group_relative, rewards_at_last_token

        rewards = self.token_rewards(batch, memory)
        if self.group_baseline:
            centred = group_relative(batch.rewards, batch.group, scale_by_std=False)
            rewards = rewards + rewards_at_last_token(centred - batch.rewards, batch.loss_mask)
        return discounted_returns(rewards, batch.loss_mask, gamma=self.gamma), None
