"""The interface between the trainer and its algorithm: settings and pure maths.

All algorithms share one policy loss with options; they differ in how they turn rewards into advantages.
So a new one usually implements one method, and a variant is a YAML file. An algorithm holds settings only;
the Memory that it needs between steps belongs to the trainer, which checkpoints it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from rlswitch.config.fields import choice, number
from rlswitch.config.sections import RolloutConfig
from rlswitch.types import Batch

if TYPE_CHECKING:
    from torch import Tensor

Memory = dict[str, float]
"""State of an algorithm between steps, by name: a running baseline, an adapted coefficient."""


def sibling_problems(rollout: RolloutConfig) -> list[str]:
    """A rollout alone in its group equals its baseline."""
    what = "a group baseline needs siblings, every advantage would be 0; set at least 2"
    return [f"rollout.group_size = {rollout.group_size}: {what}"] if rollout.group_size < 2 else []


@dataclass(kw_only=True, slots=True)
class Algorithm(ABC):
    """Settings and maths of one algorithm. Methods return values per token; the trainer sums them up."""

    needs_critic: ClassVar[bool] = False
    """Whether the trainer needs a value model."""

    surrogate: str = choice("clipped", "weighted")
    """clipped: PPO's pessimistic ratio; weighted: CISPO's clipped weight, which drops no token."""
    ratio_level: str = choice("token", "sequence")
    """sequence: one ratio per completion, the geometric mean of its tokens' (GSPO)."""
    ratio_clip_low: float = number(0.2, above=0, at_most=1)
    ratio_clip_high: float = number(0.2, above=0)
    dual_clip: float = number(0.0, at_least=0)
    """Largest ratio that counts against a bad token, above 1 (arXiv:1912.09729); 0: no bound."""
    loss_aggregation: str = choice(
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    )
    """How per-token losses are averaged (losses.token_weights)."""
    kl_coef: float = number(0.0, at_least=0)
    """Weight of the KL divergence to the reference policy; 0: no reference model is loaded."""
    kl_estimator: str = choice("k3", "k2", "k1")
    kl_in: str = choice("loss", "reward")
    """Where the KL enters: a term of the loss, or a penalty in the reward of every token."""
    kl_target: float = number(0.0, at_least=0)
    """KL per token that an adaptive coefficient aims for, starting at kl_coef; 0: it stays kl_coef."""
    kl_horizon: int = number(10_000, at_least=1)
    """Rollouts over which the coefficient adapts (losses.adapted_coefficient); fewer: faster changes."""
    reference_refresh: int = number(0, at_least=0)
    """Copy the policy to the reference after every so many steps; 0: keep the initial policy."""
    mismatch_correction: str = choice("off", "tis", "mis", "icepop")
    """Weight tokens by trainer/rollout probability: truncated (tis), masked above mismatch_max (mis) or
    outside mismatch_min..mismatch_max (icepop); see mismatch.correction_weights."""
    mismatch_level: str = choice("token", "sequence")
    """sequence: one weight per completion, the product of its tokens' ratios."""
    mismatch_max: float = number(2.0, at_least=1)
    mismatch_min: float = number(0.5, above=0, at_most=1)
    entropy_coef: float = number(0.0, at_least=0)
    whiten_advantages: bool = False
    """Normalise the advantages of a step's tokens to mean 0 and variance 1."""
    value_clip: float = number(0.2, at_least=0)
    """How far a value may move from the old one before its gradient stops; 0: no limit."""
    mask_truncated: bool = False
    """Leave completions cut at rollout.max_new_tokens out of the loss (DAPO's overlong filtering)."""
    dynamic_sampling: int = number(0, at_least=0, at_most=100)
    """Rounds of further prompts to replace groups whose rewards are all equal (DAPO); 0: keep them."""

    @abstractmethod
    def problems(self, rollout: RolloutConfig) -> list[str]:
        """Why this algorithm cannot learn from such rollouts, one line each."""

    @abstractmethod
    def advantages(self, batch: Batch, memory: Memory) -> tuple[Tensor, Tensor | None]:
        """Advantages [B, T], zero off the loss mask, and targets [B, T] of the critic (None without one)."""

    @final
    def shared_problems(self, rollout: RolloutConfig) -> Iterator[str]:
        """Options shared by all algorithms that contradict each other, one line each."""
        if self.whiten_advantages and rollout.num_prompts * rollout.group_size < 2:
            yield (
                "algorithm.whiten_advantages = true: one rollout has no spread to divide by;"
                " set rollout.num_prompts >= 2 or algorithm.whiten_advantages=false"
            )
        if self.kl_coef == 0:
            for name in ("kl_target", "reference_refresh"):
                if value := getattr(self, name):
                    yield (
                        f"algorithm.{name} = {value}: there is no reference while algorithm.kl_coef is 0,"
                        f" it would do nothing; set algorithm.kl_coef above 0, or algorithm.{name}=0"
                    )
        if self.dual_clip > 0 and self.surrogate == "weighted":
            yield (
                f"algorithm.dual_clip = {self.dual_clip}: algorithm.surrogate=weighted bounds its weights by"
                " the ordinary clips, it would do nothing; set algorithm.dual_clip=0"
            )
        elif 0 < self.dual_clip <= 1 + self.ratio_clip_high:
            yield (
                f"algorithm.dual_clip = {self.dual_clip}: inside the ordinary clip, it would replace it;"
                f" set more than {1 + self.ratio_clip_high:g} (3 is usual), or 0 for no bound"
            )
        if self.kl_coef > 0 and self.kl_in == "loss" and self.kl_estimator == "k1":
            yield (
                "algorithm.kl_estimator = k1: in the loss its gradient is zero on average and would penalise"
                " nothing; set k2 or k3, or algorithm.kl_in=reward"
            )
        if self.kl_coef > 0 and self.kl_in == "reward" and self.kl_estimator != "k1":
            yield (
                f"algorithm.kl_estimator = {self.kl_estimator}: in the reward it is alike on both sides of"
                " the reference and would hardly pull the policy back; set k1, or algorithm.kl_in=loss"
            )

    @final
    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @final
    @property
    def needs_old_logprobs(self) -> bool:
        """Whether advantages depend on the log-probabilities before the update."""
        return self.needs_reference and self.kl_in == "reward"

    @final
    def estimate_advantages(self, batch: Batch, memory: Memory) -> tuple[Tensor, Tensor | None]:
        """As `advantages`, whitened if whiten_advantages=true."""
        from rlswitch.algorithms.advantages import whiten

        advantages, returns = self.advantages(batch, memory)
        return whiten(advantages, batch.loss_mask) if self.whiten_advantages else advantages, returns

    @final
    def current_kl_coef(self, memory: Memory) -> float:
        return memory.get("kl_coef", self.kl_coef) if self.kl_target > 0 else self.kl_coef

    @final
    def end_step(self, memory: Memory, kl: float, rollouts: int) -> None:
        """Adapts the KL coefficient to a step of `rollouts` whose divergence per token was `kl`."""
        from rlswitch.algorithms.losses import adapted_coefficient

        if self.kl_target > 0:
            now, share = self.current_kl_coef(memory), rollouts / self.kl_horizon
            memory["kl_coef"] = adapted_coefficient(now, kl, self.kl_target, share)

    @final
    def token_rewards(self, batch: Batch, memory: Memory) -> Tensor:
        """The reward on the last learned token, less the KL penalty on every one if kl_in=reward; [B, T]."""
        from rlswitch.algorithms.advantages import rewards_at_last_token
        from rlswitch.algorithms.losses import kl_divergence

        rewards = rewards_at_last_token(batch.rewards, batch.loss_mask)
        if self.needs_old_logprobs:
            kl = kl_divergence(batch.old_logprobs, batch.reference_logprobs, self.kl_estimator)
            rewards = rewards - self.current_kl_coef(memory) * batch.learned(kl)
        return rewards

    @final
    def loss_weights(self, batch: Batch, max_new_tokens: int) -> Tensor:
        """Weight of each token in the loss of a minibatch, [B, T]; zero where nothing is to be learned."""
        from rlswitch.algorithms.losses import token_weights

        mask = batch.loss_mask
        if self.mask_truncated:
            mask = mask & ~batch.truncated[:, None]
        return token_weights(mask, self.loss_aggregation, max_new_tokens)

    @final
    def policy_loss(
        self, batch: Batch, logprobs: Tensor, entropy: Tensor, memory: Memory
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics per token, each [B, T], from the current log-probabilities and entropies [B, T].

        Learned tokens alone count: others get no gradient, and nothing there changes a loss or a metric.
        """
        from rlswitch.algorithms import losses
        from rlswitch.algorithms.mismatch import correction_weights

        logprobs, old = batch.learned(logprobs), batch.learned(batch.old_logprobs)
        advantages, log_ratio = batch.learned(batch.advantages), logprobs - old
        if self.ratio_level == "sequence":
            log_ratio = losses.sequence_log_ratio(log_ratio, batch.loss_mask)
        bounds = {"clip_low": self.ratio_clip_low, "clip_high": self.ratio_clip_high}
        if self.surrogate == "weighted":
            loss, metrics = losses.weighted_surrogate(logprobs, log_ratio, advantages, **bounds)
        else:
            bounds["dual_clip"] = self.dual_clip
            loss, metrics = losses.clipped_surrogate(log_ratio, advantages, **bounds)
        if self.mismatch_correction != "off":
            kind, level = self.mismatch_correction, self.mismatch_level
            limits = {"low": self.mismatch_min, "high": self.mismatch_max}
            gap = old - batch.rollout_logprobs
            weights = correction_weights(gap, batch.loss_mask, kind=kind, level=level, **limits)
            loss = loss * weights
            metrics["mismatch/weight_mean"] = weights
        loss = loss - self.entropy_coef * batch.learned(entropy)
        if self.needs_reference:
            reference = batch.learned(batch.reference_logprobs)
            kl = losses.kl_divergence(logprobs, reference, self.kl_estimator)
            metrics["actor/kl_ref"] = kl
            if self.kl_in == "loss":
                loss = loss + self.current_kl_coef(memory) * kl
        return loss, metrics
