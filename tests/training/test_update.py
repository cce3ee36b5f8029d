"""Parts of an update: old log-probabilities, the reference, the KL coefficient and the learning rate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlswitch.command.compose import Source, compose_run
from rlswitch.training.schedule import build_schedule, check_schedule, resume_schedule
from rlswitch.training.trainer import Trainer


@pytest.fixture
def build(make_run, make_trainer) -> Callable[..., Trainer]:
    def make(algorithm: str = "grpo", **settings) -> Trainer:
        return make_trainer(make_run(algorithm, **settings))

    return make


def step(trainer: Trainer, make_groups) -> dict[str, float]:
    batch = trainer.prepare(make_groups(version=trainer.version))
    batch.advantages, batch.returns = trainer.run.algorithm.estimate_advantages(batch, trainer.memory)
    return trainer.update(batch)


def count_forwards(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    forward = trainer.policy.forward
    monkeypatch.setattr(
        trainer.policy, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    return calls


# -- old log-probabilities ---------------------------------------------------------------------


def test_one_update_a_step_takes_its_old_logprobs_from_its_own_pass(build, make_groups, monkeypatch):
    once, twice = build(trainer={"lr": 1e-2}), build(trainer={"lr": 1e-2})
    calls, more = count_forwards(once, monkeypatch), count_forwards(twice, monkeypatch)
    ours = step(once, make_groups)
    monkeypatch.setattr(Trainer, "updates_once", property(lambda self: False))
    theirs = step(twice, make_groups)
    assert 2 * len(calls) == len(more)
    assert ours["actor/ratio_mean"] == 1 and ours["actor/ppo_kl"] == 0
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert ours["mismatch/logp_abs_diff_mean"] > 0.1, "the gap is logged all the same"
    for a, b in zip(once.policy.parameters(), twice.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("algorithm", "settings", "expected"),
    [
        ("grpo", {}, True),
        ("grpo", {"trainer": {"epochs": 2}}, False),
        ("grpo", {"trainer": {"minibatches": 2}}, False),
        ("grpo", {"options": {"kl_coef": 0.1}}, True),
        ("grpo", {"options": {"kl_coef": 0.1, "kl_in": "reward"}}, False),
        ("ppo", {}, True),
        ("ppo", {"options": {"kl_coef": 0.1}}, False),
    ],
)
def test_old_logprobs_are_left_out_only_where_that_is_exact(build, algorithm, settings, expected):
    assert build(algorithm, **settings).updates_once is expected


def test_minibatches_of_uneven_size_each_teach_once(build, make_groups, monkeypatch):
    trainer = build(trainer={"minibatches": 4})
    sizes: list[int] = []
    take = trainer._step
    monkeypatch.setattr(trainer, "_step", lambda b, rows, t: sizes.append(len(rows)) or take(b, rows, t))
    step(trainer, make_groups)
    assert sorted(sizes) == [1, 1, 2, 2]


# -- the KL coefficient and the reference ------------------------------------------------------


def test_the_coefficient_rises_while_the_policy_is_too_far_away(build, make_groups):
    options = {"kl_coef": 0.1, "kl_target": 1e-9, "kl_horizon": 12}
    trainer = build(options=options, trainer={"lr": 1e-2, "epochs": 2})
    assert step(trainer, make_groups)["actor/kl_coef"] == 0.1
    # six rollouts of a horizon of twelve: half of the bounded 20 %
    assert trainer.memory == pytest.approx({"kl_coef": 0.11})
    assert step(trainer, make_groups)["actor/kl_coef"] == pytest.approx(0.11)


def test_an_adapted_coefficient_is_forgotten_where_it_is_to_be_fixed(build, make_groups):
    trainer = build(options={"kl_coef": 0.05}, trainer={"lr": 1e-2, "epochs": 2})
    trainer.memory["kl_coef"] = 7.0  # from a run with an adaptive coefficient
    assert step(trainer, make_groups)["actor/kl_coef"] == 0.05


def test_a_fixed_coefficient_stays_and_nothing_is_remembered(build, make_groups):
    trainer = build(options={"kl_coef": 0.1}, trainer={"lr": 1e-2, "epochs": 2})
    for _ in range(2):
        assert step(trainer, make_groups)["actor/kl_coef"] == 0.1
    assert trainer.memory == {}


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_the_remembered_coefficient_is_the_one_that_counts(build, make_groups, place: str):
    options = {"kl_coef": 0.1, "kl_in": place, "kl_target": 1.0}
    small, large = (build(options=options, trainer={"lr": 1e-2, "epochs": 2}) for _ in range(2))
    large.memory["kl_coef"] = 100.0
    for trainer in (small, large):
        for _ in range(2):  # before the first update the policy is the reference
            step(trainer, make_groups)
    ours, theirs = small.policy.state_dict(), large.policy.state_dict()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_reference_follows_every_so_many_steps(build, make_groups):
    trainer = build(options={"kl_coef": 0.1, "reference_refresh": 2}, trainer={"lr": 1e-2})

    def gap() -> float:
        batch = trainer.prepare(make_groups(version=trainer.version))
        now = trainer._evaluate(batch, lambda rows: trainer._logprobs(rows)[0])
        return float((batch.reference_logprobs - now).abs().max())

    gaps = []
    for _ in range(4):
        step(trainer, make_groups)
        gaps.append(gap())
    assert gaps[0] > 1e-3 and gaps[2] > 1e-3
    assert gaps[1] == gaps[3] == 0


# -- the learning rate -------------------------------------------------------------------------


def rates(run) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, seen = build_schedule(run, optimizer), []
    for _ in range(run.num_steps):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return seen


def scheduled(name: str, **arguments) -> list[float]:
    words = [f"+trainer.lr_schedule_kwargs.{key}={value}" for key, value in arguments.items()]
    run = compose_run(
        ["recipe=grpo", f"trainer.lr_schedule={name}", "trainer.warmup_steps=2", "trainer.minibatches=1",
         "num_steps=10", *words],
        Source.default(),
    )  # fmt: skip
    check_schedule(run)
    return rates(run)


def test_schedules_are_those_of_transformers():
    assert scheduled("constant") == [0, 0.5, *[1.0] * 8]
    assert scheduled("linear")[2:] == pytest.approx([1 - n / 8 for n in range(8)])
    assert min(scheduled("cosine_with_min_lr", min_lr_rate=0.3)[2:]) > 0.3
    stable = scheduled("warmup_stable_decay", num_decay_steps=3)
    assert stable[2:7] == [1.0] * 5 and stable[9] < 0.5
    assert scheduled("inverse_sqrt")[9] < scheduled("inverse_sqrt")[4] < 1


def test_a_lowest_rate_is_meant_in_the_trainers_own_units(build, make_groups):
    settings = {"lr": 1e-2, "lr_schedule": "cosine_with_min_lr", "lr_schedule_kwargs": {"min_lr": 5e-3}}
    trainer = build(num_steps=3, trainer=settings)
    rates = [step(trainer, make_groups)["actor/lr"] for _ in range(3)]
    assert rates[0] == pytest.approx(1e-2) and 5e-3 <= rates[2] < rates[1]
    assert trainer.schedule.get_last_lr()[0] == pytest.approx(5e-3)


@pytest.mark.parametrize("name", ["linear", "cosine", "inverse_sqrt"])
def test_a_schedule_goes_on_where_it_stopped_and_on_the_curve_of_the_run(build, make_groups, name: str):
    def make(num_steps: int, lr: float = 1e-2):
        return build(num_steps=num_steps, trainer={"lr": lr, "lr_schedule": name, "warmup_steps": 1})

    straight = make(6)
    for _ in range(3):
        step(straight, make_groups)
    resumed = make(6)
    resume_schedule(resumed.schedule, 3)
    assert resumed.schedule.state_dict() == straight.schedule.state_dict()
    assert resumed.optimizer.param_groups[0]["lr"] == straight.optimizer.param_groups[0]["lr"]
    halved = make(6, lr=5e-3)
    resume_schedule(halved.schedule, 3)
    assert halved.schedule.get_last_lr()[0] == pytest.approx(resumed.schedule.get_last_lr()[0] / 2)
    if name != "inverse_sqrt":  # a finished run that gets more steps does not start at a rate of zero
        longer = make(12)
        resume_schedule(longer.schedule, 6)
        assert longer.optimizer.param_groups[0]["lr"] > 0
