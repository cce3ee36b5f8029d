"""Advantages, losses and divergences, against values computed by hand and against each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlswitch.algorithms.advantages import gae, group_relative, rewards_at_last_token, whiten
from rlswitch.algorithms.grpo import GRPO
from rlswitch.algorithms.losses import (
    adapted_coefficient,
    clipped_surrogate,
    kl_divergence,
    token_weights,
    value_loss,
)
from rlswitch.algorithms.mismatch import correction_weights, mismatch_metrics
from rlswitch.algorithms.ppo import PPO
from rlswitch.run import OPTIONS
from rlswitch.types import Batch

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
LENGTHS = st.lists(st.integers(1, 6), min_size=2, max_size=5)
VARIANTS = st.sampled_from(
    [
        {},
        {"ratio_level": "sequence", "dual_clip": 3.0},
        {"surrogate": "weighted", "kl_in": "reward"},
        {"mismatch_correction": "icepop", "whiten_advantages": True},
        {"mismatch_correction": "tis", "mismatch_level": "sequence", "kl_estimator": "k2"},
    ]
)


def mask_of(lengths: list[int], width: int = 0) -> Tensor:
    steps = torch.arange(max(*lengths, width))
    return steps < torch.tensor(lengths)[:, None]


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def padded(tensor: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, columns))


# -- advantages --------------------------------------------------------------------------------


def test_group_relative_subtracts_the_mean_of_the_own_group_only():
    rewards, group = torch.tensor([1.0, 3.0, 10.0, 30.0]), torch.tensor([0, 0, 1, 1])
    plain = group_relative(rewards, group, scale_by_std=False)
    assert plain.tolist() == [-1.0, 1.0, -10.0, 10.0]


def test_group_relative_divides_by_the_sample_standard_deviation():
    rewards = torch.tensor([0.0, 0.0, 3.0])
    scaled = group_relative(rewards, torch.zeros(3, dtype=torch.long), scale_by_std=True)
    # mean 1, deviations -1 -1 2, variance 6 / 2
    expected = torch.tensor([-1.0, -1.0, 2.0]) / math.sqrt(3)
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=0)


def test_group_relative_does_not_care_how_groups_are_interleaved():
    rewards, order = noise((6,)), torch.tensor([4, 0, 2, 5, 1, 3])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    straight = group_relative(rewards, group, scale_by_std=True)
    shuffled = group_relative(rewards[order], group[order], scale_by_std=True)
    torch.testing.assert_close(shuffled, straight[order])


@given(reward=st.floats(-100, 100, width=32), size=st.integers(1, 33), scale=st.booleans())
def test_a_group_of_equal_rewards_gets_exactly_zero(reward: float, size: int, scale: bool):
    rewards = torch.full((size,), reward, dtype=torch.float32)
    group = torch.zeros(size, dtype=torch.long)
    assert group_relative(rewards, group, scale_by_std=scale).abs().max() == 0


@given(size=st.integers(2, 9), seed=st.integers(0, 99))
def test_leave_one_out_is_the_unscaled_group_advantage_times_g_over_g_minus_1(size: int, seed: int):
    rewards = noise((size,), seed)
    ours = group_relative(rewards, torch.zeros(size, dtype=torch.long), scale_by_std=False)
    leave_one_out = rewards - (rewards.sum() - rewards) / (size - 1)
    torch.testing.assert_close(leave_one_out, ours * size / (size - 1))


def test_the_reward_stands_on_the_last_completion_token():
    placed = rewards_at_last_token(torch.tensor([2.0, 5.0, 7.0]), mask_of([1, 3, 0]))
    assert placed.tolist() == [[2, 0, 0], [0, 0, 5], [0, 0, 0]]


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    advantages, returns = gae(rewards, values, mask_of([2], 3), gamma=0.5, gae_lambda=0.5)
    # last token: 1 - 0.25; first: 0.5 * 0.25 - 0.5 + 0.25 * 0.75
    assert advantages.tolist() == [[-0.1875, 0.75, 0.0]]
    assert returns.tolist() == [[0.3125, 1.0, 0.0]]


@given(lengths=LENGTHS, gamma=st.floats(0, 1), seed=st.integers(0, 99))
def test_gae_with_lambda_1_is_the_discounted_return_minus_the_value(lengths, gamma, seed):
    mask = mask_of(lengths)
    rewards, values = noise(mask.shape, seed) * mask, noise(mask.shape, seed + 1) * mask
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=1.0)
    width = mask.shape[1]
    discounted = torch.stack(
        [sum(gamma ** (u - t) * rewards[:, u] for u in range(t, width)) * mask[:, t] for t in range(width)],
        dim=1,
    )
    torch.testing.assert_close(returns, discounted)
    torch.testing.assert_close(advantages, discounted - values)


def test_gae_with_lambda_0_is_the_one_step_error():
    mask = mask_of([3])
    rewards, values = noise((1, 3)), noise((1, 3), 1)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(1, 1, dtype=values.dtype)], 1)
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values)


@given(reward=st.floats(-1e3, 1e3, width=32), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_equal_values_whiten_to_nothing_however_their_mean_rounds(reward: float, lengths: list[int]):
    mask = mask_of(lengths, 9)
    whitened = whiten(torch.full(mask.shape, reward), mask)
    assert whitened.dtype == torch.float32 and whitened.abs().max() <= 1e-4


def test_whiten_by_hand():
    whitened = whiten(torch.tensor([[1.0, 3.0, 100.0]]), mask_of([2], 3))
    torch.testing.assert_close(whitened, torch.tensor([[-1.0, 1.0, 0.0]]))


@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_whiten_has_mean_zero_and_variance_one_over_the_mask(lengths: list[int], seed: int):
    mask = mask_of(lengths)
    chosen = whiten(noise(mask.shape, seed) * 7 + 3, mask)[mask]
    assert abs(float(chosen.mean())) < 1e-9
    assert abs(float(chosen.var(correction=0)) - 1) < 1e-3  # epsilon shrinks close values


# -- losses ------------------------------------------------------------------------------------


def test_clipped_surrogate_by_hand():
    ratio = torch.tensor([[0.5, 0.5, 1.0, 2.0, 2.0]])
    advantages = torch.tensor([[1.0, -1.0, 3.0, 1.0, -1.0]])
    loss, metrics = clipped_surrogate(ratio.log(), advantages, clip_low=0.2, clip_high=0.4)
    torch.testing.assert_close(loss, torch.tensor([[-0.5, 0.8, -3.0, -1.4, 2.0]]))
    assert metrics["actor/clip_ratio_low"].tolist() == [[0, 1, 0, 0, 0]]
    assert metrics["actor/clip_ratio_high"].tolist() == [[0, 0, 0, 1, 0]]
    assert metrics["actor/clip_ratio"].tolist() == [[0, 1, 0, 1, 0]]
    torch.testing.assert_close(metrics["actor/ratio_mean"], ratio)
    torch.testing.assert_close(metrics["actor/ppo_kl"], -ratio.log())


def test_the_gradient_stops_exactly_where_a_ratio_counts_as_clipped():
    logprobs = (noise((4, 50)) * 0.5).requires_grad_()
    advantages = noise((4, 50), 1)
    loss, metrics = clipped_surrogate(logprobs, advantages, clip_low=0.2, clip_high=0.3)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert torch.equal(gradient == 0, metrics["actor/clip_ratio"] == 1)
    assert 0 < float(metrics["actor/clip_ratio"].mean()) < 1


def test_ppo_at_ratio_1_has_the_gradient_of_reinforce():
    logprobs, advantages = noise((3, 4)).requires_grad_(), noise((3, 4), 1)
    loss, _ = clipped_surrogate(logprobs - logprobs.detach(), advantages, clip_low=0.2, clip_high=0.2)
    (ppo,) = torch.autograd.grad(loss.sum(), logprobs)
    (reinforce,) = torch.autograd.grad(-(advantages * logprobs).sum(), logprobs)
    torch.testing.assert_close(ppo, reinforce)


def test_value_loss_by_hand():
    values, old = torch.tensor([[1.0, 0.1, 2.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    returns = torch.tensor([[2.0, 1.0, 0.0]])
    loss, metrics = value_loss(values, old, returns, clip=0.5)
    # clipping to 0.5 raises the first loss; it would lower the third, which is therefore not clipped
    torch.testing.assert_close(loss, torch.tensor([[1.125, 0.405, 2.0]]))
    assert metrics["critic/vf_clip_ratio"].tolist() == [[1, 0, 0]]


def test_value_loss_without_a_clip_is_half_the_squared_error():
    values, old, returns = noise((2, 3)), noise((2, 3), 1), noise((2, 3), 2)
    loss, metrics = value_loss(values, old, returns, clip=0)
    torch.testing.assert_close(loss, (values - returns) ** 2 / 2)
    assert not metrics["critic/vf_clip_ratio"].any()
    wide, _ = value_loss(values, old, returns, clip=1e9)
    torch.testing.assert_close(wide, loss)


def test_token_weights_by_hand():
    mask = mask_of([1, 3])
    expected = {
        "token-mean": [[1 / 4, 0, 0], [1 / 4, 1 / 4, 1 / 4]],
        "seq-mean-token-sum": [[1 / 2, 0, 0], [1 / 2, 1 / 2, 1 / 2]],
        "seq-mean-token-mean": [[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]],
        "seq-mean-token-sum-norm": [[1 / 20, 0, 0], [1 / 20, 1 / 20, 1 / 20]],
    }
    for aggregation, weights in expected.items():
        torch.testing.assert_close(token_weights(mask, aggregation, 10), torch.tensor(weights))


def test_every_aggregation_that_can_be_configured_is_implemented():
    choices = GRPO.__dataclass_fields__["loss_aggregation"].metadata["choices"]
    assert set(choices) == set(AGGREGATIONS)


@given(lengths=LENGTHS)
def test_weights_of_a_mean_sum_to_one(lengths: list[int]):
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        assert abs(float(token_weights(mask_of(lengths), aggregation, 8).sum()) - 1) < 1e-6


@given(length=st.integers(1, 9), rollouts=st.integers(1, 9))
def test_with_equal_lengths_all_aggregations_are_one_up_to_a_factor(length: int, rollouts: int):
    mask = mask_of([length] * rollouts + [length])
    mean = token_weights(mask, "token-mean", length)
    torch.testing.assert_close(token_weights(mask, "seq-mean-token-mean", length), mean)
    torch.testing.assert_close(token_weights(mask, "seq-mean-token-sum-norm", length), mean)
    torch.testing.assert_close(token_weights(mask, "seq-mean-token-sum", length), mean * length)


# -- divergences -------------------------------------------------------------------------------


def test_kl_estimators_by_hand():
    logprobs, reference = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    found = {k: float(kl_divergence(logprobs, reference, k)) for k in ("k1", "k2", "k3")}
    log2 = math.log(2)
    assert found == pytest.approx({"k1": log2, "k2": log2**2 / 2, "k3": 0.5 - 1 + log2}, abs=1e-6)


@given(step=st.floats(-0.05, 0.05))
def test_k2_and_k3_agree_to_second_order(step: float):
    logprobs, reference = torch.tensor([[step]], dtype=torch.float64), torch.zeros(1, 1).double()
    k2, k3 = (float(kl_divergence(logprobs, reference, k)) for k in ("k2", "k3"))
    assert abs(k2 - k3) <= abs(step) ** 3 / 5 + 1e-15 * abs(step)


def test_expectations_of_k1_and_k3_are_the_kl_divergence_and_of_k2_nearly():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.48, 0.31, 0.21], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    expected = {k: float((p * kl_divergence(p.log(), q.log(), k)).sum()) for k in ("k1", "k2", "k3")}
    assert expected["k1"] == pytest.approx(exact, rel=1e-9)
    assert expected["k3"] == pytest.approx(exact, rel=1e-9)
    assert expected["k2"] == pytest.approx(exact, rel=0.05)


@given(seed=st.integers(0, 99))
def test_the_expectations_of_k1_k2_and_k3_agree_to_second_order(seed: int):
    """Half the distance to the reference: the KL falls to 1/4, the estimators' difference to 1/8."""
    q, direction = noise((6,), seed).log_softmax(0), noise((6,), seed + 1)

    def expected(step: float) -> dict[str, float]:
        p = (q + step * direction).log_softmax(0)
        return {k: float((p.exp() * kl_divergence(p, q, k)).sum()) for k in ("k1", "k2", "k3")}

    whole, half = expected(0.02), expected(0.01)
    for found in (whole, half):
        assert found["k1"] == pytest.approx(found["k3"], rel=1e-6)
    assert whole["k1"] / half["k1"] == pytest.approx(4, rel=0.1)
    apart, closer = (abs(found["k2"] - found["k1"]) for found in (whole, half))
    assert apart <= 0.05 * whole["k1"]
    assert closer <= apart / 6 + 1e-9


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_k2_and_k3_are_never_negative_in_float32_either(scale: float):
    logprobs, reference = (noise((40, 50)) * scale).float(), torch.zeros(40, 50)
    assert kl_divergence(logprobs, reference, "k2").min() >= 0
    assert kl_divergence(logprobs, reference, "k3").min() >= 0


