"""Policy, judge or reward model, and trainer on one device: the recipes as a user runs them."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SMALL = (
    *("num_steps=2", "rollout.num_prompts=8", "data.eval_rows=64"),
    *("evaluation.every=2", "evaluation.num_samples=1"),
)
ENGINE, TRAINER = "rollout engine", "trainer"


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def hand_overs(rows: list[dict]) -> list[tuple[str, str]]:
    return [way for way, _ in groupby((row["from"], row["to"]) for row in rows)]


def phases(rows: list[dict], way: tuple[str, str]) -> list[str]:
    return [row["phase"] for row in rows if (row["from"], row["to"]) == way]


def check_records(out: Path, reward: str, middle: float) -> None:
    """What any run with a model among its rewards leaves behind."""
    steps = records(out / "metrics.jsonl")
    assert [step["step"] for step in steps] == [0, 1, 2]
    for step in steps[1:]:
        assert step["switch/verified"] == 1 and step[f"reward/{reward}/error_rate"] == 0
        assert step["reward/mean"] == pytest.approx(step[f"reward/{reward}/mean"])
        parts = [v for k, v in step.items() if k.startswith("timing_s/") and k != "timing_s/step"]
        assert step["timing_s/reward"] > 0 and sum(parts) <= step["timing_s/step"]
    rewards = [row["rewards"] for row in records(out / "rollouts.jsonl")]
    assert all(row.keys() == {reward, "exact_match"} for row in rewards)
    agreed = sum((row[reward] > middle) == (row["exact_match"] > 0.5) for row in rewards)
    assert agreed >= 0.8 * len(rewards)  # 16 problems, eight answers each


def test_the_judge_takes_its_turn_and_the_engine_can_come_back_in_the_middle_of_a_step(
    run_train, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_train("recipe=judge", *SMALL, "algorithm=dapo", "judge.level=2", f"output_dir={out}")
    check_records(out, "judge", middle=0.5)
    rows = [row for row in records(out / "switch.jsonl") if row["step"] == 2]
    ways = hand_overs(rows)
    assert ways[:2] == [(TRAINER, ENGINE), (ENGINE, "judge")]
    assert ways[-2:] == [("judge", TRAINER), (TRAINER, ENGINE)]  # the last one to evaluate
    # dynamic sampling: what a second round samples from is the version of the first, proven again
    back = phases(rows, ("judge", ENGINE))
    assert back[:5] == ["sleep", "wake_weights", "reload", "verify", "wake_kv_cache"]
    wakes = phases(rows, (ENGINE, "judge"))
    assert wakes[:5] == back[:5]
    assert phases(rows, ("judge", TRAINER)) == ["sleep", "onload"]
    replies = [row["extra"]["judge"] for row in records(out / "rollouts.jsonl")]
    assert all(reply[3] == "=" and reply[-1] in "01" for reply in replies)


def test_the_reward_model_takes_its_turn(run_train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_train("recipe=reward_model", *SMALL, "reward_model.level=2", f"output_dir={out}")
    check_records(out, "reward_model", middle=0.0)
    rows, tenant = [row for row in records(out / "switch.jsonl") if row["step"] == 2], "reward model"
    assert hand_overs(rows) == [(TRAINER, ENGINE), (ENGINE, tenant), (tenant, TRAINER), (TRAINER, ENGINE)]
    assert phases(rows, (ENGINE, tenant)) == ["sleep", "reload", "verify"]
    assert phases(rows, (tenant, TRAINER)) == ["offload", "onload"]


def test_mode_rewards_asks_the_models_too(run_train, tmp_path: Path) -> None:
    printed = run_train("recipe=judge", "mode=rewards", cwd=tmp_path).stdout
    lines = [line.split() for line in printed.splitlines()]
    assert [line for line in lines if line[:5] == ["judge", "gold", "answers", "64", "0"]]
    assert [line for line in lines if line[:5] == ["judge", "the", "model's", "8", "0"]]
    assert not list(tmp_path.iterdir())
