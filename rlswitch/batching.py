"""Rollouts to padded tensors, and a minibatch to micro-batches that fit a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlswitch.types import Batch, Group


def to_batch(groups: Sequence[Group], pad_token_id: int, device: torch.device) -> Batch:
    """All rollouts of `groups`, prompt and completion side by side, padded on the right."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    sequences = [r.prompt.token_ids + r.token_ids for r in rollouts]
    completions = [r.token_ids for r in rollouts]
    token_ids = _pad(sequences, pad_token_id, torch.long)
    group_index = [i for i, group in enumerate(groups) for _ in group.rollouts]
    batch = Batch(
        token_ids=token_ids,
        attention_mask=_pad([[1] * len(s) for s in sequences], 0, torch.long),
        prompt_lengths=torch.tensor([len(r.prompt.token_ids) for r in rollouts]),
        mask=_pad([[True] * len(c) for c in completions], False, torch.bool),
        rollout_logprobs=_pad([r.logprobs for r in rollouts], 0.0, torch.float32),
        rewards=torch.tensor([r.reward for r in rollouts], dtype=torch.float32),
        group=torch.tensor(group_index),
        truncated=torch.tensor([r.finish_reason == "length" for r in rollouts]),
    )
    return batch.to(device)


def micro_batches(batch: Batch, token_budget: int) -> Iterator[Tensor]:
    """Row indices [N] of each micro-batch: neighbours in length, padded size within the budget.

    A rollout longer than the budget gets a micro-batch of its own rather than being lost.
    """
    lengths = batch.attention_mask.sum(-1)
    order = torch.argsort(lengths, descending=True, stable=True)
    start = 0
    while start < len(order):
        rows = max(token_budget // int(lengths[order[start]]), 1)
        yield order[start : start + rows]
        start += rows


def minibatches(size: int, count: int, seed: int) -> Iterator[Tensor]:
    """A seeded permutation of `size` rollouts cut into `count` equal parts."""
    assert size % count == 0, (size, count)
    generator = torch.Generator().manual_seed(seed)
    yield from torch.randperm(size, generator=generator).chunk(count)


def completion_positions(batch: Batch) -> Tensor:
    """Index into the sequence [B, T] of the position that predicts each completion token."""
    steps = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    positions = batch.prompt_lengths[:, None] - 1 + steps
    return positions.clamp(max=batch.token_ids.shape[1] - 1)


def completion_tokens(batch: Batch) -> Tensor:
    """The completion tokens [B, T]; padding repeats whatever stands last in the sequence."""
    last = batch.token_ids.shape[1] - 1
    return batch.token_ids.gather(1, (completion_positions(batch) + 1).clamp(max=last))


def _pad(rows: Sequence[Sequence], fill: object, dtype: torch.dtype) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)
