"""Rollouts to tensors and back, and the two ways to split a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlswitch.training.batching import lay_out, micro_batches, minibatches, to_batch
from rlswitch.types import Batch, Group, Prompt, Rollout

PAD = 99
SIZES = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.integers(1, 7), min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)
"""Prompt length and completion lengths of each group."""


def make_groups(sizes: list[tuple[int, list[int]]]) -> list[Group]:
    groups = []
    for index, (prompt_length, completions) in enumerate(sizes):
        prompt = Prompt(index=index, messages="", token_ids=list(range(prompt_length)))
        rollouts = [
            Rollout(
                prompt=prompt,
                sample=sample,
                token_ids=[10 * (sample + 1) + t for t in range(length)],
                logprobs=[-(sample + 1.0) / (t + 1) for t in range(length)],
                text="",
                finish_reason="length" if length % 2 else "stop",
                policy_version=0,
                reward=float(index - sample),
            )
            for sample, length in enumerate(completions)
        ]
        groups.append(Group(prompt=prompt, rollouts=rollouts))
    return groups


def make_batch(sizes: list[tuple[int, list[int]]]) -> Batch:
    return to_batch(make_groups(sizes), PAD, torch.device("cpu"))


@given(sizes=SIZES)
def test_to_batch_loses_nothing(sizes: list[tuple[int, list[int]]]):
    groups, batch = make_groups(sizes), make_batch(sizes)
    rollouts = [(i, rollout) for i, group in enumerate(groups) for rollout in group.rollouts]
    assert len(batch) == len(rollouts)
    for row, (group, rollout) in enumerate(rollouts):
        attended = batch.attention_mask[row].bool()
        tokens = rollout.prompt.token_ids + rollout.token_ids
        assert batch.token_ids[row, attended].tolist() == tokens
        assert attended.tolist() == sorted(attended.tolist(), reverse=True)
        assert (batch.token_ids[row, ~attended] == PAD).all()
        mask = batch.loss_mask[row]
        layout = lay_out(batch, packed=False)
        assert layout.targets[layout.rows == row].tolist() == rollout.token_ids
        expected = torch.tensor(rollout.logprobs)
        assert torch.equal(batch.rollout_logprobs[row, mask], expected)
        assert not batch.rollout_logprobs[row, ~mask].any()
        assert int(batch.prompt_lengths[row]) == len(rollout.prompt.token_ids)
        assert float(batch.rewards[row]) == rollout.reward
        assert int(batch.group[row]) == group
        assert bool(batch.truncated[row]) == (rollout.finish_reason == "length")


@given(sizes=SIZES, data=st.data())
def test_rows_trims_padding_and_keeps_every_value(sizes, data):
    batch = make_batch(sizes)
    batch.advantages = torch.rand(batch.loss_mask.shape) * batch.loss_mask
    index = torch.tensor(data.draw(st.permutations(range(len(batch)))))
    index = index[: data.draw(st.integers(1, len(batch)))]
    part = batch.rows(index)
    assert part.token_ids.shape[1] == int(part.attention_mask.sum(-1).max())
    assert part.completion_mask.shape[1] == int(part.completion_mask.sum(-1).max())
    assert part.values is None
    for row, source in enumerate(index.tolist()):
        for name, mask in [
            ("token_ids", "attention_mask"),
            ("rollout_logprobs", "completion_mask"),
            ("advantages", "completion_mask"),
        ]:
            theirs = getattr(batch, name)[source][getattr(batch, mask)[source].bool()]
            ours = getattr(part, name)[row][getattr(part, mask)[row].bool()]
            assert torch.equal(ours, theirs)
        for name in ("rewards", "group", "truncated", "prompt_lengths"):
            assert getattr(part, name)[row] == getattr(batch, name)[source]


@given(sizes=SIZES, budget=st.integers(1, 60))
def test_micro_batches_are_a_partition_within_the_budget(sizes, budget: int):
    batch = make_batch(sizes)
    parts = list(micro_batches(batch.lengths, budget))
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(batch)))
    for part in parts:
        assert batch.rows(part).token_ids.numel() <= budget or len(part) == 1


@given(sizes=SIZES)
def test_micro_batches_put_neighbours_in_length_together(sizes):
    batch = make_batch(sizes)
    lengths = batch.attention_mask.sum(-1)
    order = torch.cat(list(micro_batches(batch.lengths, 20)))
    assert lengths[order].tolist() == sorted(lengths.tolist(), reverse=True)


@given(size=st.integers(1, 6), count=st.integers(1, 6), seed=st.integers(0, 2**63 - 1))
def test_minibatches_are_parts_of_a_permutation_as_equal_as_can_be(size: int, count: int, seed: int):
    for total in (size * count, size * count + count // 2):
        parts = list(minibatches(total, count, seed))
        assert len(parts) == count
        assert {len(part) for part in parts} <= {size, size + 1}
        assert sorted(torch.cat(parts).tolist()) == list(range(total))


def test_minibatches_depend_on_the_seed_and_on_nothing_else():
    def draw(seed: int) -> list[list[int]]:
        torch.rand(3)
        return [part.tolist() for part in minibatches(64, 4, seed)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_an_empty_minibatch_is_refused():
    with pytest.raises(AssertionError):
        list(minibatches(2, 3, 0))