def test_mismatch_by_hand():
    trainer = torch.tensor([[math.log(0.5), math.log(0.5), 77.0]])
    rollout = torch.tensor([[math.log(0.5), math.log(0.25), 0.0]])
    found = mismatch_metrics(rollout, trainer, mask_of([2], 3))
    log2 = math.log(2)
    assert found == pytest.approx(
        {
            "mismatch/logp_abs_diff_mean": log2 / 2,
            "mismatch/logp_abs_diff_max": log2,
            "mismatch/kl": (1 - log2) / 2,
            "mismatch/is_mean": 1.5,
            "mismatch/is_max": 2.0,
            "mismatch/is_ess": 9 / 5 / 2,
        },
        abs=1e-6,
    )


def test_no_mismatch_is_zero_everywhere_and_a_full_sample():
    logprobs, mask = noise((3, 4)), mask_of([1, 4, 2])
    found = mismatch_metrics(logprobs, logprobs, mask)
    ones = {"mismatch/is_mean", "mismatch/is_max", "mismatch/is_ess"}
    assert found == {name: float(name in ones) for name in found}


# -- the algorithms ----------------------------------------------------------------------------


def make_batch(lengths: list[int], seed: int, columns: int = 0) -> Batch:
    """A batch whose per-token tensors have `columns` extra columns of padding."""
    mask = mask_of(lengths)
    rows = mask.shape[0]

    def tokens(k: int) -> Tensor:
        return padded(noise(mask.shape, seed + k) * mask, columns)

    return Batch(
        token_ids=torch.zeros(rows, 1, dtype=torch.long),
        attention_mask=torch.ones(rows, 1, dtype=torch.long),
        prompt_lengths=torch.ones(rows, dtype=torch.long),
        completion_mask=padded(mask, columns),
        loss_mask=padded(mask, columns),
        rollout_logprobs=tokens(0),
        rewards=noise((rows,), seed),
        group=torch.arange(rows) // 2,
        truncated=torch.zeros(rows, dtype=torch.bool),
        old_logprobs=tokens(1),
        reference_logprobs=tokens(2),
        values=tokens(3),
    )


