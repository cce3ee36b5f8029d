"""Whether a run may resume from a checkpoint: only exactly, unless the user allows a difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlswitch.checkpoint.atomic import written_atomically
from rlswitch.checkpoint.resume import (
    FREE,
    OPEN,
    LoopState,
    Resume,
    Start,
    changes,
    choose,
    deciding,
    finished,
    give_up,
)
from rlswitch.config.sections import EngineConfig, ServerEngineConfig
from rlswitch.errors import ConfigError
from rlswitch.run import Run, settings_of
from rlswitch.session import Session


@pytest.fixture
def kept(tmp_path: Path) -> Callable[..., Path]:
    """kept(run, step=7, directory=...): a checkpoint of that run, without tensors."""

    def make(run: Run, step: int = 7, directory: Path = tmp_path) -> Path:
        path = directory / "checkpoints" / f"step_{step:06d}"
        with written_atomically(path) as draft:
            state = {"step": step, "cursor": 2 * step, "wandb_id": "abc", "model": run.model.path}
            settings = json.loads(json.dumps(deciding(run)))
            (draft / "state.json").write_text(json.dumps(state | {"settings": settings}))
        return path

    return make


def refused(run: Run, directory: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        choose(run, directory, pytest.fail)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "never", "path", "allows_changes"),
    [
        ("never", True, None, False),
        ("auto", False, None, False),
        ("changed", False, None, True),
        ("a/step_000001", False, Path("a/step_000001"), False),
        ("C:/a", False, Path("C:/a"), False),
        ("changed:a/step_000001", False, Path("a/step_000001"), True),
    ],
)
def test_the_five_words_of_resume(text: str, never: bool, path: Path | None, allows_changes: bool):
    assert Resume.parse(text) == (never, path, allows_changes)


def test_the_same_settings_go_on(kept, make_run, tmp_path):
    path = kept(make_run())
    state = LoopState(step=7, cursor=14, wandb_id="abc", model=make_run().model.path)
    assert choose(make_run(), tmp_path, pytest.fail) == Start(path, state, kept=7, given_up=[])


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
    assert said == ["seed = 9: was 0 when step_000007 was saved; continuing with 9"]


def test_a_finished_run_is_said_to_be_complete_only_as_the_run_that_it_was(kept, make_run, tmp_path):
    kept(make_run(num_steps=7))
    where = {"num_steps": 7, "output_dir": str(tmp_path)}
    assert "run is complete" in finished(make_run(**where))
    with pytest.raises(ConfigError, match=r"^seed = 9: was 0 when step_000007"):
        finished(make_run(seed=9, **where))
    with pytest.raises(ConfigError, match=r"was saved with model\.path"):
        finished(make_run(tie=False, **where))
    assert "run is complete" in finished(make_run(seed=9, resume="changed", **where))
    for word in ("never", str(tmp_path / "checkpoints" / "step_000001")):
        assert finished(make_run(seed=9, resume=word, **where)) is None


def test_who_goes_back_gives_up_what_came_later(kept, make_run, tmp_path):
    run = make_run()
    first, second, third = (kept(run, step) for step in (1, 2, 3))
    run.resume = "auto"
    assert choose(run, tmp_path, pytest.fail).given_up == []
    run.resume = str(first)
    begin = choose(run, tmp_path, pytest.fail)
    assert (begin.path, begin.kept, begin.given_up) == (first, 1, [second, third])
    run.resume = "never"
    begin = choose(run, tmp_path, pytest.fail)
    assert (begin.path, begin.kept, begin.given_up) == (None, 0, [first, second, third])


def test_giving_up_that_is_broken_off_leaves_the_run_cut_back(kept, make_run, tmp_path, monkeypatch):
    run = make_run()
    paths = [kept(run, step) for step in (1, 2, 3)]
    monkeypatch.setattr("rlswitch.checkpoint.resume.remove", lambda path: pytest.exit("killed"))
    with pytest.raises(pytest.exit.Exception):
        give_up(paths)
    monkeypatch.undo()
    assert choose(run, tmp_path, pytest.fail).path == paths[1]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["step_000001", "step_000002"]
    give_up(paths[:2])
    assert choose(run, tmp_path, pytest.fail) == Start(None, LoopState(), kept=0, given_up=[])
    assert list(paths[0].parent.iterdir()) == []


def test_a_branch_of_another_run_is_a_run_of_its_own(kept, make_run, tmp_path):
    path = kept(make_run(), 7, tmp_path / "a")
    run = make_run(resume=str(path))
    begin = choose(run, tmp_path / "b", pytest.fail)
    assert (begin.path, begin.state.step, begin.kept) == (path, 7, 0)
    assert begin.state.wandb_id is None
    kept(make_run(), 2, tmp_path / "b")
    assert refused(run, tmp_path / "b") == [
        f"resume = {path}: {tmp_path / 'b'} has other checkpoints, which would be lost; set resume=auto to"
        " resume from step_000002, or another output_dir"
    ]


@pytest.mark.parametrize("word", ["auto", "changed", "never", "a/step_000001", "changed:a/step_000001"])
def test_what_a_stopped_run_advises_goes_on_from_what_it_has_saved(kept, make_run, tmp_path, word: str):
    path = kept(make_run())
    advise = Session.how_to_resume.fget
    advice = advise(SimpleNamespace(run=make_run(resume=word), has_saved=True))
    resume = advice.partition("resume=")[2] or word
    assert choose(make_run(resume=resume), tmp_path, pytest.fail).path == path
    nothing_saved = advise(SimpleNamespace(run=make_run(resume=word), has_saved=False))
    assert nothing_saved == "run the same command again"


def test_a_checkpoint_that_is_a_link_can_be_given_up(kept, make_run, tmp_path):
    path = kept(make_run(), directory=tmp_path / "elsewhere")
    link = tmp_path / "run" / "checkpoints" / path.name
    link.parent.mkdir(parents=True)
    link.symlink_to(path)
    give_up([link])
    assert path.is_dir() and not list(link.parent.iterdir())


def test_whether_there_are_evaluations_decides_where_their_rows_are_cut_off(make_run):
    rows = {"path": "rows.jsonl"}
    saved = deciding(make_run(data=rows, evaluation={"every": 25}))
    assert changes(saved, make_run(data=rows, evaluation={"every": 5})) == []
    without = make_run(data=rows, evaluation={"every": 0})
    assert changes(saved, without) == [("evaluation.every", "25", "0")]
    apart = {"path": "rows.jsonl", "eval_path": "others.jsonl"}
    saved = deciding(make_run(data=apart, evaluation={"every": 25}))
    assert changes(saved, make_run(data=apart, evaluation={"every": 0})) == []


def test_another_model_is_refused_even_when_changes_are_allowed(kept, make_run, tmp_path):
    kept(make_run())
    run = make_run(tie=False, resume="changed")
    with pytest.raises(ConfigError, match=r"was saved with model\.path"):
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
    del saved["trainer.adam_beta1"]  # as if a later version had added it
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
