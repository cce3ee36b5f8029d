"""The algorithms against each other: which is a variant of which, and how exactly."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlswitch.algorithms.advantages import discounted_returns, gae, group_relative, leave_one_out
from rlswitch.algorithms.grpo import GRPO
from rlswitch.algorithms.losses import (
    clipped_surrogate,
    kl_divergence,
    sequence_log_ratio,
    weighted_surrogate,
)
from rlswitch.algorithms.reinforce import Reinforce
from rlswitch.algorithms.reinforce_pp import ReinforcePP
from rlswitch.command.compose import Source, compose_run
from rlswitch.loop import collect
from rlswitch.rewards.rewards import overlong_penalty
from rlswitch.types import Batch, Group, Prompt


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# -- the family --------------------------------------------------------------------------------


def batch_of(logprobs, old, advantages, mask, reference=None):
    """A batch with only what a policy loss reads."""
    rows = mask.shape[0]
    return Batch(
        token_ids=torch.zeros(rows, 1, dtype=torch.long),
        attention_mask=torch.ones(rows, 1, dtype=torch.long),
        prompt_lengths=torch.ones(rows, dtype=torch.long),
        completion_mask=mask,
        loss_mask=mask,
        rollout_logprobs=old,
        rewards=torch.zeros(rows),
        group=torch.zeros(rows, dtype=torch.long),
        truncated=torch.zeros(rows, dtype=torch.bool),
        old_logprobs=old,
        reference_logprobs=reference,
        advantages=advantages,
    )


def loss_of(algorithm, logprobs, batch):
    loss, _ = algorithm.policy_loss(batch, logprobs, torch.zeros_like(logprobs), {})
    return loss


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 99))
def test_rloo_is_unscaled_grpo_times_g_over_g_minus_1(size, groups, seed):
    rewards = noise((size * groups,), seed)
    group = torch.arange(groups).repeat_interleave(size)
    grpo = group_relative(rewards, group, scale_by_std=False)
    torch.testing.assert_close(leave_one_out(rewards, group), grpo * size / (size - 1))


def test_leave_one_out_by_hand():
    rewards, group = torch.tensor([1.0, 0.0, 0.5, 7.0]), torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(leave_one_out(rewards, group), torch.tensor([0.75, -0.75, 0.0, 0.0]))


def test_discounted_returns_are_the_returns_of_gae_without_a_critic():
    rewards, mask = noise((3, 6)), torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] + [False] * 5])
    rewards = rewards * mask
    expected, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=0.9, gae_lambda=1.0)
    torch.testing.assert_close(discounted_returns(rewards, mask, gamma=0.9), expected)


def test_reinforce_pp_with_a_group_baseline_is_blind_to_a_constant_reward():
    mask = torch.ones(4, 3, dtype=torch.bool)
    old = noise((4, 3))
    batch = batch_of(old, old, None, mask)
    batch.group = torch.tensor([0, 0, 1, 1])
    algorithm = ReinforcePP(group_baseline=True)
    batch.rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    batch.advantages, batch.returns = algorithm.estimate_advantages(batch, {})
    before = batch.advantages
    batch.rewards = batch.rewards + torch.tensor([5.0, 5.0, -3.0, -3.0])
    batch.advantages, batch.returns = algorithm.estimate_advantages(batch, {})
    torch.testing.assert_close(batch.advantages, before)


def test_dapo_with_equal_clips_is_grpo_with_token_mean():
    run = compose_run(["recipe=dapo", "algorithm.ratio_clip_high=0.2"], Source.default())
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logprobs, old, advantages = (noise((2, 3), seed) for seed in range(3))
    batch = batch_of(logprobs, old, advantages, mask)
    torch.testing.assert_close(loss_of(run.algorithm, logprobs, batch), loss_of(GRPO(), logprobs, batch))
    assert run.algorithm.loss_aggregation == GRPO().loss_aggregation == "token-mean"


def test_gspo_with_completions_of_one_token_is_the_token_ratio():
    mask = torch.ones(5, 1, dtype=torch.bool)
    logprobs, old, advantages = (noise((5, 1), seed) for seed in range(3))
    batch = batch_of(logprobs, old, advantages, mask)
    sequence = loss_of(GRPO(ratio_level="sequence"), logprobs, batch)
    torch.testing.assert_close(sequence, loss_of(GRPO(), logprobs, batch))


def test_gspo_gives_every_token_the_geometric_mean_ratio():
    mask = torch.tensor([[True, True, False]])
    log_ratio = torch.tensor([[0.2, 0.4, 9.0]])
    torch.testing.assert_close(sequence_log_ratio(log_ratio, mask), torch.full((1, 3), 0.3))


def test_cispo_keeps_the_gradient_of_every_token_and_bounds_its_weight():
    logprobs = torch.log(torch.tensor([[0.9, 0.5, 0.05]])).requires_grad_()
    old, advantages = torch.log(torch.tensor([[0.1, 0.5, 0.5]])), torch.tensor([[1.0, 2.0, -1.0]])
    loss, _ = weighted_surrogate(logprobs, logprobs - old, advantages, clip_low=0.5, clip_high=2.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[-3.0, -2.0, 0.5]]))


def test_dual_clip_bounds_what_a_bad_token_can_cost():
    log_ratio, advantages = torch.tensor([[9.0, 9.0, 2.0]]).log(), torch.tensor([[-1.0, 1.0, -1.0]])
    loss, _ = clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([[3.0, -1.2, 2.0]]))


def test_kl_goes_into_the_loss_or_into_the_reward_never_both():
    mask = torch.ones(2, 3, dtype=torch.bool)
    logprobs, old, reference, advantages = (noise((2, 3), seed) for seed in range(4))
    batch = batch_of(logprobs, old, advantages, mask, reference)
    plain = GRPO()
    for place in ("loss", "reward"):
        algorithm = GRPO(kl_coef=0.5, kl_in=place)
        changed = not torch.equal(loss_of(algorithm, logprobs, batch), loss_of(plain, logprobs, batch))
        punished = not torch.equal(algorithm.token_rewards(batch, {}), plain.token_rewards(batch, {}))
        assert (changed, punished) == (place == "loss", place == "reward")


def test_only_k1_as_a_reward_pulls_the_policy_back_to_the_reference():
    """The exact gradient of a softmax over six actions that has moved away from the reference."""
    reference, moved = noise((6,)).log_softmax(0), 0.1 * noise((6,), 1)
    pull = {}
    for estimator in ("k1", "k3"):
        logits = (reference + moved).requires_grad_()
        logprobs = logits.log_softmax(0)
        penalty = kl_divergence(logprobs.detach(), reference, estimator)
        (pull[estimator],) = torch.autograd.grad((logprobs.exp() * penalty).sum(), logits)
    logits = (reference + moved).requires_grad_()
    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    torch.testing.assert_close(pull["k1"], exact)
    assert float(pull["k3"].norm()) < 0.2 * float(exact.norm())


def test_overlong_completions_lose_up_to_one():
    penalties = [overlong_penalty(length, max_length=20, buffer=4) for length in (10, 16, 18, 20)]
    assert penalties == [0.0, 0.0, 0.5, 1.0]


# -- dynamic sampling --------------------------------------------------------------------------


def session_with(rewards_by_prompt, rounds: int, wanted: int):
    """A session with prompts in order and fixed rewards; records its requests."""
    asked: list[int] = []
    cursor = iter(range(len(rewards_by_prompt)))

    def take(n):
        asked.append(n)
        return [next(cursor) for _ in range(n)]

    def generate(prompts, sampling):
        return [
            Group(
                prompt=Prompt(index=i, messages="", token_ids=[1]),
                rollouts=[SimpleNamespace(reward=reward) for reward in rewards_by_prompt[i]],
            )
            for i in prompts
        ]

    run = compose_run(
        ["recipe=dapo", f"algorithm.dynamic_sampling={rounds}", f"rollout.num_prompts={wanted}"],
        Source.default(),
    )
    return asked, SimpleNamespace(
        run=run,
        trainer=SimpleNamespace(version=0, publish=lambda: None),
        switch=SimpleNamespace(give_to=lambda engine, weights: None),
        prompts=SimpleNamespace(take=take),
        engine=None,
        sampler=SimpleNamespace(sample=lambda engine, prompts, sampling: generate(prompts, sampling)),
        rewards=SimpleNamespace(score=lambda groups, switch: None),
        ledger=SimpleNamespace(work=lambda name: nullcontext()),
    )


DULL, USEFUL = (1.0, 1.0), (1.0, 0.0)


def test_dynamic_sampling_replaces_groups_without_signal():
    asked, session = session_with([DULL, USEFUL, DULL, USEFUL, USEFUL, USEFUL], rounds=4, wanted=4)
    groups = collect(session)
    assert asked == [4, 2]
    assert [group.prompt.index for group in groups] == [1, 3, 4, 5]


def test_dynamic_sampling_stops_at_its_budget_and_keeps_the_size_of_the_step():
    asked, session = session_with([USEFUL, *[DULL] * 20], rounds=2, wanted=4)
    groups = collect(session)
    assert asked == [4, 3, 3]
    assert len(groups) == 4 and groups[0].prompt.index == 0


def test_without_dynamic_sampling_every_group_is_kept_in_order():
    asked, session = session_with([DULL, USEFUL, DULL, DULL], rounds=0, wanted=4)
    assert [group.prompt.index for group in collect(session)] == [0, 1, 2, 3]
    assert asked == [4]


# -- the worked example of CONTRIBUTING.md -----------------------------------------------------


def test_the_baseline_of_reinforce_is_the_running_mean_of_earlier_steps():
    algorithm, memory, seen = Reinforce(baseline_decay=0.75), {}, []
    mask = torch.tensor([[True, True], [True, False]])
    for rewards in ([1.0, 3.0], [4.0, 0.0], [0.0, 0.0]):
        batch = batch_of(noise((2, 2)), noise((2, 2)), None, mask)
        batch.rewards = torch.tensor(rewards)
        batch.advantages, batch.returns = algorithm.estimate_advantages(batch, memory)
        seen.append(batch.advantages.tolist())
    # baselines: its own mean 2; 0.75 x 2 + 0.25 x 2 = 2; 2 again
    assert seen == [[[-1, -1], [1, 0]], [[2, 2], [-2, 0]], [[-2, -2], [-2, 0]]]
    assert memory == {"baseline": 0.75 * 2.0 + 0.25 * 0.0}
    batch.rewards = torch.tensor([math.nan, 1.0])  # the update will be skipped
    batch.advantages, batch.returns = algorithm.estimate_advantages(batch, memory)
    assert memory == {"baseline": 0.75 * 2.0 + 0.25 * 0.0}