@pytest.mark.parametrize("name", sorted(OPTIONS["algorithm"]))
@settings(max_examples=25)
@given(lengths=LENGTHS, columns=st.integers(1, 4), seed=st.integers(0, 99), options=VARIANTS)
def test_padding_never_changes_a_value(
    name: str, lengths: list[int], columns: int, seed: int, options: dict[str, Any]
):
    algorithm = OPTIONS["algorithm"][name](kl_coef=0.1, entropy_coef=0.1, **options)
    results = []
    for extra in (0, columns):
        batch = make_batch(lengths, seed, extra)
        batch.advantages, batch.returns = algorithm.estimate_advantages(batch, {})
        logprobs = padded(noise((len(lengths), max(lengths)), 50) * mask_of(lengths), extra)
        loss, metrics = algorithm.policy_loss(batch, logprobs, logprobs.abs(), {})
        sums = [(loss * token_weights(batch.loss_mask, aggregation, 8)).sum() for aggregation in AGGREGATIONS]
        returns = [] if batch.returns is None else [batch.returns[batch.loss_mask]]
        named = [metrics[key][batch.loss_mask] for key in sorted(metrics)]
        mismatch = mismatch_metrics(batch.rollout_logprobs, batch.old_logprobs, batch.loss_mask)
        assert not batch.advantages[~batch.loss_mask].any()
        results.append(
            [
                batch.advantages[batch.loss_mask],
                *returns,
                *named,
                *sums,
                torch.tensor(list(mismatch.values())),
            ]
        )
    for plain, wider in zip(*results, strict=True):
        torch.testing.assert_close(wider, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(OPTIONS["algorithm"]))
