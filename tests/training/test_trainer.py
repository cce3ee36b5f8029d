"""The trainer on a tiny model: what a step computes, rejects, publishes and leaves unchanged."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rlswitch.recipes.addition import task as addition
from transformers import GPT2Config, GPT2LMHeadModel

from rlswitch.errors import ConfigError, RLSwitchError, SwitchError
from rlswitch.proof.fingerprint import named_fingerprints, total_fingerprint
from rlswitch.run import Run
from rlswitch.training import logprobs
from rlswitch.training.batching import to_batch
from rlswitch.training.logprobs import policy_logprobs, sequence_logprobs, token_statistics
from rlswitch.training.parking import Parking, nbytes
from rlswitch.training.publish import Publisher, choose_directory, owner_tag, sweep_dead_runs
from rlswitch.training.trainer import Trainer
from rlswitch.types import Group

CPU = torch.device("cpu")


@pytest.fixture
def build(make_run, make_trainer) -> Callable[..., Trainer]:
    """build("ppo", trainer={"lr": 0.1}): a trainer with these settings."""

    def make(algorithm: str = "grpo", **run_settings) -> Trainer:
        return make_trainer(make_run(algorithm, **run_settings))

    return make


def step(trainer: Trainer, groups: list[Group]) -> dict[str, float]:
    batch = trainer.prepare(groups)
    batch.advantages, batch.returns = trainer.run.algorithm.estimate_advantages(batch, trainer.memory)
    return trainer.update(batch)


def parameters(trainer: Trainer) -> list[torch.Tensor]:
    found = [p for part in (trainer.policy, trainer.critic) if part for p in part.parameters()]
    return [p.detach().clone() for p in found]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- the step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_micro_batch_split_changes_neither_the_update_nor_the_metrics(
    build, make_groups, monkeypatch, algorithm: str, aggregation: str
):
    outcomes = []
    for budget in (10_000, 24, 1):  # everything at once, a few rollouts, one rollout at a time
        trainer = build(
            algorithm,
            options={"kl_coef": 0.1, "entropy_coef": 0.01, "loss_aggregation": aggregation},
            trainer={"lr": 1e-3, "micro_batch_tokens": budget, "minibatches": 2, "epochs": 2},
        )
        sizes: list[int] = []
        forward = trainer.policy.forward
        monkeypatch.setattr(
            trainer.policy,
            "forward",
            lambda *args, forward=forward, sizes=sizes, **kwargs: (
                sizes.append(len(kwargs["input_ids"])) or forward(*args, **kwargs)
            ),
        )
        metrics = step(trainer, make_groups())
        outcomes.append((parameters(trainer), metrics, max(sizes)))
    assert outcomes[0][2] == 6 > outcomes[1][2] > outcomes[2][2] == 1
    start = parameters(build(algorithm))
    for changed, metrics, _ in outcomes[1:]:
        assert metrics == pytest.approx(outcomes[0][1], rel=1e-4, abs=1e-5)
        for ours, theirs, before in zip(changed, outcomes[0][0], start, strict=True):
            # by norm: Adam's first steps amplify the rounding error of a gradient near zero
            assert float((ours - theirs).norm()) <= 1e-2 * float((theirs - before).norm())
    assert not same(outcomes[0][0], start)


def record_gradients(trainer: Trainer) -> list[torch.Tensor]:
    """Filled with a copy of every gradient when the optimizer steps."""
    seen: list[torch.Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_) -> None:
        seen.extend(p.grad.clone() for g in optimizer.param_groups for p in g["params"])

    trainer.optimizer.optimizer.register_step_pre_hook(keep)
    return seen


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_micro_batch_split_does_not_change_the_gradient(build, make_groups, algorithm: str):
    gradients = []
    for budget in (10_000, 20, 1):
        trainer = build(algorithm, trainer={"micro_batch_tokens": budget, "max_grad_norm": 1e9})
        gradients.append(record_gradients(trainer))
        step(trainer, make_groups())
    for split in gradients[1:]:
        for ours, theirs in zip(split, gradients[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert any(g.abs().max() > 1e-3 for g in gradients[0])


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_the_gradient_is_that_of_the_plain_model_rollout_by_rollout(build, make_groups, aggregation: str):
    trainer = build(
        options={"loss_aggregation": aggregation, "scale_by_std": False},
        trainer={"micro_batch_tokens": 30, "max_grad_norm": 1e9},
    )
    seen, plain = record_gradients(trainer), copy.deepcopy(trainer.policy)
    metrics = step(trainer, make_groups())
    rollouts = [r for group in make_groups() for r in group.rollouts]
    total, loss = sum(len(r.token_ids) for r in rollouts), 0.0
    for group in make_groups():
        mean = sum(r.reward for r in group.rollouts) / len(group.rollouts)
        for rollout in group.rollouts:
            tokens = torch.tensor([group.prompt.token_ids + rollout.token_ids])
            logprobs = plain(input_ids=tokens).logits[0, :-1].log_softmax(-1)
            chosen = logprobs.gather(1, tokens[0, 1:, None])[-len(rollout.token_ids) :]
            divisor = total
            if aggregation == "seq-mean-token-mean":
                divisor = len(rollouts) * len(rollout.token_ids)
            weight = (rollout.reward - mean) / divisor
            (-weight * chosen.sum()).backward()
            loss -= weight * len(rollout.token_ids)
    assert metrics["actor/pg_loss"] == pytest.approx(loss, abs=1e-5)
    for ours, parameter in zip(seen, plain.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_step_without_clipping_or_spread_moves_towards_the_better_completion(build, make_groups):
    trainer = build(trainer={"lr": 1e-3})
    groups = make_groups()
    batch = trainer.prepare(groups)
    batch.advantages, batch.returns = trainer.run.algorithm.estimate_advantages(batch, trainer.memory)
    trainer.update(batch)
    after, _ = policy_logprobs(trainer.policy, batch, 1.0)
    gain = ((after - batch.old_logprobs) * batch.advantages).sum()
    assert float(gain.detach()) > 0


def test_equal_rewards_leave_the_policy_as_it_is(build, make_groups):
    trainer = build()
    groups = make_groups()
    for group in groups:
        for rollout in group.rollouts:
            rollout.reward = 0.7
    before = parameters(trainer)
    metrics = step(trainer, groups)
    assert metrics["actor/grad_norm"] == 0
    assert same(parameters(trainer), before)
    step(trainer, make_groups(version=1))
    before = parameters(trainer)
    for group in groups:
        for rollout in group.rollouts:
            rollout.policy_version = 2
    step(trainer, groups)
    assert same(parameters(trainer), before)  # although the optimizer has momentum now


def test_equal_rewards_move_the_critic_and_not_the_policy(build, make_groups):
    trainer = build("ppo", trainer={"lr": 1e-3}, options={"whiten_advantages": True, "gae_lambda": 0.0})
    step(trainer, make_groups())
    groups = make_groups(version=1)
    batch = trainer.prepare(groups)
    batch.advantages, batch.returns = trainer.run.algorithm.estimate_advantages(batch, trainer.memory)
    batch.advantages = torch.zeros_like(batch.advantages)
    parts = (trainer.policy, trainer.critic)
    before = [[p.detach().clone() for p in part.parameters()] for part in parts]
    trainer.update(batch)
    assert [same(list(it.parameters()), was) for it, was in zip(parts, before, strict=True)] == [True, False]


def test_the_first_pass_over_a_batch_has_ratio_one(build, make_groups):
    metrics = step(build("ppo"), make_groups())
    assert metrics["actor/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["actor/clip_ratio"] == 0


def test_the_rollouts_own_logprobs_show_no_mismatch(build, make_groups):
    trainer = build(rollout={"temperature": 0.7}, trainer={"minibatches": 2})
    groups = make_groups()
    batch = trainer.prepare(groups)
    rows = iter(batch.old_logprobs)
    for group in groups:
        for rollout in group.rollouts:
            rollout.logprobs = next(rows)[: len(rollout.token_ids)].tolist()
    metrics = step(trainer, groups)
    assert metrics["mismatch/logp_abs_diff_max"] < 1e-5
    assert metrics["mismatch/is_ess"] == pytest.approx(1, abs=1e-5)


def test_a_step_raises_the_version_by_one_whatever_the_number_of_passes(build, make_groups):
    trainer = build(trainer={"epochs": 2, "minibatches": 3})
    step(trainer, make_groups())
    assert trainer.version == 1
    step(trainer, make_groups(version=1))
    assert trainer.version == 2


def test_rollouts_of_another_version_are_refused(build, make_groups):
    trainer = build()
    groups = make_groups()
    groups[1].rollouts[2].policy_version = 4
    with pytest.raises(SwitchError, match="prompt 1 was sampled from policy version 4, the trainer"):
        trainer.prepare(groups)
    step(trainer, make_groups())
    with pytest.raises(SwitchError, match="version 0, the trainer is at 1"):
        trainer.prepare(make_groups())


POISON = [
    *(("grpo", name, math.nan) for name in ("rollout_logprobs", "old_logprobs", "rewards")),
    *(("grpo", "advantages", value) for value in (math.inf, -math.inf)),
    *(("ppo", name, math.nan) for name in ("advantages", "values", "returns")),
]


@pytest.mark.parametrize(("algorithm", "name", "poison"), POISON)
def test_a_batch_that_is_not_finite_is_as_if_it_had_not_been(build, make_groups, algorithm, name, poison):
    trainer, untouched = (build(algorithm, trainer={"lr": 1e-3, "minibatches": 2}) for _ in range(2))
    batch = trainer.prepare(make_groups())
    batch.advantages, batch.returns = trainer.run.algorithm.estimate_advantages(batch, trainer.memory)
    getattr(batch, name).view(-1)[0] = poison
    before = parameters(trainer)
    metrics = trainer.update(batch)
    assert trainer.skipped == [f"{name} is not finite"] and metrics["actor/skipped_updates"] == 1
    assert same(parameters(trainer), before) and trainer.version == 1
    untouched.version = 1
    for it in (trainer, untouched):
        assert step(it, make_groups(version=1))["actor/skipped_updates"] == 0
    assert same(parameters(trainer), parameters(untouched))
    assert not same(parameters(trainer), before)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_optimizer_step_that_is_not_finite_is_left_out_alone(build, make_groups, poison):
    trainer = build(trainer={"lr": 1e-3, "minibatches": 3})
    calls: list[int] = []

    def spoil_the_second(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * (poison if len(calls) == 2 else 1.0)

    next(trainer.policy.parameters()).register_hook(spoil_the_second)
    before = parameters(trainer)
    groups = make_groups()
    for group in groups:
        for rollout in group.rollouts:
            rollout.reward = float(rollout.sample**2)  # none is at the mean, so each minibatch has a gradient
    metrics = step(trainer, groups)
    (reason,) = trainer.skipped
    assert "actor/grad_norm = " in reason and metrics["actor/skipped_updates"] == 1
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}
    assert not same(parameters(trainer), before)
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(value.isfinite().all() for value in parameters(trainer))


def test_a_broken_critic_stops_the_policys_update_too(build, make_groups):
    trainer = build("ppo")
    next(trainer.critic.parameters()).register_hook(lambda gradient: gradient * math.nan)
    before = parameters(trainer)
    step(trainer, make_groups())
    assert "critic/grad_norm = nan" in trainer.skipped[0]
    assert same(parameters(trainer), before)


# -- memory ------------------------------------------------------------------------------------

NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"


def run_out_beyond(model: torch.nn.Module, tokens: int) -> None:
    """Forward passes of more than `tokens` tokens, padding included, run out of memory."""

    def refuse(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError(NO_MEMORY)

    model.register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_what_does_not_fit_is_done_in_smaller_parts_with_the_same_result(
    build, make_groups, algorithm, capsys
):
    trainer, roomy = (build(algorithm, trainer={"lr": 1e-3, "epochs": 2}) for _ in range(2))
    run_out_beyond(trainer.policy, tokens=30)
    ours, theirs = (step(it, make_groups()) for it in (trainer, roomy))
    assert trainer.limit.tokens <= 30 < roomy.limit.tokens
    small = {"micro_batch_tokens": trainer.limit.tokens}
    frugal = build(algorithm, trainer={"lr": 1e-3, "epochs": 2} | small)
    step(frugal, make_groups())
    assert same(parameters(trainer), parameters(frugal))
    for a, b in zip(parameters(trainer), parameters(roomy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # a different order of summation
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("out of memory in step 1: micro-batches of 39 tokens from here on")
    step(trainer, make_groups(version=1))
    assert capsys.readouterr().out == ""  # the size found once is kept


def test_memory_that_runs_out_in_the_backward_pass_loses_no_gradient(build, make_groups):
    trainer, roomy = (build(trainer={"lr": 1e-3, "micro_batch_tokens": 24}) for _ in range(2))
    calls: list[int] = []

    def run_out_once(gradient: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:  # one micro-batch's gradients are accumulated by then
            raise torch.OutOfMemoryError(NO_MEMORY)

    next(trainer.policy.parameters()).register_hook(run_out_once)
    for it in (trainer, roomy):
        step(it, make_groups())
    assert trainer.limit.tokens == 13 and len(calls) > 3
    for a, b in zip(parameters(trainer), parameters(roomy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("times", [1, 99])
def test_memory_that_runs_out_for_the_optimizer_is_tried_again_once(build, make_groups, monkeypatch, times):
    trainer, roomy = (build("ppo", trainer={"lr": 1e-3, "minibatches": 2}) for _ in range(2))
    step(roomy, make_groups())
    calls, zeros_like = [], torch.zeros_like

    def run_out(tensor: torch.Tensor, **options) -> torch.Tensor:
        if sys._getframe(1).f_code.co_filename.endswith("adam.py"):
            calls.append(1)
        if calls and len(calls) % 5 == 0 and len(calls) <= 5 * times:  # some states are made, one half
            raise torch.OutOfMemoryError(NO_MEMORY)
        return zeros_like(tensor, **options)

    monkeypatch.setattr(torch, "zeros_like", run_out)
    before = parameters(trainer)
    if times == 1:
        step(trainer, make_groups())
        assert same(parameters(trainer), parameters(roomy))
    else:
        with pytest.raises(RLSwitchError, match=r"step 1: the optimizer ran out of memory \(CUDA out"):
            step(trainer, make_groups())
        assert same(parameters(trainer), before)
    assert len(calls) > 5


@pytest.mark.slow
def test_a_rollout_that_does_not_fit_alone_ends_the_run_and_says_what_to_set(build, make_groups):
    trainer = build()
    run_out_beyond(trainer.policy, tokens=10)
    before = parameters(trainer)
    with pytest.raises(
        RLSwitchError, match=r"step 1: one rollout of 13 tokens does not fit alone \(CUDA out"
    ):
        step(trainer, make_groups())
    assert same(parameters(trainer), before)


def test_other_errors_are_not_taken_for_a_lack_of_memory(build, make_groups, capsys):
    trainer = build()
    trainer.policy.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("bad kernel")))
    with pytest.raises(RuntimeError, match="bad kernel"):
        step(trainer, make_groups())
    assert trainer.limit.tokens == 16384


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gradient_checkpointing_recomputes_and_changes_nothing(build, make_groups, lora_rank: int):
    outcomes, forwards = [], []
    for checkpointing in (False, True):
        trainer = build(
            "ppo",
            trainer={"lr": 1e-3, "gradient_checkpointing": checkpointing},
            model={"lora_rank": lora_rank},
        )
        passes = {"policy": 0, "critic": 0}
        for name, part in (("policy", trainer.policy), ("critic", trainer.critic)):
            attention = next(m for m in part.modules() if type(m).__name__ == "Qwen3Attention")
            attention.register_forward_hook(
                lambda *_, name=name, seen=passes: seen.update({name: seen[name] + 1})
            )
        before = parameters(trainer)
        step(trainer, make_groups())
        assert not same(parameters(trainer), before)
        outcomes.append(parameters(trainer))
        forwards.append(passes)
    assert all(forwards[1][name] > forwards[0][name] for name in ("policy", "critic"))
    for plain, recomputed in zip(*outcomes, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_gradient_checkpointing_drops_nothing_out(make_run, make_trainer, make_groups, tmp_path):
    tokenizer = addition.build_tokenizer()
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    outcomes = []
    for checkpointing in (False, True, True):
        run = make_run("ppo", trainer={"epochs": 2, "lr": 1e-3, "gradient_checkpointing": checkpointing})
        run.model.path = str(tmp_path / "gpt2")
        trainer = make_trainer(run)
        outcomes.append((step(trainer, make_groups())["actor/ratio_mean"], parameters(trainer)))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], abs=1e-6)
    assert same(outcomes[1][1], outcomes[2][1])


def test_as_many_minibatches_as_rollouts_lose_one_with_the_rollout(build, make_groups):
    groups = make_groups()
    count = sum(len(group.rollouts) for group in groups)
    trainer = build("grpo", trainer={"lr": 1e-3, "minibatches": count})
    groups[0].failed.append(groups[0].rollouts.pop())
    before = parameters(trainer)
    step(trainer, groups)
    assert trainer.schedule.last_epoch == count - 1 and not same(parameters(trainer), before)


def test_only_what_the_algorithm_needs_is_loaded(build):
    grpo, ppo = build("grpo"), build("ppo", options={"kl_coef": 0.1})
    assert (grpo.critic, grpo.reference) == (None, None)
    assert ppo.critic is not None and ppo.reference is not None
    assert not any(p.requires_grad for part in ppo.reference.parts for p in part.parameters())
    trained = {id(p) for group in ppo.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for part in (ppo.policy, ppo.critic) for p in part.parameters()}


def test_the_reference_stays_while_the_policy_moves(build, make_groups):
    trainer = build("grpo", options={"kl_coef": 0.1}, trainer={"lr": 1e-3})
    assert step(trainer, make_groups())["actor/kl_ref"] == 0
    with trainer.reference.model() as reference:
        frozen = [p.clone() for p in reference.parameters()]
    assert step(trainer, make_groups(version=1))["actor/kl_ref"] > 0
    assert same(list(reference.parameters()), frozen)


def test_a_new_critic_values_everything_at_zero_and_learns(build, make_groups):
    trainer = build("ppo", options={"value_clip": 0.0}, trainer={"critic_lr": 1e-2})
    assert not trainer.prepare(make_groups()).values.any()
    losses = [step(trainer, make_groups(version=v))["critic/vf_loss"] for v in range(4)]
    assert losses[3] < losses[0]


# -- log-probabilities -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_policy_logprobs_are_those_of_the_plain_model_on_unpadded_sequences(
    tiny_model, make_groups, temperature: float
):
    model, groups = tiny_model().model, make_groups()
    batch = to_batch(groups, 12, CPU)
    with torch.no_grad():
        logprobs, entropy = policy_logprobs(model, batch, temperature)
    rows = iter(range(len(batch)))
    for group in groups:
        for rollout in group.rollouts:
            row, start = next(rows), len(group.prompt.token_ids)
            tokens = torch.tensor([group.prompt.token_ids + rollout.token_ids])
            with torch.no_grad():
                logits = model(input_ids=tokens).logits[0, start - 1 : -1]
            expected = (logits / temperature).log_softmax(-1)
            length = len(rollout.token_ids)
            ours = logprobs[row, :length]
            theirs = expected.gather(1, tokens[0, start:, None]).squeeze(1)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            spread = -(expected.exp() * expected).sum(-1)
            torch.testing.assert_close(entropy[row, :length], spread, rtol=1e-4, atol=1e-5)
            assert not logprobs[row, length:].any() and not entropy[row, length:].any()


def test_the_canary_is_scored_as_the_plain_model_does(tiny_model):
    model = tiny_model().model
    sequences = [[13, 1, 2, 3], [5, 6]]
    for tokens, ours in zip(sequences, sequence_logprobs(model, sequences), strict=True):
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        theirs = [float(logprobs[t, token]) for t, token in enumerate(tokens[1:])]
        assert ours == pytest.approx(theirs, abs=1e-5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(rows=st.integers(1, 9), temperature=st.floats(0.3, 3), chunk=st.integers(1, 40))
def test_chunks_change_neither_statistics_nor_gradients(monkeypatch, rows, temperature, chunk):
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(5, (rows,), generator=generator)
    results = []
    for size in (1 << 26, chunk):
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", size)
        logits = torch.randn(rows, 5, generator=generator.manual_seed(rows)).requires_grad_()
        chosen, entropy = token_statistics(logits, targets, temperature)
        (chosen.sum() * 2 + (entropy**2).sum()).backward()
        results.append((chosen.detach(), entropy.detach(), logits.grad))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


# -- publishing --------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_what_is_published_loads_and_has_the_fingerprint_it_claims(build, tie: bool):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    trainer = build(tie=tie)
    weights = trainer.publish()
    stored = {k: v for f in weights.path.glob("*.safetensors") for k, v in load_file(f).items()}
    assert ("lm_head.weight" in stored) == (not tie)
    assert named_fingerprints(stored.items()) == weights.tensors
    assert total_fingerprint(weights.tensors.values()) == weights.fingerprint
    loaded = AutoModelForCausalLM.from_pretrained(weights.path, dtype=torch.float32)
    assert same(list(loaded.parameters()), list(trainer.policy.parameters()))
    assert sequence_logprobs(loaded, trainer.canary) == weights.canary.logprobs


def test_publishing_twice_gives_the_same_version_once(build):
    trainer = build()
    first = trainer.publish()
    written = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    assert trainer.publish() is first
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == written


def test_every_version_has_its_own_path_and_at_most_two_lie_there_at_any_time(
    build, make_groups, monkeypatch
):
    trainer = build(trainer={"lr": 1e-3})
    policy, root = trainer.policy, trainer.publisher.root
    save, at_most = policy.save_pretrained, []

    def counted(path: Path, **options) -> None:
        assert not Path(path).exists()
        save(path, **options)
        at_most.append(len(list(root.glob("v*"))))

    monkeypatch.setattr(policy, "save_pretrained", counted)
    published = []
    for version in range(4):
        published.append(trainer.publish())
        step(trainer, make_groups(version=version))
    assert [weights.version for weights in published] == [0, 1, 2, 3]
    assert len({weights.path for weights in published}) == 4
    assert len({weights.fingerprint for weights in published}) == 4
    assert max(at_most) == 2
    assert sorted(root.glob("v*")) == [published[2].path, published[3].path]


def test_publishing_in_another_dtype_leaves_the_master_weights_alone(make_run, make_trainer):
    trainer = make_trainer(make_run(), engine_dtype=torch.bfloat16)
    before = parameters(trainer)
    weights = trainer.publish()
    assert same(parameters(trainer), before)
    exact = named_fingerprints(trainer.policy.named_parameters())
    assert weights.tensors.keys() == exact.keys() and weights.tensors != exact
    cast = named_fingerprints(trainer.policy.named_parameters(), torch.bfloat16)
    assert weights.tensors == cast


def test_only_what_dead_runs_left_behind_is_swept(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", ""])
    other.wait()
    alive = ["rlswitch-foreign-name-x", f"rlswitch-{owner_tag()}-mine", "rlswitch-1", "other-1-2-3"]
    dead = [f"rlswitch-{other.pid}-123-a", f"rlswitch-{os.getpid()}-123-reused"]
    for name in [*alive, *dead]:
        (tmp_path / name / "v000001").mkdir(parents=True)
    (tmp_path / "rlswitch-1-2-gone").symlink_to(tmp_path / "swept-by-another-run")
    sweep_dead_runs(tmp_path)
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == set(alive)


def test_a_run_that_seems_dead_from_here_keeps_its_weights_while_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rlswitch.training.publish.owner_tag", lambda: f"{os.getpid()}-123"
    )  # the clock was set
    publisher = Publisher("disk", 0, tmp_path)
    sweep_dead_runs(tmp_path)
    assert publisher.root.is_dir()
    os.close(publisher._lock)  # as when it is killed
    sweep_dead_runs(tmp_path)
    assert not publisher.root.exists()


def test_shared_memory_is_refused_when_two_versions_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"switch\.transport = shm: .* set switch\.transport=disk"):
        choose_directory("shm", 1 << 60, tmp_path)
    assert choose_directory("auto", 1 << 60, tmp_path) == tmp_path
    assert choose_directory("disk", 0, tmp_path) == tmp_path


# -- as a tenant -------------------------------------------------------------------------------


@pytest.mark.parametrize("park", ["auto", "nothing", "optimizer", "everything"])
def test_on_a_cpu_nothing_moves_when_the_trainer_lets_go(build, make_groups, park: str):
    trainer = build("ppo", trainer={"park": park})
    step(trainer, make_groups())
    addresses = [p.data_ptr() for p in trainer.policy.parameters()]
    before = parameters(trainer)
    trainer.release()
    assert trainer.unreleased() is None
    assert trainer.parking.park() == trainer.parking.bring_back() == 0
    trainer.acquire(None)
    assert [p.data_ptr() for p in trainer.policy.parameters()] == addresses
    assert same(parameters(trainer), before)


def test_a_step_leaves_no_gradient_to_the_next_one(build, make_groups):
    trainer = build("ppo", trainer={"minibatches": 2})
    seen = record_gradients(trainer)
    step(trainer, make_groups())
    trained = [*trainer.policy.parameters(), *trainer.critic.parameters()]
    assert len(seen) == 2 * len(trained) and all(p.grad is None for p in trained)


def test_letting_go_frees_the_gradients(build, make_groups):
    trainer = build("ppo")
    batch = trainer.prepare(make_groups())
    logprobs, _ = policy_logprobs(trainer.policy, batch, 1.0)
    logprobs.sum().backward()
    trainer.release()
    assert all(p.grad is None for p in trainer.policy.parameters())


class Roomy:
    """A GPU of 1000 bytes, as far as Parking can see."""

    kind = "cuda"

    def total_bytes(self) -> int:
        return 1000


@pytest.mark.parametrize(
    ("engine_bytes", "parked"), [(0, []), (700, ["state"]), (900, ["parameter", "state"])]
)
def test_auto_parks_only_what_does_not_fit_beside_the_engine(engine_bytes: int, parked: list[str]):
    layer = torch.nn.Linear(5, 8, bias=False)  # 160 bytes of parameters, 320 of states
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    parking = Parking("auto", Roomy(), lambda: iter([layer]), optimizer)
    parking.engine_bytes = engine_bytes
    chosen = parking._chosen()
    assert nbytes(chosen) == {"parameter": 160, "state": 320}.get("".join(parked), 480 * bool(parked))


def test_the_learning_rate_follows_its_schedule(build, make_groups):
    trainer = build(num_steps=4, trainer={"lr": 1.0, "lr_schedule": "linear", "warmup_steps": 1})
    rates = [step(trainer, make_groups(version=v))["actor/lr"] for v in range(3)]
    assert rates == pytest.approx([0, 1, 2 / 3])


def test_the_same_run_twice_is_the_same_to_the_last_bit(build, make_groups):
    outcomes = []
    for noise in (0, 1):
        torch.manual_seed(noise)  # nothing may depend on the global generator
        trainer = build("ppo", seed=5, trainer={"lr": 1e-3, "minibatches": 2, "epochs": 2})
        step(trainer, make_groups())
        outcomes.append(parameters(trainer))
    assert same(*outcomes)


def test_the_seed_of_the_run_decides_how_minibatches_are_drawn(build, make_groups):
    outcomes = []
    for seed in (0, 1):
        trainer = build(seed=seed, trainer={"lr": 1e-3, "minibatches": 3})
        step(trainer, make_groups())
        outcomes.append(parameters(trainer))
    assert not same(*outcomes)


def test_run_settings_reach_the_optimizer(make_run, make_trainer):
    run: Run = make_run("ppo", trainer={"lr": 0.5, "critic_lr": 0.25, "adam_beta2": 0.5})
    groups = make_trainer(run).optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.5, 0.25]
    assert all(tuple(group["betas"]) == (0.9, 0.5) for group in groups)
