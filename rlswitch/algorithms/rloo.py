"""REINFORCE Leave-One-Out (Ahmadian et al. 2024, arXiv:2402.14740)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlswitch.algorithms.base import Algorithm, needs_siblings
from rlswitch.options import choice

if TYPE_CHECKING:
    from rlswitch.config import Run
    from rlswitch.types import Batch


@dataclass(kw_only=True, slots=True)
class RLOO(Algorithm):
    """The baseline of a completion is the mean reward of its siblings: unbiased, unlike the group's mean."""

    kl_in: str = choice("reward", "loss")

    @property
    def needs_critic(self) -> bool:
        return False

    def problems(self, run: Run) -> Iterator[str]:
        yield from needs_siblings(run)

    def estimate_advantages(self, batch: Batch) -> None:
        from rlswitch.algorithms.advantages import leave_one_out

        scores = leave_one_out(self.token_rewards(batch).sum(-1), batch.group)
        batch.advantages = scores[:, None] * batch.mask