def test_what_stands_on_masked_tokens_never_changes_a_value(name: str):
    algorithm = OPTIONS["algorithm"][name]()
    losses = []
    for junk in (0.0, 3.0):
        batch = make_batch([1, 4, 2], 0)
        batch.values = torch.where(batch.loss_mask, batch.values, junk)
        batch.old_logprobs = torch.where(batch.loss_mask, batch.old_logprobs, -junk)
        batch.advantages, batch.returns = algorithm.estimate_advantages(batch, {})
        loss, _ = algorithm.policy_loss(batch, noise((3, 4), 9), noise((3, 4), 8), {})
        losses.append(float((loss * token_weights(batch.loss_mask, "token-mean", 8)).sum()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_grpo_gives_every_token_of_a_rollout_its_group_advantage():
    batch = make_batch([2, 3, 1, 3], 0)
    batch.rewards = torch.tensor([0.0, 1.0, 5.0, 5.0])
    batch.advantages, batch.returns = GRPO(scale_by_std=False).estimate_advantages(batch, {})
    assert batch.advantages.tolist() == [
        [-0.5, -0.5, 0],
        [0.5, 0.5, 0.5],
        [0, 0, 0],
        [0, 0, 0],
    ]


def test_ppo_puts_the_kl_penalty_into_the_reward_that_the_critic_learns():
    batch = make_batch([3, 2], 0)
    batch.advantages, batch.returns = PPO(kl_coef=0.5, kl_estimator="k1", gae_lambda=1.0).estimate_advantages(
        batch, {}
    )
    penalty = 0.5 * (batch.old_logprobs - batch.reference_logprobs)
    expected = batch.rewards - (penalty * batch.loss_mask).sum(-1)
    torch.testing.assert_close(batch.returns[:, 0], expected)


def test_grpo_adds_its_kl_and_entropy_terms_to_the_loss():
    batch = make_batch([3, 2], 0)
    logprobs, entropy = noise((2, 3), 5), noise((2, 3), 6).abs()
    plain, with_terms = GRPO(), GRPO(kl_coef=0.1, entropy_coef=0.2)
    batch.advantages, batch.returns = plain.estimate_advantages(batch, {})
    base, _ = plain.policy_loss(batch, logprobs, entropy, {})
    loss, metrics = with_terms.policy_loss(batch, logprobs, entropy, {})
    expected = base + 0.1 * metrics["actor/kl_ref"] - 0.2 * batch.learned(entropy)
    torch.testing.assert_close(loss, expected)


def test_a_reference_is_needed_exactly_when_the_kl_divergence_counts():
    for algorithm in OPTIONS["algorithm"].values():
        assert not algorithm(kl_coef=0.0).needs_reference
        assert algorithm(kl_coef=1e-9).needs_reference


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_of_losses_and_divergences_are_those_of_finite_differences(estimator: str):
    logprobs = (noise((2, 3)) * 0.3).requires_grad_()
    advantages, returns = noise((2, 3), 1), noise((2, 3), 2)

    def objective(x: Tensor) -> Tensor:
        loss, _ = clipped_surrogate(x, advantages, clip_low=0.2, clip_high=0.2)
        critic, _ = value_loss(x, torch.zeros_like(x), returns, clip=0.2)
        return loss + critic + kl_divergence(x, advantages, estimator)

    assert torch.autograd.gradcheck(objective, (logprobs,))


# -- mismatch correction -----------------------------------------------------------------------


def weights_of(ratios: list[list[float]], lengths: list[int], kind: str, level: str = "token") -> list:
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log()
    mask = mask_of(lengths, len(ratios[0]))
    return correction_weights(log_ratio, mask, kind=kind, level=level, low=0.5, high=2.0).tolist()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("tis", [1.0, 0.25, 2.0, 2.0, 0.0]),
        ("mis", [1.0, 0.25, 2.0, 0.0, 0.0]),
        ("icepop", [1.0, 0.0, 2.0, 0.0, 0.0]),
    ],
)
def test_mismatch_weights_by_hand(kind: str, expected: list[float]):
    assert weights_of([[1.0, 0.25, 2.0, 8.0, 1.0]], [4], kind) == [pytest.approx(expected)]


