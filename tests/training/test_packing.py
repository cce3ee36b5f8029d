"""Packing rollouts into one row without padding may only change memory and speed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlswitch.errors import ConfigError
from rlswitch.training.batching import lay_out, micro_batches, to_batch
from rlswitch.training.logprobs import check_packing, policy_logprobs
from rlswitch.training.trainer import Trainer
from rlswitch.types import Group, Prompt, Rollout

CPU = torch.device("cpu")
SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6)


def batch_of(sizes: list[tuple[int, int]]):
    """A batch of rollouts with prompts and completions of these lengths."""
    groups = []
    for index, (prompt_length, length) in enumerate(sizes):
        tokens = [(index + t) % 10 for t in range(prompt_length)]
        prompt = Prompt(index=index, messages="", token_ids=tokens)
        rollout = Rollout(
            prompt=prompt,
            sample=0,
            token_ids=[(3 * index + t) % 10 for t in range(length)],
            logprobs=[-1.0] * length,
            text="",
            finish_reason="stop",
            policy_version=0,
        )
        groups.append(Group(prompt=prompt, rollouts=[rollout]))
    return to_batch(groups, 12, CPU)


@pytest.fixture
def gradients(make_run, make_trainer, make_groups) -> Callable[..., tuple[dict, list[torch.Tensor], Trainer]]:
    """gradients("ppo", packing=True): metrics and gradients of one step."""

    def make(algorithm: str, **trainer_settings):
        settings = {"max_grad_norm": 1e9, "micro_batch_tokens": 30} | trainer_settings
        options = {"kl_coef": 0.1, "entropy_coef": 0.01}
        trainer = make_trainer(make_run(algorithm, options=options, trainer=settings))
        seen: list[torch.Tensor] = []
        trainer.optimizer.optimizer.register_step_pre_hook(
            lambda optimizer, *_: seen.extend(
                p.grad.clone() for group in optimizer.param_groups for p in group["params"]
            )
        )
        batch = trainer.prepare(make_groups())
        batch.advantages, batch.returns = trainer.run.algorithm.estimate_advantages(batch, trainer.memory)
        return trainer.update(batch), seen, trainer

    return make


@given(sizes=SIZES)
def test_a_packed_row_holds_every_token_and_no_padding(sizes):
    batch = batch_of(sizes)
    inputs = lay_out(batch, packed=True).inputs
    tokens = [t for row, real in zip(batch.token_ids, batch.attention_mask, strict=True)
              for t in row[real.bool()].tolist()]  # fmt: skip
    assert inputs["input_ids"].tolist() == [tokens]
    assert inputs["position_ids"].tolist() == [
        [t for prompt, length in sizes for t in range(prompt + length)]
    ]
    assert "attention_mask" not in inputs


@given(sizes=SIZES, packed=st.booleans())
def test_every_completion_token_is_found_where_it_is_predicted(sizes, packed: bool):
    batch = batch_of(sizes)
    layout = lay_out(batch, packed)
    flat = layout.inputs["input_ids"].flatten()
    predicted = layout.spread(flat[layout.positions + 1].float(), batch)
    for row, (prompt_length, length) in enumerate(sizes):
        sequence = batch.token_ids[row, prompt_length : prompt_length + length]
        assert predicted[row, :length].tolist() == sequence.tolist()
        assert not predicted[row, length:].any()


@given(sizes=SIZES, budget=st.integers(1, 40))
def test_packed_micro_batches_fill_the_budget_with_tokens_alone(sizes, budget: int):
    batch = batch_of(sizes)
    parts = [part.tolist() for part in micro_batches(batch.lengths, budget, packed=True)]
    assert sorted(row for part in parts for row in part) == list(range(len(sizes)))
    length = [prompt + completion for prompt, completion in sizes]
    totals = [sum(length[row] for row in part) for part in parts]
    assert all(total <= budget or len(part) == 1 for total, part in zip(totals, parts, strict=True))
    # as full as possible: the first rollout of the next part would not have fitted
    following = [length[part[0]] for part in parts[1:]]
    assert all(total + more > budget for total, more in zip(totals, following, strict=False))


def test_packed_logprobs_are_the_padded_ones(tiny_model):
    batch, model = batch_of([(3, 4), (1, 6), (5, 1), (2, 2)]), tiny_model().model
    padded, packed = (policy_logprobs(model, batch, 0.7, packed=it) for it in (False, True))
    for ours, theirs in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert float(padded[0].detach().abs().max()) > 0.1


def test_a_model_whose_packed_rollouts_see_each_other_is_refused(tiny_model):
    model, sequences = tiny_model().model, [[13, 1, 2, 10, 3], [9, 8, 0, 15]]
    check_packing(model, sequences, 1e-3)
    leaky = copy.deepcopy(model)
    forward = leaky.forward
    leaky.forward = lambda input_ids, position_ids=None, **rest: forward(input_ids=input_ids, **rest)
    with pytest.raises(ConfigError, match=r"trainer\.packing = true: .* set trainer\.packing=false"):
        check_packing(leaky, sequences, 1e-3)


def test_packed_rollouts_do_not_see_each_other(tiny_model):
    model = tiny_model().model
    alone, _ = policy_logprobs(model, batch_of([(3, 4)]), 1.0, packed=True)
    together, _ = policy_logprobs(model, batch_of([(3, 4), (1, 6), (5, 1)]), 1.0, packed=True)
    torch.testing.assert_close(together[:1, :4], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_packed_is_padded_for_metrics_and_gradients(gradients, algorithm: str):
    (padded, ours, _), (packed, theirs, _) = (gradients(algorithm, packing=it) for it in (False, True))
    assert packed == pytest.approx(padded, rel=1e-4, abs=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert max(float(g.abs().max()) for g in ours) > 1e-3
