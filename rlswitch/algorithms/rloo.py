"""REINFORCE Leave-One-Out (Ahmadian et al. 2024, arXiv:2402.14740)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlswitch.algorithms.base import Algorithm, Memory, needs_siblings
from rlswitch.config.fields import choice

if TYPE_CHECKING:
    from torch import Tensor

    from rlswitch.run import Run
    from rlswitch.types import Batch


@dataclass(kw_only=True, slots=True)
class RLOO(Algorithm):
    """The baseline of a completion is the mean reward of its siblings: unbiased, unlike the group's mean."""

    kl_in: str = choice("reward", "loss")
    kl_estimator: str = choice("k1", "k2", "k3")

    def problems(self, run: Run) -> Iterator[str]:
        yield from needs_siblings(run)

    def advantages(self, batch: Batch, memory: Memory) -> Tensor:
        from rlswitch.algorithms.advantages import leave_one_out

        scores = leave_one_out(self.token_rewards(batch, memory).sum(-1), batch.group)
        return scores[:, None] * batch.loss_mask
