"""What an update's metrics are sums and means of."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor


class Sums:
    """Of one minibatch: per-token metrics summed over its tokens, and what there is one of per step."""

    def __init__(self) -> None:
        self.per_token: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = defaultdict(int)
        self.per_step: dict[str, float] = defaultdict(float)

    def add_tokens(self, metrics: dict[str, Tensor], mask: Tensor) -> None:
        for name, values in metrics.items():
            self.per_token[name] += float(values.detach().masked_fill(~mask, 0.0).sum())
            self.tokens[name] += int(mask.sum())


class Totals:
    """Running means: per-token metrics over all tokens seen, per-step ones over optimizer steps."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)

    def add(self, sums: Sums) -> None:
        """Of a minibatch that an optimizer step was made of."""
        for name, value in sums.per_token.items():
            self.sums[name] += value
            self.counts[name] += sums.tokens[name]
        for name, value in sums.per_step.items():
            self.sums[name] += value
            self.counts[name] += 1

    def means(self) -> dict[str, float]:
        return {name: value / self.counts[name] for name, value in self.sums.items()}
