"""Whether a run may go on from a checkpoint: only as the run that it was, unless it is told otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlswitch.config import EngineConfig, Run, ServerEngineConfig, settings_of
from rlswitch.durable import written_whole
from rlswitch.exactness import FREE, OPEN, changes, deciding
from rlswitch.resume import LoopState, choose
from rlswitch.types import ConfigError


@pytest.fixture
def kept(tmp_path: Path) -> Callable[[Run], Path]:
    """kept(run): a checkpoint of that run at step 7, without tensors."""

    def make(run: Run) -> Path:
        with written_whole(tmp_path / "checkpoints" / "step_000007") as draft:
            state = {"step": 7, "cursor": 14, "wandb_id": None, "model": run.model.path}
            settings = json.loads(json.dumps(deciding(run)))
            (draft / "state.json").write_text(json.dumps(state | {"settings": settings}))
        return tmp_path / "checkpoints" / "step_000007"

    return make


def refused(run: Run, directory: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        choose(run, directory, pytest.fail)
    return caught.value.problems


def test_the_same_settings_go_on(kept, make_run, tmp_path):
    path = kept(make_run())
    assert choose(make_run(), tmp_path, pytest.fail) == (
        path,
        LoopState(step=7, cursor=14, model=make_run().model.path),
    )


def test_every_changed_setting_is_named_with_both_values_and_what_to_do(kept, make_run, tmp_path):
    kept(make_run(seed=1))
    run = make_run(
        seed=2, trainer={"lr": 0.5}, rollout={"temperature": 0.7}, reward={"functions": ["a", "b"]}
    )
    lines = refused(run, tmp_path)
    assert [line.partition(" when ")[0] for line in lines] == [
        "seed = 2: was 1",
        'reward.functions = ["a", "b"]: was ["exact_match"]',
        "rollout.temperature = 0.7: was 1.0",
        "trainer.lr = 0.5: was 1e-06",
    ]
    assert all("step_000007" in line and "resume=changed" in line for line in lines)
    assert "set seed=1, set another output_dir" in lines[0]


@pytest.mark.parametrize("by_path", [False, True])
def test_changes_that_are_allowed_are_said_and_not_refused(kept, make_run, tmp_path, by_path: bool):
    path = kept(make_run())
    run = make_run(seed=9, resume=str(path) if by_path else "auto")
    word = refused(run, tmp_path)[0].partition("resume=")[2].split()[0]
    run.resume = word
    said: list[str] = []
    assert choose(run, tmp_path, said.append)[0] == path
    assert said == ["seed = 9: was 0 when step_000007 was saved; goes on with 9"]


def test_another_model_is_refused_even_when_changes_are_allowed(kept, make_run, tmp_path):
    kept(make_run())
    run = make_run(tie=False, resume="changed")
    with pytest.raises(ConfigError, match=r"is of model\.path"):
        choose(run, tmp_path, print)


def test_what_decides_nothing_may_change(kept, make_run, tmp_path):
    kept(make_run())
    run = make_run(
        num_steps=1000,
        logger=["tensorboard"],
        checkpoint={"every": 1, "keep": 5},
        evaluation={"every": 3, "num_samples": 9},
        switch={"level": "1", "verify": "off"},
        reward={"workers": 3, "timeout_s": 1.0},
        engine=ServerEngineConfig(start_timeout_s=1.0, listen="127.0.0.1:0"),
        trainer={"park": "everything"},
    )
    assert choose(run, tmp_path, pytest.fail)[0] is not None


def test_arguments_of_vllm_count_when_they_are_new_other_or_gone(make_run):
    plain = make_run()
    given, other = (make_run(engine=EngineConfig(vllm={"max_num_seqs": n})) for n in (8, 9))
    assert changes(deciding(plain), given) == [("engine.vllm.max_num_seqs", "not set", "8")]
    assert changes(deciding(given), other) == [("engine.vllm.max_num_seqs", "8", "9")]
    assert changes(deciding(given), plain) == [("engine.vllm.max_num_seqs", "8", "not set")]


def test_another_algorithm_is_named_as_a_user_names_it(make_run):
    assert ("algorithm", "grpo", "rloo") in changes(deciding(make_run("grpo")), make_run("rloo"))


def test_a_setting_that_the_checkpoint_does_not_know_is_no_change(make_run):
    saved = deciding(make_run())
    del saved["trainer.adam_beta1"]  # as if a later version had brought it
    assert changes(saved, make_run()) == []


def test_no_secret_is_kept_with_a_checkpoint(make_run):
    run = make_run(engine=EngineConfig(vllm={"hf_token": "abcdef"}))
    assert "abcdef" not in json.dumps(deciding(run))


def test_what_may_change_is_a_setting_or_a_section_and_all_else_decides(make_run):
    settings = settings_of()
    free = {key for keys in FREE.values() for key in keys}
    assert not [key for key in free if not any(it == key or it.startswith(f"{key}.") for it in settings)]
    assert not [prefix for prefix in OPEN if prefix.removesuffix(".") not in settings]
    decides = deciding(make_run("ppo"))
    for key in (
        "seed",
        "trainer.lr",
        "rollout.group_size",
        "data.eval_rows",
        "algorithm.kl_coef",
        "model.dtype",
    ):
        assert key in decides
