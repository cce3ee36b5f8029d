"""Proximal Policy Optimization with a learned critic (Schulman et al. 2017, arXiv:1707.06347)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlswitch.algorithms.base import Algorithm
from rlswitch.options import number

if TYPE_CHECKING:
    from torch import Tensor

    from rlswitch.config import Run
    from rlswitch.types import Batch


@dataclass(kw_only=True, slots=True)
class PPO(Algorithm):
    """A critic predicts the return at every token; GAE turns its errors into advantages.

    The KL to the reference is a penalty in the reward of every token (Ziegler et al. 2019,
    arXiv:1909.08593), so that the critic sees it too.
    """

    ratio_clip_low: float = number(0.2, above=0, below=1)
    ratio_clip_high: float = number(0.2, above=0)
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
        from rlswitch.algorithms.advantages import gae, rewards_at_last_token, whiten
        from rlswitch.algorithms.kl import kl_divergence

        token_rewards = rewards_at_last_token(batch.rewards, batch.mask)
        if self.needs_reference:
            kl = kl_divergence(batch.old_logprobs, batch.reference_logprobs, self.kl_estimator)
            token_rewards = token_rewards - self.kl_coef * kl * batch.mask
        advantages, batch.returns = gae(
            token_rewards, batch.values, batch.mask, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        batch.advantages = whiten(advantages, batch.mask) if self.whiten_advantages else advantages

    def policy_loss(
        self, batch: Batch, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        from rlswitch.algorithms.kl import kl_divergence
        from rlswitch.algorithms.losses import clipped_surrogate

        loss, metrics = clipped_surrogate(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            clip_low=self.ratio_clip_low,
            clip_high=self.ratio_clip_high,
        )
        if self.needs_reference:
            metrics["actor/kl_ref"] = kl_divergence(logprobs, batch.reference_logprobs, self.kl_estimator)
        return loss - self.entropy_coef * entropy, metrics
