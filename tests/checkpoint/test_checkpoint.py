"""Saving, choosing and restoring checkpoints: an interrupted run resumes exactly."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlswitch.checkpoint import checkpoint
from rlswitch.checkpoint.atomic import FORMAT, MANIFEST, checkpoint_problems
from rlswitch.checkpoint.checkpoint import is_due, restore, save
from rlswitch.checkpoint.resume import LoopState, choose, finished, newest, read_state
from rlswitch.config.sections import CheckpointConfig
from rlswitch.errors import ConfigError, SaveError
from rlswitch.training.trainer import Trainer

LEARNING = {"lr": 1e-3, "lr_schedule": "linear", "warmup_steps": 1, "minibatches": 2}


@pytest.fixture
def build(make_run, make_trainer) -> Callable[..., Trainer]:
    def make(algorithm: str = "grpo", **run_settings) -> Trainer:
        run_settings.setdefault("trainer", LEARNING)
        return make_trainer(make_run(algorithm, num_steps=4, **run_settings))

    return make


@pytest.fixture
def keep_step(tmp_path: Path, build, tiny_model) -> Callable[..., Path]:
    """keep_step(5, keep=2): saves a trainer as of step 5 under tmp_path/checkpoints."""
    trainers: list[Trainer] = []

    def make(step: int, keep: int = 9, **state) -> Path:
        trainers.append(trainers[0] if trainers else build("ppo"))
        details = LoopState(**({"step": step, "model": trainers[0].run.model.path} | state))
        return save(tmp_path / "checkpoints", trainers[0], tiny_model().tokenizer, details, keep=keep)

    return make


def update(trainer: Trainer, make_groups) -> None:
    batch = trainer.prepare(make_groups(version=trainer.version))
    batch.advantages, batch.returns = trainer.run.algorithm.estimate_advantages(batch, trainer.memory)
    trainer.update(batch)


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a step changes: parameters and the optimizer's state."""
    found = {
        f"{part}.{name}": value
        for part, model in (("policy", trainer.policy), ("critic", trainer.critic))
        if model is not None
        for name, value in model.state_dict().items()
    }
    for index, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# -- the round trip ----------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_restored_run_continues_to_the_last_bit(
    build, make_groups, tiny_model, tmp_path, algorithm: str, tie: bool
):
    straight = build(algorithm, tie=tie)
    update(straight, make_groups)
    halfway = {name: value.clone() for name, value in everything(straight).items()}
    state = LoopState(step=1, cursor=6, wandb_id="abc", model=straight.run.model.path)
    path = save(tmp_path / "checkpoints", straight, tiny_model(tie).tokenizer, state, keep=1)
    update(straight, make_groups)

    torch.manual_seed(12345)
    resumed = build(algorithm, tie=tie)
    assert read_state(path, resumed.run) == state
    restore(path, resumed)
    assert resumed.version == 1
    update(resumed, make_groups)

    ours, theirs = everything(resumed), everything(straight)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert not torch.equal(halfway["policy.model.norm.weight"], theirs["policy.model.norm.weight"])
    assert resumed.schedule.state_dict() == straight.schedule.state_dict()
    assert resumed.publish().fingerprint == straight.publish().fingerprint


def test_saving_does_not_disturb_the_run(build, make_groups, tiny_model, tmp_path):
    plain, saved = build("ppo"), build("ppo")
    for trainer in (plain, saved):
        update(trainer, make_groups)
    save(tmp_path / "c", saved, tiny_model().tokenizer, LoopState(step=1), keep=1)
    for trainer in (plain, saved):
        update(trainer, make_groups)
    theirs = everything(plain)
    assert all(torch.equal(value, theirs[name]) for name, value in everything(saved).items())


@pytest.mark.parametrize("tie", [True, False])
def test_the_policy_loads_with_from_pretrained(build, tiny_model, tmp_path, tie: bool):
    trainer = build(tie=tie)
    path = save(tmp_path / "c", trainer, tiny_model(tie).tokenizer, LoopState(step=1), keep=1)
    model = AutoModelForCausalLM.from_pretrained(path / "policy", dtype=torch.float32)
    for name, value in trainer.policy.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    tokenizer = AutoTokenizer.from_pretrained(path / "policy")
    assert tokenizer("07+45=").input_ids == tiny_model(tie).tokenizer("07+45=").input_ids


def test_nothing_in_a_checkpoint_can_run_code(keep_step):
    path = keep_step(1)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja"}
    listed = json.loads((path / MANIFEST).read_text())["files"]
    assert sorted([*listed, MANIFEST]) == sorted(str(file.relative_to(path)) for file in files)


