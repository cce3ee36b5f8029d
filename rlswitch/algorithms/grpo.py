"""Group Relative Policy Optimization (Shao et al. 2024, arXiv:2402.03300).

Its variants are YAML files in conf/algorithm/: dapo, dr_grpo, gspo, cispo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlswitch.algorithms.base import Algorithm, Memory, sibling_problems
from rlswitch.config.sections import RolloutConfig
from rlswitch.types import Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, slots=True)
class GRPO(Algorithm):
    """The baseline is the mean reward of the group: every completion competes with its siblings."""

    scale_by_std: bool = True
    """Divide by the group's standard deviation (False: Dr.GRPO, arXiv:2503.20783)."""

    def problems(self, rollout: RolloutConfig) -> list[str]:
        return sibling_problems(rollout)

    def advantages(self, batch: Batch, memory: Memory) -> tuple[Tensor, Tensor | None]:
        from rlswitch.algorithms.advantages import group_relative

        rewards = self.token_rewards(batch, memory).sum(-1)
        scores = group_relative(rewards, batch.group, scale_by_std=self.scale_by_std)
        return scores[:, None] * batch.loss_mask, None
