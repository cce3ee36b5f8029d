"""A run killed in every phase of a step ends like an undisturbed one, byte for byte."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from runs import Finished, finish, train

import rlswitch
from rlswitch.processes.exit import PREEMPTED
from rlswitch.switch.ledger import SWITCH_PHASES, WORK_PHASES, Ledger

pytestmark = pytest.mark.engine

DEATHS = {
    "rollout": 1,
    "reward": 2,
    "prepare": 3,
    "update": 4,
    "publish": 5,
    "wake_weights": 6,
    "reload": 8,
    "verify": 8,
    "evaluation": 9,
    "checkpoint": 10,
    "sleep": 11,
    "wake_kv_cache": 12,
}
"""By phase, the step in which it kills the run."""
AT_ITS_END = {"publish", "wake_weights", "verify", "sleep", "wake_kv_cache"}
"""Phases with the kill at their end; in the others it comes half-way."""
TOLD_TO_STOP = "rollout", 7
PACKAGE = str(Path(rlswitch.__file__).parent)


def counted(words: list[str]) -> None:
    """train.py that writes the number of calls in each phase of each step to the file words[0]."""
    calls: dict[str, int] = {}

    def inside(phase: str, call: int) -> None:
        calls[phase] = call

    watch_phases(inside, lambda phase: None)
    atexit.register(lambda: Path(words[0]).write_text(json.dumps(calls)))  # train does not return
    train(words[1:])


def struck(words: list[str]) -> None:
    """train.py that receives the signal words[0] at call words[2] of phase words[1], or at its end."""
    number, doomed, moment = int(words[0]), words[1], int(words[2])
    spared = [doomed]

    def inside(phase: str, call: int) -> None:
        if call == moment:
            at_end(phase)

    def at_end(phase: str) -> None:
        if phase in spared:
            spared.remove(phase)
            os.kill(os.getpid(), number)

    watch_phases(inside, at_end)
    train(words[3:])


def watch_phases(inside: Callable[[str, int], None], at_end: Callable[[str], None]) -> None:
    """`inside(phase, n)` at the n-th call of a function of rlswitch in a phase, `at_end(phase)` at its end.

    Counts calls, not seconds: the same program makes equally many on a busy machine.
    """

    def watched(whole):
        @contextmanager
        def phase(self: Ledger, name: str, *args):
            here, calls = f"{name} {self.step}", itertools.count(1)

            def profile(frame, event, _):
                if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
                    inside(here, next(calls))

            with whole(self, name, *args) as it:
                outer = sys.getprofile()
                sys.setprofile(profile)
                try:
                    yield it
                finally:
                    sys.setprofile(outer)
                at_end(here)

        return phase

    Ledger.phase, Ledger.work = watched(Ledger.phase), watched(Ledger.work)


def lasting(path: Path) -> list[dict]:
    """The records without fields that differ between identical runs."""
    clocks = ("timing_s/", "perf/", "switch/")
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(clocks)}
        for line in path.read_text().splitlines()
    ]


@pytest.mark.timeout(3600)  # fifteen runs in sequence
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
    straight, out, counts = tmp_path / "straight", tmp_path / "killed", tmp_path / "calls.json"
    finished = finish(counted, [counts, *words, f"output_dir={straight}"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    calls = json.loads(counts.read_text())

    def strike(number: signal.Signals, phase: str, step: int) -> Finished:
        here = f"{phase} {step}"
        moment = 0 if phase in AT_ITS_END else calls[here] // 2
        return finish(struck, [int(number), here, moment, *words, f"output_dir={out}"], tmp_path)

    for phase, step in DEATHS.items():
        ended = strike(signal.SIGKILL, phase, step)
        assert ended.returncode == -signal.SIGKILL, f"{phase}: {ended.stdout}{ended.stderr}"
        if phase == "wake_weights":
            ended = strike(signal.SIGTERM, *TOLD_TO_STOP)
            assert ended.returncode == PREEMPTED, ended.stderr
            assert "stopped by SIGTERM in step 7, whose rollouts are discarded" in ended.stderr
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
    left = [it for it in psutil.process_iter(["environ"]) if str(out) in str(it.info["environ"])]
    assert not psutil.wait_procs(left, timeout=60)[1]
