"""REINFORCE with a running mean of the reward as its baseline (Williams 1992)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlswitch.algorithms.base import Algorithm, Memory
from rlswitch.config.fields import number
from rlswitch.config.sections import RolloutConfig
from rlswitch.types import Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Reinforce(Algorithm):
    """The baseline comes from earlier steps: neither siblings nor a critic are needed."""

    baseline_decay: float = number(0.9, at_least=0, below=1)
    """Share of the baseline that a step keeps; 0: the baseline is the mean reward of the last step."""

    def problems(self, rollout: RolloutConfig) -> list[str]:
        return []

    def advantages(self, batch: Batch, memory: Memory) -> tuple[Tensor, Tensor | None]:
        scores = self.token_rewards(batch, memory).sum(-1)
        mean = scores.mean().item()
        baseline = memory.get("baseline", mean)
        if math.isfinite(mean):  # otherwise the trainer skips the step
            memory["baseline"] = self.baseline_decay * baseline + (1 - self.baseline_decay) * mean
        return (scores - baseline)[:, None] * batch.loss_mask, None