@pytest.mark.parametrize(("kind", "expected"), [("tis", 2.0), ("mis", 0.0), ("icepop", 0.0)])
def test_a_completions_weight_is_the_product_of_its_tokens_bounded_once(kind: str, expected: float):
    found = weights_of([[1.5, 1.5, 9.0], [1.5, 0.5, 1.0]], [2, 3], kind, "sequence")
    assert found[0] == pytest.approx([expected, expected, 0.0])
    assert found[1] == pytest.approx([0.75] * 3)


@given(lengths=LENGTHS, seed=st.integers(0, 99), kind=st.sampled_from(["tis", "mis", "icepop"]))
def test_weights_are_bounded_and_constant_to_the_gradient(lengths: list[int], seed: int, kind: str):
    mask = mask_of(lengths)
    log_ratio = (30 * noise(mask.shape, seed)).requires_grad_()
    for level in ("token", "sequence"):
        found = correction_weights(log_ratio, mask, kind=kind, level=level, low=0.5, high=2.0)
        assert not found.requires_grad and torch.isfinite(found).all()
        assert float(found.min()) >= 0 and float(found.max()) <= 2.0
        assert not found[~mask].any()


def test_without_a_mismatch_every_weight_is_one():
    mask = mask_of([3, 1, 2])
    for kind in ("tis", "mis", "icepop"):
        for level in ("token", "sequence"):
            found = correction_weights(
                torch.zeros(mask.shape), mask, kind=kind, level=level, low=0.5, high=2.0
            )
            assert torch.equal(found, mask.float())


