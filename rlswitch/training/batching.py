"""Rollouts to tensors, minibatches to micro-batches within a token budget, rows to a model's inputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlswitch.types import Batch, Group


def to_batch(groups: Sequence[Group], pad_token_id: int, device: torch.device) -> Batch:
    """All rollouts of `groups`, prompt and completion side by side, padded on the right."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    sequences = [r.prompt.token_ids + r.token_ids for r in rollouts]
    learned = [r.learned or [True] * len(r.token_ids) for r in rollouts]
    batch = Batch(
        token_ids=pad_right(sequences, pad_token_id, torch.long),
        attention_mask=pad_right([[1] * len(s) for s in sequences], 0, torch.long),
        prompt_lengths=torch.tensor([len(r.prompt.token_ids) for r in rollouts]),
        completion_mask=pad_right([[True] * len(r.token_ids) for r in rollouts], False, torch.bool),
        loss_mask=pad_right(learned, False, torch.bool),
        rollout_logprobs=pad_right([r.logprobs for r in rollouts], 0.0, torch.float32),
        rewards=torch.tensor([r.reward for r in rollouts], dtype=torch.float32),
        group=torch.tensor([i for i, group in enumerate(groups) for _ in group.rollouts]),
        truncated=torch.tensor([r.finish_reason == "length" for r in rollouts]),
    )
    batch.rollout_logprobs = batch.learned(batch.rollout_logprobs)
    return batch.to(device)


def micro_batches(lengths: Tensor, token_budget: int, packed: bool = False) -> Iterator[Tensor]:
    """Indices [N] into `lengths` [B] by micro-batch: neighbours in length, padded size within the budget.

    When `packed`, only the tokens themselves count. A row longer than the budget is a micro-batch alone.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    sizes = lengths[order].tolist()
    start = 0
    while start < len(sizes):
        stop, total = start + 1, sizes[start]
        while stop < len(sizes) and (total := total + sizes[stop if packed else start]) <= token_budget:
            stop += 1
        yield order[start:stop]
        start = stop


def minibatches(size: int, count: int, seed: int) -> Iterator[Tensor]:
    """A seeded permutation of `size` rollouts in `count` parts whose sizes differ by at most one."""
    assert size >= count, (size, count)
    generator = torch.Generator().manual_seed(seed)
    yield from torch.randperm(size, generator=generator).tensor_split(count)


@dataclass(frozen=True, slots=True)
class Layout:
    """A model's inputs, one padded row per rollout or all in one row, and where its N learned tokens are."""

    inputs: dict[str, Tensor]
    """Keyword arguments: token ids [R, L], and the attention mask or position ids."""
    positions: Tensor  # [N] index into the R * L positions of the one that predicts each token
    rows: Tensor  # [N] its rollout
    columns: Tensor  # [N] its place in the completion
    targets: Tensor  # [N] the token itself

    def spread(self, values: Tensor, batch: Batch) -> Tensor:
        """Values [N] to [B, T], zero off the loss mask."""
        empty = torch.zeros(batch.completion_mask.shape, dtype=values.dtype, device=values.device)
        return empty.index_put((self.rows, self.columns), values)


def lay_out(batch: Batch, packed: bool) -> Layout:
    """One row per rollout, or `packed`: no padding, and position ids that restart at zero per rollout.

    Without an attention mask transformers separates packed rollouts by their position ids.
    """
    rows, columns = batch.loss_mask.nonzero(as_tuple=True)
    within = batch.prompt_lengths[rows] - 1 + columns
    targets = batch.token_ids[rows, within + 1]
    if not packed:
        inputs = {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask}
        return Layout(inputs, rows * batch.token_ids.shape[1] + within, rows, columns, targets)
    real = batch.attention_mask.bool()
    starts = batch.lengths.cumsum(0) - batch.lengths
    inputs = {
        "input_ids": batch.token_ids[real][None],
        "position_ids": (batch.attention_mask.cumsum(-1) - 1)[real][None],
    }
    return Layout(inputs, starts[rows] + within, rows, columns, targets)


def pad_right(rows: Sequence[Sequence], fill: object, dtype: torch.dtype) -> Tensor:
    """Rows of any length as one tensor [B, L]."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)
