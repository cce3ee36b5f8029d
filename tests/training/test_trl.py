"""The losses against an independent implementation: TRL's released GRPOTrainer on the same tensors."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlswitch.algorithms.grpo import GRPO
from rlswitch.algorithms.losses import token_weights
from rlswitch.algorithms.mismatch import correction_weights
from rlswitch.types import Batch

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")

WIDTH, MAX_LENGTH = 7, 16
LENGTHS = (7, 1, 4, 6, 3, 2)
SHARED: dict[str, dict[str, Any]] = {
    "grpo": {"loss_aggregation": "seq-mean-token-mean"},
    "bnpo": {"loss_aggregation": "token-mean"},
    "dapo": {"loss_aggregation": "token-mean"},
    "dr_grpo": {"loss_aggregation": "seq-mean-token-sum-norm"},
    "luspo": {"loss_aggregation": "seq-mean-token-sum"},
    # TRL bounds the weight only from above, by epsilon_high itself
    "cispo": {"loss_aggregation": "token-mean", "surrogate": "weighted", "ratio_clip_low": 1.0},
}
"""TRL's loss_type names and ours."""


def noise(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(LENGTHS), WIDTH, generator=generator, dtype=torch.float64)


class Case:
    """The same tensors for both: log-probabilities that have moved, old, reference, advantages, a mask."""

    def __init__(self, seed: int):
        self.mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
        self.old = -noise(seed).abs()
        self.logprobs = (self.old + noise(seed + 1, 0.4)).requires_grad_()
        self.reference = self.old + noise(seed + 2, 0.3)
        self.rollout = self.old + noise(seed + 3, 0.5)
        self.entropy = noise(seed + 4).abs()
        self.advantages = noise(seed + 5)[:, 0]

    def ours(self, algorithm: GRPO) -> tuple[Tensor, Tensor]:
        """Loss and its gradient with respect to the log-probabilities."""
        rows = len(LENGTHS)
        batch = Batch(
            token_ids=torch.zeros(rows, 1, dtype=torch.long),
            attention_mask=torch.ones(rows, 1, dtype=torch.long),
            prompt_lengths=torch.ones(rows, dtype=torch.long),
            completion_mask=self.mask,
            loss_mask=self.mask,
            rollout_logprobs=self.rollout,
            rewards=torch.zeros(rows),
            group=torch.zeros(rows, dtype=torch.long),
            truncated=torch.zeros(rows, dtype=torch.bool),
            old_logprobs=self.old,
            reference_logprobs=self.reference,
            advantages=self.advantages[:, None] * self.mask,
        )
        weights = token_weights(self.mask, algorithm.loss_aggregation, MAX_LENGTH)
        loss, _ = algorithm.policy_loss(batch, self.logprobs, self.entropy, {})
        return self._with_gradient((loss * weights.double()).sum())

    def theirs(self, loss_type: str, **settings: Any) -> tuple[Tensor, Tensor]:
        trainer = make_trainer(loss_type, self.logprobs, self.entropy, settings)
        ids = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": self.mask.long(),
            "advantages": self.advantages,
            "old_per_token_logps": self.old,
            "ref_per_token_logps": self.reference,
            "num_items_in_batch": self.mask.sum(),
            "importance_sampling_ratio": settings.get("ratio"),
        }
        return self._with_gradient(trainer._compute_loss(None, inputs))

    def _with_gradient(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = torch.autograd.grad(loss, self.logprobs)
        return loss.detach(), gradient


def make_trainer(loss_type: str, logprobs: Tensor, entropy: Tensor, settings: dict[str, Any]) -> Any:
    """TRL's trainer with only what its loss reads: no model, no data."""
    trainer = grpo_trainer.GRPOTrainer.__new__(grpo_trainer.GRPOTrainer)
    vars(trainer).update(
        loss_type=loss_type,
        importance_sampling_level=settings.get("level", "token"),
        epsilon_low=settings.get("low", 0.2),
        epsilon_high=settings.get("high", 0.28),
        beta=settings.get("beta", 0.0),
        args=SimpleNamespace(delta=settings.get("delta"), use_bias_correction_kl=False),
        use_vllm=settings.get("ratio") is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled="entropy_coef" in settings,
        entropy_coef=settings.get("entropy_coef", 0.0),
        use_adaptive_entropy=False,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        max_completion_length=MAX_LENGTH,
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, entropy, None),
    )
    return trainer


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    assert float(ours[1].abs().max()) > 1e-3, "a gradient that vanishes proves nothing"
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-6


def clips(loss_type: str, high: float) -> dict[str, float]:
    """Our ratio_clip_high for their epsilon_high."""
    return {"ratio_clip_high": high - 1 if loss_type == "cispo" else high}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", sorted(SHARED))
def test_every_shared_loss_type_agrees(loss_type: str, level: str, beta: float, seed: int):
    case, high = Case(10 * seed), 1.3 if loss_type == "cispo" else 0.28
    options = {"ratio_level": level, "kl_coef": beta} | clips(loss_type, high) | SHARED[loss_type]
    assert_same(case.ours(GRPO(**options)), case.theirs(loss_type, level=level, beta=beta, high=high))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_dual_clip_is_their_delta(loss_type: str):
    case = Case(0)
    options = {"dual_clip": 1.5, "ratio_clip_high": 0.28} | SHARED[loss_type]
    ours = case.ours(GRPO(**options))
    assert_same(ours, case.theirs(loss_type, delta=1.5))
    assert float((ours[1] - case.theirs(loss_type)[1]).abs().max()) > 1e-3, "nothing was clipped"


def test_the_entropy_bonus_agrees_where_both_average_over_tokens():
    case = Case(0)
    ours = case.ours(GRPO(entropy_coef=0.3, ratio_clip_high=0.28))
    assert_same(ours, case.theirs("bnpo", entropy_coef=0.3))
    assert abs(float(ours[0] - case.theirs("bnpo")[0])) > 1e-2


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["tis", "mis", "icepop"])
def test_the_mismatch_weight_stands_where_theirs_does(kind: str, level: str):
    case = Case(0)
    ratio = correction_weights(case.old - case.rollout, case.mask, kind=kind, level=level, low=0.5, high=2.0)
    options = {"mismatch_correction": kind, "mismatch_level": level, "kl_coef": 0.1, "ratio_clip_high": 0.28}
    ours = case.ours(GRPO(**options))
    assert_same(ours, case.theirs("bnpo", ratio=ratio, beta=0.1))
    assert float((ours[1] - case.theirs("bnpo", beta=0.1)[1]).abs().max()) > 1e-3
