"""REINFORCE Leave-One-Out (Ahmadian et al. 2024, arXiv:2402.14740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlswitch.algorithms.base import Algorithm, Memory, sibling_problems
from rlswitch.config.fields import choice
from rlswitch.config.sections import RolloutConfig
from rlswitch.types import Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, slots=True)
class RLOO(Algorithm):
    """The baseline is the mean reward of the siblings alone, which keeps the gradient unbiased."""

    kl_in: str = choice("reward", "loss")
    kl_estimator: str = choice("k1", "k2", "k3")

    def problems(self, rollout: RolloutConfig) -> list[str]:
        return sibling_problems(rollout)

    def advantages(self, batch: Batch, memory: Memory) -> tuple[Tensor, Tensor | None]:
        from rlswitch.algorithms.advantages import leave_one_out

        scores = leave_one_out(self.token_rewards(batch, memory).sum(-1), batch.group)
        return scores[:, None] * batch.loss_mask, None
