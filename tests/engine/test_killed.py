"""A run that is killed in every phase of its step ends as one that never was, to the last byte."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from runs import finish, train

from rlswitch.processes.exit import PREEMPTED
from rlswitch.switch.ledger import SWITCH_PHASES, WORK_PHASES, Ledger

pytestmark = pytest.mark.engine

DEATHS = {
    "rollout": (1, 0.03),
    "reward": (2, 0.002),
    "prepare": (3, 0.002),
    "update": (4, 0.02),
    "publish": (5, None),
    "wake_weights": (6, None),
    "reload": (8, 0.002),
    "verify": (8, None),
    "evaluation": (9, 0.01),
    "checkpoint": (10, 0.01),
    "sleep": (11, None),
    "wake_kv_cache": (12, None),
}
"""Phase: the step whose phase is not survived, and how many seconds into it; None: at its very end."""
TOLD_TO_STOP = "rollout", 7, 0.03


def killed(words: list[str]) -> None:
    """train.py, which gets a SIGKILL in the phase and the step that its first word names."""
    doomed = words[0]
    step, seconds = DEATHS[doomed]
    strike(doomed, step, seconds, signal.SIGKILL)
    train(words[1:])


def told_to_stop(words: list[str]) -> None:
    strike(*TOLD_TO_STOP, signal.SIGTERM)
    train(words)


def strike(doomed: str, step: int, seconds: float | None, number: signal.Signals) -> None:
    """This process gets the signal in its phase `doomed` of `step`, so many seconds into it or at its end."""

    def deadly(whole):
        @contextmanager
        def phase(self: Ledger, name: str, *args):
            here = name == doomed and self.step == step
            with whole(self, name, *args) as it:
                if here and seconds is not None:
                    threading.Timer(seconds, os.kill, [os.getpid(), number]).start()
                yield it
                if here and seconds is None:
                    os.kill(os.getpid(), number)

        return phase

    Ledger.phase, Ledger.work = deadly(Ledger.phase), deadly(Ledger.work)


def lasting(path: Path) -> list[dict]:
    """The records without what differs between two runs of the same program."""
    clocks = ("timing_s/", "perf/", "switch/")
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(clocks)}
        for line in path.read_text().splitlines()
    ]


def test_a_run_killed_in_every_phase_ends_like_one_that_never_was(tiny_model, tmp_path: Path) -> None:
    assert DEATHS.keys() <= {*SWITCH_PHASES, *WORK_PHASES}
    reward = tmp_path / "variety.py"
    reward.write_text(
        "def variety(prompts, completions, **_):\n    return [len(set(c)) for c in completions]\n"
    )
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+{n + 3}="}) + "\n" for n in range(10, 40)))
    words = [
        *("recipe=ppo", f"model.path={tiny_model().path}", "logger=[]", "num_steps=12", f"data={data}"),
        *("data.max_prompt_tokens=8", "data.eval_rows=8", f"reward.functions=[{reward}:variety]"),
        *("rollout.num_prompts=4", "rollout.group_size=4", "rollout.max_new_tokens=8"),
        *("trainer.lr=1e-3", "trainer.lr_schedule=linear", "trainer.minibatches=2", "trainer.epochs=2"),
        *("algorithm.kl_coef=0.05", "algorithm.kl_target=0.01", "engine.kv_cache_gib=0.03"),
        *("evaluation.every=3", "evaluation.num_samples=2", "checkpoint.every=2"),
    ]
    straight, out = tmp_path / "straight", tmp_path / "killed"
    finished = finish(train, [*words, f"output_dir={straight}"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    for phase in DEATHS:
        ended = finish(killed, [phase, *words, f"output_dir={out}"], tmp_path)
        assert ended.returncode == -signal.SIGKILL, f"{phase}: {ended.stdout}{ended.stderr}"
        if phase == "wake_weights":
            ended = finish(told_to_stop, [*words, f"output_dir={out}"], tmp_path)
            assert ended.returncode == PREEMPTED, ended.stderr
            assert "stopped by SIGTERM in step 7, whose rollouts are given up" in ended.stderr
    finished = finish(train, [*words, f"output_dir={out}"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "resumed from" in finished.stdout

    assert len(lasting(out / "metrics.jsonl")) == 13
    assert lasting(out / "metrics.jsonl") == lasting(straight / "metrics.jsonl")
    assert (out / "rollouts.jsonl").read_bytes() == (straight / "rollouts.jsonl").read_bytes()
    saved = "checkpoints/step_000012"
    tensors = [it.relative_to(straight) for it in sorted((straight / saved).rglob("*.safetensors"))]
    assert {it.name for it in tensors} >= {"model.safetensors", "critic.safetensors", "optimizer.safetensors"}
    for file in tensors:
        assert (out / file).read_bytes() == (straight / file).read_bytes(), file
    state = [json.loads((it / saved / "state.json").read_text()) for it in (out, straight)]
    assert state[0] == state[1]
    assert not [it for it in psutil.process_iter(["environ"]) if str(out) in str(it.info["environ"])]