def test_a_correction_is_off_unless_asked_for():
    batch, logprobs = make_batch([2, 3], 0), noise((2, 3), 9)
    batch.advantages = noise((2, 3), 7)
    losses = {
        kind: GRPO(mismatch_correction=kind).policy_loss(batch, logprobs, logprobs * 0, {})
        for kind in ("off", "mis")
    }
    batch.rollout_logprobs = batch.old_logprobs
    exact, _ = GRPO().policy_loss(batch, logprobs, logprobs * 0, {})
    torch.testing.assert_close(losses["off"][0], exact)
    assert not torch.equal(losses["mis"][0], exact)
    assert "mismatch/weight_mean" in losses["mis"][1] and "mismatch/weight_mean" not in losses["off"][1]


# -- the KL coefficient ------------------------------------------------------------------------


def test_the_coefficient_moves_towards_its_target_by_hand():
    assert adapted_coefficient(0.1, kl=0.11, target=0.1, share=1.0) == pytest.approx(0.11)
    assert adapted_coefficient(0.1, kl=9.0, target=0.1, share=0.5) == pytest.approx(0.1 * 1.1)
    assert adapted_coefficient(0.1, kl=-9.0, target=0.1, share=0.5) == pytest.approx(0.1 * 0.9)


@given(kl=st.floats(-1, 10), share=st.floats(0.001, 5))
def test_it_rises_above_the_target_falls_below_it_and_never_far_at_once(kl: float, share: float):
    found = adapted_coefficient(1.0, kl, 0.5, share)
    assert (found > 1) == (kl > 0.5) or found == 1
    assert 0.8 - 1e-9 <= found <= 1.2 + 1e-9


# -- whitening ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPTIONS["algorithm"]))
def test_any_algorithm_can_whiten_its_advantages(name: str):
    raw, white = make_batch([3, 1, 4, 2], 0), make_batch([3, 1, 4, 2], 0)
    raw.advantages, raw.returns = OPTIONS["algorithm"][name](whiten_advantages=False).estimate_advantages(
        raw, {}
    )
    white.advantages, white.returns = OPTIONS["algorithm"][name](whiten_advantages=True).estimate_advantages(
        white, {}
    )
    torch.testing.assert_close(white.advantages, whiten(raw.advantages, raw.loss_mask))
    assert not torch.equal(white.advantages, raw.advantages)
