"""No loss and no metric depends on tokens that the policy did not sample, wherever they are."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rlswitch.algorithms.advantages import discounted_returns, gae, rewards_at_last_token, whiten
from rlswitch.algorithms.losses import sequence_log_ratio, token_weights, value_loss, weighted_sum
from rlswitch.algorithms.mismatch import correction_weights, mismatch_metrics
from rlswitch.run import OPTIONS
from rlswitch.training.batching import to_batch
from rlswitch.training.logprobs import policy_logprobs
from rlswitch.training.metrics import Sums
from rlswitch.training.models import Critic
from rlswitch.training.reference import FrozenModel
from rlswitch.training.schedule import build_schedule
from rlswitch.types import Batch, Group, Prompt, Rollout

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"kl_coef": 0.3, "kl_in": "reward", "kl_estimator": "k1"},
    {"kl_coef": 0.3, "kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.1, "whiten_advantages": True},
    {"kl_coef": 0.3, "kl_in": "loss", "kl_estimator": "k2", "ratio_level": "sequence", "dual_clip": 3.0},
    {"surrogate": "weighted", "mismatch_correction": "tis", "whiten_advantages": True},
    {"surrogate": "weighted", "mismatch_correction": "mis", "mismatch_level": "sequence"},
    {"mismatch_correction": "icepop", "ratio_level": "sequence", "entropy_coef": 0.1},
]
OWN: dict[str, dict[str, Any]] = {
    "grpo": {"scale_by_std": False},
    "ppo": {"gamma": 0.9, "gae_lambda": 0.5},
    "reinforce": {"baseline_decay": 0.5},
    "reinforce_pp": {"gamma": 0.9, "group_baseline": True},
    "rloo": {},
}
"""Settings of a single algorithm, different from their defaults."""
JUNK = st.sampled_from([0.0, 3.0, -7.0, 1e4, -1e4, 1e30, -1e30, math.inf, -math.inf])
GAPS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=6), min_size=2, max_size=5)
"""The holes of each rollout: before its first learned token, between tokens, and after the last."""
SEEDS = st.integers(0, 99)


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def learned_of(gaps: list[int]) -> list[bool]:
    *before, after = gaps
    return [it for gap in before for it in (*[False] * gap, True)] + [False] * after


def padded(rows: list[list[bool]]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[False] * (width - len(row))] for row in rows])


class Twins:
    """The same learned tokens twice: contiguous, and with holes full of `junk` between them."""

    def __init__(self, gaps: list[list[int]], seed: int, junk: float):
        rows = [learned_of(it) for it in gaps]
        self.seed, self.junk = seed, junk
        self.compact = padded([[True] * sum(row) for row in rows])
        self.holed, self.exists = padded(rows), padded([[True] * len(row) for row in rows])
        self.masks = (self.compact, self.holed)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Noise on the learned tokens [B, T], in both forms."""
        self.seed += 1
        values = noise(self.compact.shape, self.seed) * self.compact
        return values, self.spread(values, self.junk)

    def spread(self, values: Tensor, elsewhere: float = 0.0) -> Tensor:
        """Values of the compact form [B, T] in the form with holes."""
        wide = torch.full(self.holed.shape, elsewhere, dtype=values.dtype)
        wide[self.holed] = values[self.compact]
        return wide

    def batches(self) -> tuple[Batch, Batch]:
        rows = self.compact.shape[0]
        pairs = {
            name: self.tokens()
            for name in ("rollout_logprobs", "old_logprobs", "reference_logprobs", "values")
        }
        compact, holed = (
            Batch(
                token_ids=torch.zeros(rows, 1, dtype=torch.long),
                attention_mask=torch.ones(rows, 1, dtype=torch.long),
                prompt_lengths=torch.ones(rows, dtype=torch.long),
                completion_mask=exists,
                loss_mask=learned,
                rewards=noise((rows,), self.seed),
                group=torch.arange(rows) // 2,
                truncated=torch.zeros(rows, dtype=torch.bool),
                **{name: pair[form] for name, pair in pairs.items()},
            )
            for form, (exists, learned) in enumerate(
                [(self.compact, self.compact), (self.exists, self.holed)]
            )
        )
        return compact, holed


