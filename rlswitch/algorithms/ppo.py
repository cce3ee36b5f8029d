"""Proximal Policy Optimization with a learned critic (Schulman et al. 2017, arXiv:1707.06347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlswitch.algorithms.base import Algorithm, Memory
from rlswitch.config.fields import choice, number
from rlswitch.config.sections import RolloutConfig
from rlswitch.types import Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, slots=True)
class PPO(Algorithm):
    """A critic predicts the return at every token; GAE turns its errors into advantages.

    The KL to the reference is a penalty in the reward of every token (Ziegler et al. 2019,
    arXiv:1909.08593): the critic learns it too.
    """

    needs_critic: ClassVar[bool] = True

    kl_in: str = choice("reward", "loss")
    kl_estimator: str = choice("k1", "k2", "k3")
    gamma: float = number(1.0, at_least=0, at_most=1)
    gae_lambda: float = number(0.95, at_least=0, at_most=1)
    whiten_advantages: bool = True

    def problems(self, rollout: RolloutConfig) -> list[str]:
        return []

    def advantages(self, batch: Batch, memory: Memory) -> tuple[Tensor, Tensor | None]:
        from rlswitch.algorithms.advantages import gae

        rewards, mask = self.token_rewards(batch, memory), batch.loss_mask
        return gae(rewards, batch.values, mask, gamma=self.gamma, gae_lambda=self.gae_lambda)
