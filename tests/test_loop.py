"""The loop on a fake backend: its order, and where it can be stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import BUILD, FRESH, FakeBackend, build_session

from rlswitch import loop, session
from rlswitch.checkpoint.resume import LoopState
from rlswitch.errors import Preempted, RLSwitchError
from rlswitch.processes.signals import preemptible

pytestmark = pytest.mark.processes  # reward workers

PUSH = ["wake weights", "reload", "fingerprint", "wake kv_cache", "reset", "count cached", "score"]


@pytest.fixture
def train(make_run, make_trainer, tiny_model, monkeypatch) -> Callable[..., Path]:
    """train(backend, num_steps=2, ...): a run over this backend; its directory."""

    def run_loop(backend: FakeBackend, start=FRESH, **settings) -> Path:
        run = make_run(data={"eval_rows": 2}, **settings)
        trainer, tokenizer = make_trainer(run), tiny_model().tokenizer

        def build(_run, _inputs, stop_signals, stack):
            session = build_session(run, backend, trainer, tokenizer, stop_signals, stack, start)
            backend.log.clear()
            return session

        monkeypatch.setattr(BUILD, build)
        with preemptible() as stop_signals:
            loop.train(run, None, stop_signals)
        return Path(run.output_dir)

    return run_loop


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_state(output_dir: Path) -> dict:
    """The weights in the only checkpoint."""
    (state,) = (output_dir / "checkpoints").glob("step_*/state.json")
    return json.loads(state.read_text())


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_every_step_pushes_proves_samples_and_learns_and_an_evaluation_shares_the_next_ones_push(train):
    backend = FakeBackend()
    out = train(backend, num_steps=3, evaluation={"every": 2, "num_samples": 1}, checkpoint={"every": 0})
    again = [*PUSH, "reset"]  # drops prefixes that the last proof may have cached
    assert backend.log == [
        *(*PUSH, "generate", "reset"),  # evaluation of version 0
        *("generate", "sleep 2"),
        *(*again, "generate", "sleep 2"),
        *(*again, "generate", "reset"),  # evaluation of version 2
        *("generate", "sleep 2"),
        *(*again, "generate", "reset"),
    ]
    sleeps = [(it["from"], it["to"]) for it in records(out / "switch.jsonl") if it["phase"] == "sleep"]
    assert sleeps[1:] == [("rollout engine", "trainer")] * 3, "the trainer has the device to itself"
    metrics = records(out / "metrics.jsonl")
    assert [(it["step"], it["training/policy_version"]) for it in metrics] == [(0, 0), (1, 0), (2, 1), (3, 2)]
    assert all(it["switch/verified"] == 1 for it in metrics)
    assert [it["step"] for it in metrics if "val/addition/acc" in it] == [0, 2, 3]
    rollouts = records(out / "rollouts.jsonl")
    assert len(rollouts) == 3 * 2 * 3 and all(it["policy_version"] == it["step"] - 1 for it in rollouts)
    assert (out / "report.html").is_file()


def test_a_signal_during_rollouts_gives_them_up_and_keeps_the_step_before(train, tmp_path):
    backend = FakeBackend()
    backend.during["generate"] = lambda: backend.log.count("generate") == 2 and stop()
    settings = {"evaluation": {"every": 0}, "checkpoint": {"every": 0}}
    with pytest.raises(Preempted, match="in step 2, whose rollouts are discarded; checkpoint of step 1"):
        train(backend, num_steps=9, **settings)
    state = saved_state(tmp_path / "run")
    assert (state["step"], state["cursor"]) == (1, 2)  # two prompts a step
    assert [it["step"] for it in records(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert backend.log[-1] == "generate", "the engine is not touched any more"


def test_a_signal_during_a_save_lets_it_finish_and_there_is_no_second_one(train, tmp_path, monkeypatch):
    whole, saved = session.checkpoint.save, []

    def save(directory, trainer, *args):
        stop()
        whole(directory, trainer, *args)
        saved.append(trainer.version)

    monkeypatch.setattr(session.checkpoint, "save", save)
    with pytest.raises(Preempted, match="stopped by SIGTERM after step 2, checkpoint saved"):
        train(FakeBackend(), num_steps=9, checkpoint={"every": 2}, evaluation={"every": 0})
    assert saved == [2] and saved_state(tmp_path / "run")["step"] == 2


def test_a_run_with_nothing_more_to_learn_is_saved_before_it_ends(train, tmp_path):
    """The backend's answers, and so all rewards, are equal: no step has a gradient."""
    almost = FRESH._replace(state=LoopState(flat_in_a_row=48))
    with pytest.raises(RLSwitchError, match=r"gradient was 0 .* 50 steps.*; checkpoint of step 2 saved"):
        train(FakeBackend(), almost, num_steps=9, checkpoint={"every": 0}, evaluation={"every": 0})
    assert saved_state(tmp_path / "run")["flat_in_a_row"] == 50