TWINS = st.builds(Twins, GAPS, SEEDS, JUNK)


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# -- the maths ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPTIONS["algorithm"]))
@given(twins=TWINS, variant=st.sampled_from(VARIANTS), own=st.booleans())
def test_holes_change_no_advantage_no_return_and_no_memory(
    name: str, twins: Twins, variant: dict[str, Any], own: bool
):
    algorithm = OPTIONS["algorithm"][name](**variant | (OWN.get(name, {}) if own else {}))
    memories, results = ({}, {}), []
    for batch, memory in zip(twins.batches(), memories, strict=True):
        results.append(algorithm.estimate_advantages(batch, memory))
    for compact, holed in zip(*results, strict=True):
        if algorithm.needs_critic or compact is not None:
            assert_equal(holed, twins.spread(compact))  # and zero in the holes
    assert memories[1] == pytest.approx(memories[0], rel=1e-9)


@pytest.mark.parametrize("name", sorted(OPTIONS["algorithm"]))
@given(twins=TWINS, variant=st.sampled_from(VARIANTS), aggregation=st.sampled_from(AGGREGATIONS))
def test_holes_change_no_loss_no_gradient_and_no_metric(
    name: str, twins: Twins, variant: dict[str, Any], aggregation: str
):
    algorithm = OPTIONS["algorithm"][name](**variant, loss_aggregation=aggregation)
    logprobs, entropies, advantages = twins.tokens(), twins.tokens(), twins.tokens()
    losses, gradients, metrics = [], [], []
    for form, batch in enumerate(twins.batches()):
        batch.advantages = advantages[form]
        now, entropy = (it[form].clone().requires_grad_() for it in (logprobs, entropies))
        loss, named = algorithm.policy_loss(batch, now, entropy, {})
        weights = token_weights(batch.loss_mask, aggregation, 8).double()
        losses.append(weighted_sum(loss, weights))
        wanted = (now, entropy) if algorithm.entropy_coef else (now,)
        gradients.append(torch.autograd.grad(losses[-1], wanted))
        sums = Sums()
        sums.add_tokens(named, batch.loss_mask)
        metrics.append({key: value / sums.tokens for key, value in sums.per_token.items()})
    assert_equal(losses[1], losses[0])
    for compact, holed in zip(*gradients, strict=True):
        assert_equal(holed, twins.spread(compact))  # and zero in the holes
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-9, abs=1e-9)


@given(twins=TWINS, aggregation=st.sampled_from(AGGREGATIONS), clip=st.sampled_from([0.0, 0.2]))
def test_holes_change_no_value_loss(twins: Twins, aggregation: str, clip: float):
    values, old, returns = (twins.tokens() for _ in range(3))
    losses, gradients = [], []
    for form, mask in enumerate(twins.masks):
        now = values[form].clone().requires_grad_()
        loss, _ = value_loss(torch.where(mask, now, 0.0), old[form], returns[form], clip=clip)
        losses.append(weighted_sum(loss, token_weights(mask, aggregation, 8).double()))
        gradients.append(torch.autograd.grad(losses[-1], now)[0])
    assert_equal(losses[1], losses[0])
    assert_equal(gradients[1], twins.spread(gradients[0]))


@given(twins=TWINS, gamma=st.floats(0, 1), gae_lambda=st.floats(0, 1))
def test_a_hole_ends_no_episode_and_takes_no_step(twins: Twins, gamma: float, gae_lambda: float):
    rewards, values = twins.tokens(), twins.tokens()
    estimates = [
        gae(*pair, gamma=gamma, gae_lambda=gae_lambda)
        for pair in zip(rewards, values, twins.masks, strict=True)
    ]
    for compact, holed in zip(*estimates, strict=True):
        assert_equal(holed, twins.spread(compact))
    compact, holed = (
        discounted_returns(it, mask, gamma=gamma) for it, mask in zip(rewards, twins.masks, strict=True)
    )
    assert_equal(holed, twins.spread(compact))


