"""The metrics of an update: sums over micro-batches, means over a step, statistics of its batch."""

import math
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from rlswitch.algorithms.mismatch import mismatch_metrics
from rlswitch.types import Batch


class Sums:
    """Of one minibatch: metrics per token, summed over its learned tokens, and metrics per optimizer step."""

    def __init__(self) -> None:
        self.tokens = 0
        self.per_token: dict[str, float] = defaultdict(float)
        self.per_step: dict[str, float] = defaultdict(float)

    def add_tokens(self, metrics: dict[str, Tensor], mask: Tensor) -> None:
        """`metrics` [B, T] over the tokens of the loss mask [B, T]: the same metrics in every call."""
        self.tokens += int(mask.sum())
        for name, values in metrics.items():
            self.per_token[name] += float(values.detach().masked_fill(~mask, 0.0).sum())

    def not_finite(self) -> list[str]:
        return [f"{name} = {value}" for name, value in self.per_step.items() if not math.isfinite(value)]


def means(parts: Sequence[Sums]) -> dict[str, float]:
    """Metrics per token as means over all learned tokens, the others over optimizer steps."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for part in parts:
        for metrics, count in ((part.per_token, part.tokens), (part.per_step, 1)):
            for name, value in metrics.items():
                sums[name] += value
                counts[name] += count
    return {name: value / counts[name] for name, value in sums.items()}


def batch_metrics(batch: Batch) -> dict[str, float]:
    """The mismatch with the engine, and the share of the returns' variance that the critic explains."""
    metrics = mismatch_metrics(batch.rollout_logprobs, batch.old_logprobs, batch.loss_mask)
    if batch.returns is not None:
        values, returns = batch.values[batch.loss_mask], batch.returns[batch.loss_mask]
        unexplained = (returns - values).var(correction=0) / returns.var(correction=0)
        metrics["critic/explained_var"] = float(1 - unexplained) if returns.std() > 0 else 0.0
        metrics["critic/values_mean"] = float(values.mean())
    return metrics
