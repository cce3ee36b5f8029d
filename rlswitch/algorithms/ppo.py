"""Proximal Policy Optimization with a learned critic (Schulman et al. 2017, arXiv:1707.06347)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlswitch.algorithms.base import Algorithm
from rlswitch.options import choice, number

if TYPE_CHECKING:
    from rlswitch.config import Run
    from rlswitch.types import Batch


@dataclass(kw_only=True, slots=True)
class PPO(Algorithm):
    """A critic predicts the return at every token; GAE turns its errors into advantages.

    The KL to the reference is a penalty in the reward of every token (Ziegler et al. 2019,
    arXiv:1909.08593), so that the critic sees it too.
    """

    kl_in: str = choice("reward", "loss")
    gamma: float = number(1.0, at_least=0, at_most=1)
    gae_lambda: float = number(0.95, at_least=0, at_most=1)
    whiten_advantages: bool = True

    @property
    def needs_critic(self) -> bool:
        return True

    def problems(self, run: Run) -> Iterator[str]:
        if self.whiten_advantages and run.rollout.num_prompts * run.rollout.group_size < 2:
            yield (
                "algorithm.whiten_advantages = true: one rollout has no spread to divide by;"
                " set rollout.num_prompts >= 2 or algorithm.whiten_advantages=false"
            )

    def estimate_advantages(self, batch: Batch) -> None:
        from rlswitch.algorithms.advantages import gae, whiten

        advantages, batch.returns = gae(
            self.token_rewards(batch),
            batch.values,
            batch.mask,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
        )
        batch.advantages = whiten(advantages, batch.mask) if self.whiten_advantages else advantages