# -- faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [MANIFEST, "state.json", "optimizer.safetensors", "policy/model.safetensors"]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "bomb"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(
    keep_step, tmp_path, name: str, damage: str
):
    good, bad = keep_step(1), keep_step(2)
    file = bad / name
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:middle])
    elif damage == "bomb":  # to safetensors: a header of 2^60 bytes
        file.write_bytes((1 << 60).to_bytes(8, "little") + content[8:])
    else:
        flipped = bytes([content[middle] ^ 1])
        file.write_bytes(content[:middle] + flipped + content[middle + 1 :])
    said: list[str] = []
    assert newest(tmp_path / "checkpoints", said.append) == good
    assert len(said) == 1 and said[0].startswith(f"skipping checkpoint {bad}: ")
    assert ("manifest" if name == MANIFEST else name) in said[0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_in_any_byte_is_found(keep_step, tmp_path, data: st.DataObject):
    path = tmp_path / "checkpoints" / "step_000001"
    if not path.is_dir():
        keep_step(1)
        assert not any(checkpoint_problems(path))
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from([path / MANIFEST, *files]))
    content = file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = content[position] ^ (1 << data.draw(st.integers(0, 7)))
    try:
        file.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
        with suppress(ConfigError):  # the format's digit: it reads as a newer version's
            assert any(checkpoint_problems(path))
    finally:
        file.write_bytes(content)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "policy/pytorch_model.bin", "policy/more.safetensors"])
def test_a_file_that_was_not_saved_with_it_spoils_a_checkpoint_and_is_not_read(keep_step, tmp_path, name):
    good, bad, sprung = keep_step(1), keep_step(2), tmp_path / "sprung"
    (bad / name).write_bytes(pickle.dumps(Trap(sprung)))
    said: list[str] = []
    assert newest(tmp_path / "checkpoints", said.append) == good
    assert len(said) == 1 and f"skipping checkpoint {bad}: {name} is not in its manifest" in said[0]
    assert not sprung.exists()
    pickle.loads((bad / name).read_bytes())
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "7",
        '{"format": 2}',
        '{"state.json": {"bytes": 1}}',
        '{"format": 2, "files": {"a": 1}}',
        "[" * 9999,
    ],
)
def test_a_manifest_of_any_other_shape_is_a_fault(keep_step, text: str):
    path = keep_step(1)
    (path / MANIFEST).write_text(text)
    assert any(checkpoint_problems(path))


def test_without_any_checkpoint_there_is_none(tmp_path):
    assert newest(tmp_path / "checkpoints", pytest.fail) is None


def test_micro_batches_stay_as_small_as_memory_made_them(build, tiny_model, tmp_path):
    small, roomy = build("ppo"), build("ppo")
    small.limit.tokens = 20
    state = LoopState(step=0, model=small.run.model.path)
    restore(save(tmp_path / "checkpoints", small, tiny_model().tokenizer, state, keep=1), roomy)
    assert roomy.limit.tokens == 20
    fine, other = build("ppo"), build("ppo", trainer=LEARNING | {"micro_batch_tokens": 99999})
    restore(save(tmp_path / "checkpoints", fine, tiny_model().tokenizer, state, keep=1), other)
    assert other.limit.tokens == 99999  # it was set and has not run out


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_afresh_over_them(
    keep_step, make_run, tmp_path
):
    for step in (1, 2):
        shutil.rmtree(keep_step(step) / "policy")
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"none of the 2 checkpoints in .* is valid; .*resume=never"):
        choose(make_run("ppo"), tmp_path, said.append)
    assert len(said) == 2
    assert choose(make_run("ppo", resume="never"), tmp_path, print).path is None


# -- listing -----------------------------------------------------------------------------------


def test_only_the_newest_ones_are_kept(keep_step, tmp_path):
    for step in (1, 2, 10, 100):
        keep_step(step, keep=2)
    assert names(tmp_path / "checkpoints") == ["step_000010", "step_000100"]


def test_a_step_saved_again_replaces_the_old_one(keep_step, tmp_path):
    keep_step(1, cursor=1)
    path = keep_step(1, cursor=2)
    assert not any(checkpoint_problems(path))
    assert json.loads((path / "state.json").read_text())["cursor"] == 2
    assert names(tmp_path / "checkpoints") == ["step_000001"]


def test_what_was_just_saved_outlives_a_later_checkpoint_of_an_abandoned_run(keep_step, tmp_path):
    keep_step(50), keep_step(100)
    path = keep_step(20, keep=1)  # resume=never, or from a checkpoint before a broken one
    assert newest(tmp_path / "checkpoints", print) == path
    assert names(tmp_path / "checkpoints") == ["step_000020"]


def test_the_next_start_removes_what_an_interrupted_save_has_left(keep_step, make_run, tmp_path):
    path = keep_step(1)
    for name in (".step_000001.old", ".step_000002.tmp"):
        (path.parent / name / "policy").mkdir(parents=True)
        (path.parent / name / "junk.bin").write_text("half")
    assert choose(make_run("ppo", trainer=LEARNING), tmp_path, print)[0] == path
    assert names(path.parent) == ["step_000001"]


