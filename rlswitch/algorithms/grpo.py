"""Group Relative Policy Optimization (Shao et al. 2024, arXiv:2402.03300)."""

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
class GRPO(Algorithm):
    """The group's mean is the baseline, so no critic: every completion is compared with its siblings."""

    ratio_clip_low: float = number(0.2, above=0, below=1)
    ratio_clip_high: float = number(0.2, above=0)
    scale_by_std: bool = True
    """Divide by the group's standard deviation (False: Dr.GRPO, arXiv:2503.20783)."""

    @property
    def needs_critic(self) -> bool:
        return False

    def problems(self, run: Run) -> Iterator[str]:
        if run.rollout.group_size < 2:
            yield (
                f"rollout.group_size = {run.rollout.group_size}: a group baseline needs siblings, every"
                " advantage would be 0; set at least 2"
            )

    def estimate_advantages(self, batch: Batch) -> None:
        from rlswitch.algorithms.advantages import group_relative

        scores = group_relative(batch.rewards, batch.group, scale_by_std=self.scale_by_std)
        batch.advantages = scores[:, None] * batch.mask

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
        loss = loss - self.entropy_coef * entropy
        if self.needs_reference:
            kl = kl_divergence(logprobs, batch.reference_logprobs, self.kl_estimator)
            loss = loss + self.kl_coef * kl
            metrics["actor/kl_ref"] = kl
        return loss, metrics
