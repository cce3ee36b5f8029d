"""scripts/soak.py: comparing the directories of two runs; no difference may pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rlswitch.benchmarks.soak import FAULT_LOG, SAMPLES, SLACK, Report, judge

LAST = "checkpoints/step_000002/policy/model.safetensors"


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., Report]:
    """judged(**changes): the report on two runs of two steps, with these changes to the second."""

    def make(reward=1.0, seconds=0.0, version=0, verified=1, tensors=b"w", shm=1.0) -> Report:
        for out, mine in ((tmp_path / "straight", False), (tmp_path / "disturbed", True)):
            metric = {
                "step": 1,
                "reward/mean": reward if mine else 1.0,
                "timing_s/step": seconds if mine else 0,
            }
            write(out / "metrics.jsonl", metric | {"switch/verified": verified if mine else 1})
            write(out / "rollouts.jsonl", {"step": 1, "policy_version": version if mine else 0})
            rows = ({"phase": "restart", "from": "", "to": "e"}, {"phase": "sleep", "from": "e", "to": "t"})
            write(out / "switch.jsonl", *({"step": 1} | row for row in rows))
            write(out / FAULT_LOG, {"step": 1, "fault": "run killed", "victims": 1})
            held = [dict.fromkeys(SLACK, 1.0) | {"step": n, "life": "1"} for n in range(6)]
            held[-1]["shm_mib"] = held[-2]["shm_mib"] = shm if mine else 1.0
            write(out / SAMPLES, *held)
            (out / LAST).parent.mkdir(parents=True, exist_ok=True)
            (out / LAST).write_bytes(tensors if mine else b"w")
        report = Report(seed=1, steps=2)
        judge(report, tmp_path / "straight", tmp_path / "disturbed", 2)
        return report

    return make


def test_runs_that_differ_in_time_only_are_the_same(judged) -> None:
    report = judged(seconds=9.0)
    assert report.failures == []
    assert (report.hand_overs, report.engine_restarts, report.faults) == (1, 1, {"run killed": 1})
    assert report.watched_steps == {"straight": 6, "disturbed": 6}


@pytest.mark.parametrize(
    ("change", "failures"),
    [
        ({"reward": 0.5}, ["metrics.jsonl differs"]),
        ({"tensors": b"v"}, [f"{LAST} differs"]),
        ({"version": 1}, ["rollouts.jsonl differs", "1 rollouts of a wrong version"]),
        ({"verified": 0}, ["1 steps not proven"]),
        ({"shm": 9.0}, ["shm_mib grew by 8, disturbed"]),
    ],
)
def test_whatever_else_differs_is_told(judged, change: dict, failures: list[str]) -> None:
    assert judged(**change).failures == failures
