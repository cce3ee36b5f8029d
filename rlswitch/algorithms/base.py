"""What the trainer asks of an algorithm. It never learns which one it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlswitch.options import choice, number

if TYPE_CHECKING:
    from torch import Tensor

    from rlswitch.config import Run
    from rlswitch.types import Batch


@dataclass(kw_only=True, slots=True)
class Algorithm(ABC):
    """Settings and maths of one algorithm. Methods return per-token values; the trainer reduces them."""

    loss_aggregation: str = choice(
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    )
    """How per-token losses become one number (see losses.token_weights)."""
    kl_coef: float = number(0.0, at_least=0)
    """Weight of the KL divergence to the reference policy; 0: no reference model is loaded."""
    kl_estimator: str = choice("k3", "k2", "k1")
    entropy_coef: float = number(0.0, at_least=0)
    """Weight of an entropy bonus."""
    value_clip: float = number(0.2, at_least=0)
    """How far a value may move from the old one before its gradient stops; 0: as far as it likes."""

    @property
    @abstractmethod
    def needs_critic(self) -> bool:
        """Whether the trainer has to keep a value model."""

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @abstractmethod
    def problems(self, run: Run) -> Iterator[str]:
        """What is impossible about this algorithm in this run, one line each."""

    @abstractmethod
    def estimate_advantages(self, batch: Batch) -> None:
        """Fills batch.advantages [B, T], and batch.returns [B, T] for the critic."""

    @abstractmethod
    def policy_loss(
        self, batch: Batch, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per token [B, T] from the current log-probabilities [B, T], and metrics per token."""