def test_gae_over_a_hole_by_hand():
    rewards, values = torch.tensor([[0.0, 9.0, 1.0, 9.0]]), torch.tensor([[0.5, 9.0, 0.25, 9.0]])
    mask = torch.tensor([[True, False, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[-0.1875, 0, 0.75, 0]] and returns.tolist() == [[0.3125, 0, 1, 0]]
    placed = rewards_at_last_token(torch.tensor([2.0]), mask)
    assert placed.tolist() == [[0, 0, 2, 0]]


@given(twins=TWINS)
def test_holes_change_no_statistic(twins: Twins):
    ours, theirs, scores = twins.tokens(), twins.tokens(), noise((len(twins.compact),), twins.seed)
    found = []
    for form, mask in enumerate(twins.masks):
        gap = ours[form] - theirs[form]
        weights = {
            f"{kind} {level}": correction_weights(gap, mask, kind=kind, level=level, low=0.5, high=2.0)
            for kind in ("tis", "mis", "icepop")
            for level in ("token", "sequence")
        }
        weights |= {it: token_weights(mask, it, 8) for it in AGGREGATIONS}
        weights |= {"whiten": whiten(ours[form], mask), "last": rewards_at_last_token(scores, mask)}
        weights |= {"sequence": sequence_log_ratio(gap, mask) * mask}
        found.append((weights, mismatch_metrics(theirs[form], ours[form], mask)))
    for name, compact in found[0][0].items():
        assert_equal(found[1][0][name], twins.spread(compact))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-9)


@given(twins=TWINS)
def test_holes_change_no_record_of_a_batch(twins: Twins):
    compact, holed = twins.batches()
    compact.advantages, holed.advantages = twins.tokens()
    assert_equal(holed.mean_advantages(), compact.mean_advantages())
    assert holed.sampled_tokens == compact.sampled_tokens


# -- batches -----------------------------------------------------------------------------------


def groups_of(gaps: list[list[int]], holes: bool, version: int = 0) -> list[Group]:
    """Two rollouts per group; the holes hold tokens that the policy did not sample, with absurd logprobs."""
    groups: list[Group] = []
    for index, row in enumerate(gaps):
        if index % 2 == 0:
            prompt = Prompt(index=index, messages="", token_ids=[13, 1, 2, 10][: 2 + index % 3])
            groups.append(Group(prompt=prompt, rollouts=[]))
        learned = learned_of(row) if holes else [True] * (len(row) - 1)
        sampled = iter([(index + 3 * t) % 10 for t in range(len(row))])
        logprobs = iter([-2.8 - 0.1 * t for t in range(len(row))])
        rollout = Rollout(
            prompt=groups[-1].prompt,
            sample=index % 2,
            token_ids=[next(sampled) if it else 15 for it in learned],
            logprobs=[next(logprobs) if it else -math.inf for it in learned],
            learned=learned if holes else None,
            text="",
            finish_reason="length" if index == 1 else "stop",
            policy_version=version,
            reward=float(index**2 % 3),
        )
        groups[-1].rollouts.append(rollout)
    return groups


@given(gaps=GAPS, data=st.data())
def test_a_batch_keeps_every_learned_token_and_the_holes_between(gaps: list[list[int]], data: st.DataObject):
    groups = groups_of(gaps, holes=True)
    batch = to_batch(groups, 12, torch.device("cpu"))
    index = data.draw(st.permutations(range(len(gaps))))[: data.draw(st.integers(1, len(gaps)))]
    part, rollouts = batch.rows(torch.tensor(index)), [r for group in groups for r in group.rollouts]
    assert not batch.not_finite()
    for row, rollout in enumerate(rollouts[it] for it in index):
        length = len(rollout.token_ids)
        assert part.completion_mask[row].tolist() == [t < length for t in range(part.loss_mask.shape[1])]
        assert part.loss_mask[row, :length].tolist() == rollout.learned
        assert not part.loss_mask[row, length:].any()
        sampled = [it for it in rollout.logprobs if it > -math.inf]
        assert part.rollout_logprobs[row][part.loss_mask[row]].tolist() == pytest.approx(sampled)
        assert not part.rollout_logprobs[row][~part.loss_mask[row]].any()


@pytest.mark.parametrize("packed", [False, True])
def test_learned_tokens_are_scored_in_the_context_of_the_holes(tiny_model, packed: bool):
    model, groups = tiny_model().model, groups_of([[1, 0, 2, 1], [0, 2, 0], [2, 1], [0, 0, 0]], holes=True)
    batch = to_batch(groups, 12, torch.device("cpu"))
    with torch.no_grad():
        logprobs, entropies = policy_logprobs(model, batch, 1.0, packed)
        values = Critic(model.model, packed)(batch)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for row, rollout in enumerate(rollouts):
        tokens, start = rollout.prompt.token_ids + rollout.token_ids, len(rollout.prompt.token_ids)
        with torch.no_grad():
            plain = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        expected = torch.tensor(
            [
                float(plain[start + t - 1, token]) if learned else 0.0
                for t, (token, learned) in enumerate(zip(rollout.token_ids, rollout.learned, strict=True))
            ]
        )
        torch.testing.assert_close(logprobs[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)
    for found in (logprobs, entropies, values):
        assert not found[~batch.loss_mask].any()


# -- the trainer -------------------------------------------------------------------------------


class Blind(nn.Module):
    """Gives every token the same scores and every state the same value, in any context."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=4))

    def __init__(self, seed: int):
        super().__init__()
        self.scores = nn.Parameter(noise((16,), seed).float())
        self.state = nn.Parameter(noise((4,), seed).float())

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        shape = input_ids.shape
        return SimpleNamespace(
            logits=self.scores.expand(*shape, 16), last_hidden_state=self.state.expand(*shape, 4)
        )


TRAINED = [
    ("grpo", {"kl_coef": 0.2, "kl_in": "loss", "entropy_coef": 0.1}, {"epochs": 2}),
    ("grpo", {"ratio_level": "sequence", "mismatch_correction": "tis", "mask_truncated": True}, {}),
    ("rloo", {"kl_coef": 0.2, "mismatch_correction": "icepop"}, {"minibatches": 2, "packing": True}),
    ("ppo", {"kl_coef": 0.2, "gae_lambda": 0.9, "gamma": 0.9}, {"epochs": 2, "minibatches": 2}),
    ("ppo", {"value_clip": 0.0}, {"micro_batch_tokens": 12}),
    ("reinforce", {"whiten_advantages": True}, {}),
    ("reinforce_pp", {"kl_coef": 0.2, "gamma": 0.9}, {"epochs": 2}),
]


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize(("algorithm", "options", "trained"), TRAINED)
def test_holes_change_no_step(make_run, make_trainer, algorithm, options, trained, aggregation):
    options = {"loss_aggregation": aggregation} | options
    run = make_run(algorithm, options=options, trainer=trained, rollout={"max_new_tokens": 16})
    gaps = [[1, 0, 2, 1], [0, 2, 0], [2, 0, 0, 0, 1], [0, 1], [1, 1, 1], [0, 0, 0, 0, 0, 2]]
    outcomes = []
    for holes in (False, True):
        trainer = make_trainer(run)
        trainer.policy = Blind(1)
        parameters = [*trainer.policy.parameters()]
        if trainer.critic is not None:
            trainer.critic = Critic(Blind(2), run.trainer.packing)
            parameters += trainer.critic.parameters()
        if trainer.reference is not None:
            trainer.reference = FrozenModel(Blind(3), trainer.policy)
        trainer.optimizer = torch.optim.SGD(parameters, lr=0.5)
        trainer.schedule = build_schedule(run, trainer.optimizer)
        steps = []
        for version in range(3):
            batch = trainer.prepare(groups_of(gaps, holes, version))
            batch.advantages, batch.returns = run.algorithm.estimate_advantages(batch, trainer.memory)
            steps.append(trainer.update(batch))
        outcomes.append((steps, copy.deepcopy(parameters)))
    (compact, ours), (holed, theirs) = outcomes
    for expected, found in zip(compact, holed, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5) and not found["actor/skipped_updates"]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    assert compact[0]["actor/grad_norm"] > 1e-2 < compact[2]["mismatch/logp_abs_diff_mean"]
