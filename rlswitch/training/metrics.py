"""The metrics of an update: sums over micro-batches, means over a step, statistics of its batch."""

from __future__ import annotations

import math
from collections import defaultdict

from torch import Tensor

from rlswitch.algorithms.mismatch import mismatch_metrics
from rlswitch.types import Batch


class Sums:
    """Of one minibatch: metrics per token, summed over its learned tokens, and metrics per optimizer step."""

    def __init__(self) -> None:
        self.per_token: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = defaultdict(int)
        self.per_step: dict[str, float] = defaultdict(float)

    def add_tokens(self, metrics: dict[str, Tensor], mask: Tensor) -> None:
        """`metrics` [B, T] over the tokens of the loss mask [B, T]."""
        for name, values in metrics.items():
            self.per_token[name] += float(values.detach().masked_fill(~mask, 0.0).sum())
            self.tokens[name] += int(mask.sum())

    def not_finite(self) -> list[str]:
        return [f"{name} = {value}" for name, value in self.per_step.items() if not math.isfinite(value)]


class Totals:
    """Running means: of metrics per token over all learned tokens, of the others over optimizer steps."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)

    def add(self, sums: Sums) -> None:
        for name, value in sums.per_token.items():
            self.sums[name] += value
            self.counts[name] += sums.tokens[name]
        for name, value in sums.per_step.items():
            self.sums[name] += value
            self.counts[name] += 1

    def means(self) -> dict[str, float]:
        return {name: value / self.counts[name] for name, value in self.sums.items()}


def batch_metrics(batch: Batch) -> dict[str, float]:
    """The mismatch with the engine, and the share of the returns' variance that the critic explains."""
    metrics = mismatch_metrics(batch.rollout_logprobs, batch.old_logprobs, batch.loss_mask)
    if batch.values is not None and batch.returns is not None:
        values, returns = batch.values[batch.loss_mask], batch.returns[batch.loss_mask]
        unexplained = (returns - values).var(correction=0) / returns.var(correction=0)
        metrics["critic/explained_var"] = float(1 - unexplained) if returns.std() > 0 else 0.0
        metrics["critic/values_mean"] = float(values.mean())
    return metrics
