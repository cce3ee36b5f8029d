"""Group Relative Policy Optimization (Shao et al. 2024, arXiv:2402.03300).

Its variants are YAML files in conf/algorithm/: dapo, dr_grpo, gspo, cispo.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlswitch.algorithms.base import Algorithm, Memory, needs_siblings

if TYPE_CHECKING:
    from torch import Tensor

    from rlswitch.run import Run
    from rlswitch.types import Batch


@dataclass(kw_only=True, slots=True)
class GRPO(Algorithm):
    """The group's mean is the baseline, so no critic: every completion is compared with its siblings."""

    scale_by_std: bool = True
    """Divide by the group's standard deviation (False: Dr.GRPO, arXiv:2503.20783)."""

    def problems(self, run: Run) -> Iterator[str]:
        yield from needs_siblings(run)

    def advantages(self, batch: Batch, memory: Memory) -> Tensor:
        from rlswitch.algorithms.advantages import group_relative

        rewards = self.token_rewards(batch, memory).sum(-1)
        scores = group_relative(rewards, batch.group, scale_by_std=self.scale_by_std)
        return scores[:, None] * batch.loss_mask
