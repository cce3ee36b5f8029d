"""Adapters: what is trained, pushed and saved, and that these do not interfere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlswitch.checkpoint import checkpoint
from rlswitch.checkpoint.checkpoint import LoopState
from rlswitch.errors import ConfigError
from rlswitch.planning.footprint import ModelShape
from rlswitch.training import lora
from rlswitch.training.logprobs import policy_logprobs, sequence_logprobs
from rlswitch.training.models import load_trained
from rlswitch.training.schedule import trained
from rlswitch.training.trainer import Trainer

SEQUENCES = [[13, 1, 2, 10, 3, 4, 11, 7], [13, 5, 11, 0]]


@pytest.fixture
def build(make_run, make_trainer) -> Callable[..., Trainer]:
    """build("ppo", lora_rank=4): a trainer of adapters, rank 4 by default."""

    def make(algorithm: str = "grpo", *, tie: bool = True, options=None, checkpoint=None, **model) -> Trainer:
        return make_trainer(
            make_run(
                algorithm,
                tie=tie,
                options=options or {},
                num_steps=4,
                trainer={"lr": 1e-2, "critic_lr": 1e-2},
                model={"lora_rank": 4} | model,
                checkpoint=checkpoint or {},
            )
        )

    return make


def step(trainer: Trainer, make_groups) -> dict[str, float]:
    batch = trainer.prepare(make_groups(version=trainer.version))
    batch.advantages, batch.returns = trainer.run.algorithm.estimate_advantages(batch, trainer.memory)
    return trainer.update(batch)


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.policy.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def logprobs_of(model) -> torch.Tensor:
    return torch.tensor([x for row in sequence_logprobs(model.eval(), SEQUENCES) for x in row])


def test_adapters_start_as_no_change_at_all(build, tiny_model):
    assert torch.equal(logprobs_of(build().policy), logprobs_of(tiny_model().model))


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_step_moves_adapters_and_head_and_nothing_else(build, make_groups, algorithm: str):
    trainer = build(algorithm)
    before, critic = state(trainer), trainer.critic and trainer.critic.state_dict()
    critic = {name: value.clone() for name, value in (critic or {}).items()}
    step(trainer, make_groups)
    moved = changed(before, state(trainer))
    assert moved and all(".lora_B." in name or ".lora_A." in name for name in moved)
    if trainer.critic is not None:
        step(trainer, make_groups)  # the head starts at zero, so the first step moves only it
        moved = changed(critic, trainer.critic.state_dict())
        assert {"head.weight", "head.bias"} < moved
        assert all(lora.LORA in name or name.startswith("head.") for name in moved)
    groups = trainer.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == sum(
        len(trained(part)) for part in (trainer.policy, trainer.critic) if part is not None
    )


@pytest.mark.parametrize("tie", [True, False])
def test_a_push_is_the_merged_model_under_the_plain_models_names(build, make_groups, tiny_model, tie: bool):
    trainer = build(tie=tie)
    step(trainer, make_groups)
    pushed = trainer.publish()
    plain = load_file(tiny_model(tie).path / "model.safetensors")
    files = load_file(pushed.path / "model.safetensors")
    assert {name: t.shape for name, t in files.items()} == {name: t.shape for name, t in plain.items()}
    merged = AutoModelForCausalLM.from_pretrained(pushed.path, dtype=torch.float32)
    torch.testing.assert_close(logprobs_of(merged), logprobs_of(trainer.policy), atol=2e-5, rtol=0)
    assert float((logprobs_of(merged) - logprobs_of(tiny_model(tie).model)).abs().max()) > 1e-2


def test_a_push_leaves_what_is_trained_as_it_was_to_the_last_bit(build, make_groups):
    trainer = build()
    step(trainer, make_groups)
    before = state(trainer)
    for version in range(1, 6):
        trainer.published, trainer.version = None, version
        trainer.publish()
    assert not changed(before, state(trainer))
    silent = build()
    step(silent, make_groups)
    silent.version = trainer.version
    for one in (trainer, silent):
        step(one, make_groups)
    assert not changed(state(silent), state(trainer))


def test_frozen_weights_take_the_engines_dtype_and_adapters_stay_in_float32(make_run):
    run = make_run(model={"lora_rank": 4})
    policy = load_trained(run, run.model.path, torch.bfloat16, causal=True)
    dtypes = {name: parameter.dtype for name, parameter in policy.named_parameters()}
    assert {d for name, d in dtypes.items() if lora.LORA in name} == {torch.float32}
    assert {d for name, d in dtypes.items() if lora.LORA not in name} == {torch.bfloat16}


def test_the_same_seed_makes_the_same_adapters(build):
    torch.manual_seed(1)
    ours = state(build())
    torch.manual_seed(2)
    assert not changed(ours, state(build()))


# -- the reference -----------------------------------------------------------------------------


def test_the_reference_is_the_model_without_adapters_and_no_second_one(build, make_groups, tiny_model):
    trainer = build(options={"kl_coef": 0.1})
    step(trainer, make_groups)
    batch = trainer.prepare(make_groups(version=1))
    with torch.no_grad():
        base, _ = policy_logprobs(tiny_model().model, batch, 1.0)
        now, _ = policy_logprobs(trainer.policy, batch, 1.0)
    torch.testing.assert_close(batch.reference_logprobs, base)
    assert float((base - now).abs().max()) > 1e-2
    assert trainer.reference.parts == []


def test_a_refreshed_reference_is_the_adapter_of_that_moment(build, make_groups):
    trainer = build(options={"kl_coef": 0.1, "reference_refresh": 1}, lora_rank=4)
    step(trainer, make_groups)
    now = logprobs_of(trainer.policy)
    with trainer.reference.model() as reference:
        assert torch.equal(logprobs_of(reference), now)
    before = state(trainer)
    trainer.run.algorithm.reference_refresh = 0
    step(trainer, make_groups)
    assert not torch.equal(logprobs_of(trainer.policy), now)
    with trainer.reference.model() as reference:
        assert torch.equal(logprobs_of(reference), now)
    assert changed(before, state(trainer)), "the trained adapter is back in its place"


# -- checkpoints -------------------------------------------------------------------------------


def save(trainer: Trainer, tokenizer, directory: Path) -> Path:
    details = LoopState(step=trainer.version, model=trainer.run.model.path)
    return checkpoint.save(directory, trainer, tokenizer, details, keep=2)


def test_a_checkpoint_holds_the_adapter_and_loads_with_from_pretrained(
    build, make_groups, tiny_model, tmp_path
):
    trainer = build()
    step(trainer, make_groups)
    path = save(trainer, tiny_model().tokenizer, tmp_path / "c")
    assert {file.name for file in (path / "policy").glob("*.safetensors")} == {lora.WEIGHTS}
    assert not (path / "merged").exists()
    loaded = AutoModelForCausalLM.from_pretrained(path / "policy", dtype=torch.float32)
    torch.testing.assert_close(logprobs_of(loaded), logprobs_of(trainer.policy), atol=2e-5, rtol=0)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert {Path(name).suffix for name in listed} <= {".safetensors", ".json", ".jinja"}


def test_on_request_a_checkpoint_holds_the_merged_model_too(build, make_groups, tiny_model, tmp_path):
    trainer = build(checkpoint={"merged": True})
    step(trainer, make_groups)
    path = save(trainer, tiny_model().tokenizer, tmp_path / "c")
    merged = AutoModelForCausalLM.from_pretrained(path / "merged", dtype=torch.float32)
    assert not any(lora.LORA in name for name in merged.state_dict())
    torch.testing.assert_close(logprobs_of(merged), logprobs_of(trainer.policy), atol=2e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(path / "merged")("1+2").input_ids


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_restored_run_continues_to_the_last_bit(build, make_groups, tiny_model, tmp_path, algorithm: str):
    options = {"kl_coef": 0.1, "reference_refresh": 1, "kl_target": 0.01}
    straight = build(algorithm, options=options)
    step(straight, make_groups)
    path = save(straight, tiny_model().tokenizer, tmp_path / "c")
    step(straight, make_groups)
    torch.manual_seed(99)
    resumed = build(algorithm, options=options)
    checkpoint.restore(path, resumed)
    step(resumed, make_groups)
    assert not changed(state(straight), state(resumed))
    assert resumed.memory == straight.memory and "kl_coef" in resumed.memory
    if algorithm == "ppo":
        assert not changed(straight.critic.state_dict(), resumed.critic.state_dict())


def test_an_adapter_of_another_rank_or_scale_is_refused_in_one_line(build, make_groups, tiny_model, tmp_path):
    path = save(build(lora_rank=4, lora_alpha=8), tiny_model().tokenizer, tmp_path / "c")
    for other in ({"lora_rank": 2}, {"lora_rank": 4, "lora_alpha": 4}):
        with pytest.raises(ConfigError, match=r"does not fit model\.lora_rank") as caught:
            checkpoint.restore(path, build(**other))
        assert "\n" not in str(caught.value)


# -- settings ----------------------------------------------------------------------------------


def test_unknown_layers_are_named(make_run):
    run = make_run(model={"lora_rank": 4, "lora_targets": ["no_such_layer"]})
    with pytest.raises(ConfigError, match=r"^model\.lora_targets = \['no_such_layer'\]"):
        load_trained(run, run.model.path, torch.float32, causal=True)


@pytest.mark.parametrize(
    ("target", "why"), [("lm_head", "shares its weight"), ("embed_tokens", "is not a plain linear layer")]
)
def test_layers_that_a_push_could_not_carry_merged_are_refused(make_run, target: str, why: str):
    for tie in (True, False):
        run = make_run(tie=tie, model={"lora_rank": 4, "lora_targets": ["q_proj", target]})
        if tie or target == "embed_tokens":
            with pytest.raises(ConfigError, match=rf"model\.lora_targets = .*: {target} ") as caught:
                load_trained(run, run.model.path, torch.float32, causal=True)
            assert why in str(caught.value) or tie
        else:
            load_trained(run, run.model.path, torch.float32, causal=True)


def test_a_step_works_whatever_the_engine_computes_in(make_run, make_trainer, make_groups):
    run = make_run("ppo", model={"lora_rank": 4, "dtype": "bfloat16"})
    trainer = make_trainer(run, torch.bfloat16)
    assert step(trainer, make_groups)["actor/grad_norm"] > 0
    assert trainer.publish().nbytes > 0


def test_an_adapter_knows_its_base_by_a_path_that_holds_anywhere(build, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model().path.parent)
    trainer = build(path=tiny_model().path.name)
    path = save(trainer, tiny_model().tokenizer, tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    AutoModelForCausalLM.from_pretrained(path / "policy")


def test_chosen_layers_alone_get_adapters(build):
    adapted = {name for name in state(build(lora_targets=["q_proj"])) if lora.LORA in name}
    assert adapted and all(".q_proj." in name for name in adapted)


def test_the_plan_counts_adapters(make_run, build):
    run = make_run(model={"lora_rank": 4})
    shape = ModelShape.read(run.model)
    assert shape.adapters == sum(p.numel() for p in trained(build().policy))
    assert ModelShape.read(make_run().model).parameters == shape.parameters