def test_a_checkpoint_that_was_put_aside_gets_its_name_back_if_no_other_took_it(
    keep_step, make_run, tmp_path
):
    path = keep_step(1)
    path.rename(path.parent / ".step_000001.old")
    assert choose(make_run("ppo", trainer=LEARNING), tmp_path, print)[0] == path
    assert not any(checkpoint_problems(path))


@pytest.mark.parametrize("step", ["_write", "_save_policy"])
def test_a_save_without_room_says_which_checkpoint_is_left(
    keep_step, tmp_path, monkeypatch: pytest.MonkeyPatch, step: str
):
    good = keep_step(1)

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, step, full)
    with pytest.raises(SaveError, match=rf"step_000002 could not be saved .*No space.*; {good} is intact"):
        keep_step(2)
    assert names(tmp_path / "checkpoints") == ["step_000001"]


def test_what_is_not_about_the_disk_stays_a_crash_and_leaves_no_draft(keep_step, tmp_path, monkeypatch):
    keep_step(1)
    monkeypatch.setattr(checkpoint, "_write", lambda *_: {}["a mistake of ours"])
    with pytest.raises(KeyError):
        keep_step(2)
    assert names(tmp_path / "checkpoints") == ["step_000001"]


# -- resuming ----------------------------------------------------------------------------------


def test_resume_means_auto_never_or_a_path(keep_step, make_run, tmp_path):
    first, second = keep_step(1), keep_step(2)
    for word, expected in (("auto", second), ("never", None), ("changed", second), (str(first), first)):
        path, state, *_ = choose(make_run("ppo", resume=word, trainer=LEARNING), tmp_path, print)
        assert path == expected
        assert state.step == (int(expected.name[-6:]) if expected else 0)


def test_a_resume_path_that_is_missing_or_broken_is_refused(keep_step, make_run, tmp_path):
    with pytest.raises(ConfigError, match="resume = /nowhere: there is no such directory"):
        choose(make_run(resume="/nowhere"), tmp_path, print)
    path = keep_step(1)
    (path / "state.json").unlink()
    for word in (str(path), f"changed:{path}"):
        with pytest.raises(ConfigError, match=r"state\.json is missing"):
            choose(make_run(resume=word), tmp_path, print)


def test_the_checkpoint_of_another_model_is_refused(keep_step, make_run):
    path = keep_step(1, model="somebody/else")
    with pytest.raises(ConfigError, match=r"was saved with model\.path somebody/else"):
        read_state(path, make_run())


def test_a_newer_format_is_refused_whatever_it_holds(keep_step, make_run, tmp_path):
    keep_step(1)
    manifest = keep_step(2) / MANIFEST
    for content in ({"files": {}}, json.loads(manifest.read_text()), {"files": [], "format": "later"}):
        manifest.write_text(json.dumps(content | {"format": FORMAT + 1}))
        with pytest.raises(ConfigError, match=f"format {FORMAT + 1}, this rlswitch reads up to {FORMAT}"):
            choose(make_run("ppo", trainer=LEARNING), tmp_path, print)


def test_a_checkpoint_that_does_not_fit_the_model_is_refused(keep_step, build):
    path = keep_step(1)
    with pytest.raises(ConfigError, match=r"does not fit the model \(missing \['lm_head.weight'\]"):
        restore(path, build("ppo", tie=False))


def test_checkpoints_are_due_every_so_many_steps_and_at_the_end():
    every = CheckpointConfig(every=4)
    assert [step for step in range(1, 11) if is_due(every, step, 10)] == [4, 8, 10]
    last_only = CheckpointConfig(every=0)
    assert [step for step in range(1, 11) if is_due(last_only, step, 10)] == [10]


# -- rejected checkpoints and finished runs ----------------------------------------------------


def test_a_checkpoint_of_an_algorithm_with_a_critic_is_refused_by_one_without(keep_step, make_run):
    path = keep_step(1)  # of ppo
    read_state(path, make_run("ppo", trainer=LEARNING))
    with pytest.raises(ConfigError, match="by an algorithm with a critic"):
        read_state(path, make_run("grpo"))


def test_a_run_is_finished_when_its_newest_valid_checkpoint_reaches_num_steps(keep_step, make_run, tmp_path):
    run = make_run("ppo", trainer=LEARNING)
    run.output_dir, run.resume, run.num_steps = str(tmp_path), "auto", 3
    keep_step(2)
    assert finished(run) is None
    keep_step(5)
    assert "has step 5 of 3" in finished(run)
    run.resume = "never"
    assert finished(run) is None
