"""Policy, judge or reward model, and trainer on one device: the recipes as a user runs them, on tiny models.

Their outputs are meaningless, but must equal those of transformers on the same text.
"""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path

import pytest
import torch
from rlswitch.recipes.addition.task import build_tokenizer
from samples import greedy, save_classifier

pytestmark = pytest.mark.engine

SMALL = (
    *("num_steps=2", "rollout.num_prompts=8", "rollout.group_size=2", "data.eval_rows=16"),
    *("evaluation.every=2", "evaluation.num_samples=1"),
)
ENGINE, TRAINER = "rollout engine", "trainer"


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def hand_overs(rows: list[dict]) -> list[tuple[str, str]]:
    return [way for way, _ in groupby((row["from"], row["to"]) for row in rows)]


def phases(rows: list[dict], way: tuple[str, str]) -> list[str]:
    return [row["phase"] for row in rows if (row["from"], row["to"]) == way]


def check_records(out: Path, reward: str) -> list[dict]:
    """Checks the files of a run with a reward model or judge; returns its rollouts."""
    steps = records(out / "metrics.jsonl")
    assert [step["step"] for step in steps] == [0, 1, 2]
    for step in steps[1:]:
        assert step["switch/verified"] == 1 and step[f"reward/{reward}/error_rate"] == 0
        assert step["reward/mean"] == pytest.approx(step[f"reward/{reward}/mean"])
        parts = [v for k, v in step.items() if k.startswith("timing_s/") and k != "timing_s/step"]
        assert step["timing_s/reward"] > 0 and sum(parts) <= step["timing_s/step"]
    rollouts = records(out / "rollouts.jsonl")
    assert all(row["rewards"].keys() == {reward, "exact_match"} for row in rollouts)
    assert len({(row["prompt"], row["completion"]) for row in rollouts}) > len(rollouts) / 2
    return rollouts


@pytest.fixture
def judged(tiny_model) -> list[str]:
    """recipe=judge with an untrained judge; any digit counts as a verdict."""
    policy, judge = tiny_model(tie=True), tiny_model(tie=False)
    models = [f"model.path={policy.path}", f"judge.path={judge.path}"]
    reply = [r"judge.pattern='(\d)'", "judge.scale=9", "judge.max_new_tokens=16", "judge.retries=30"]
    return ["recipe=judge", *models, *reply]


def test_the_judge_takes_its_turn_and_the_engine_can_come_back_in_the_middle_of_a_step(
    run_train, judged, tiny_model, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_train(*judged, *SMALL, "algorithm=dapo", "judge.level=2", f"output_dir={out}")
    rollouts = check_records(out, "judge")
    rows = [row for row in records(out / "switch.jsonl") if row["step"] == 2]
    ways = hand_overs(rows)
    assert ways[:2] == [(TRAINER, ENGINE), (ENGINE, "judge")]
    assert ways[-2:] == [("judge", TRAINER), (TRAINER, ENGINE)]  # the last one to evaluate
    # dynamic sampling: the second round samples from the same version, proven again
    back = phases(rows, ("judge", ENGINE))
    assert back[:5] == ["sleep", "wake_weights", "reload", "verify", "wake_kv_cache"]
    wakes = phases(rows, (ENGINE, "judge"))
    assert wakes[:5] == back[:5]
    assert phases(rows, ("judge", TRAINER)) == ["sleep", "onload"]
    for row in rollouts:
        digits = re.findall(r"\d", row["extra"]["judge"])
        assert row["rewards"]["judge"] == pytest.approx(int(digits[-1]) / 9)
    for row in rollouts[::4]:
        reply = greedy(tiny_model(tie=False), f"{row['completion']}={row['prompt']}", 16)
        assert reply == row["extra"]["judge"] or not re.search(r"\d", reply)  # else retried


def test_the_reward_model_takes_its_turn(run_train, tiny_model, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # With a tokenizer other than the policy's, it reads the text, which the records contain.
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = save_classifier(tmp_path / "classifier", template=template)
    models = [f"model.path={tiny_model().path}", f"reward_model.path={tmp_path / 'classifier'}"]
    run_train("recipe=reward_model", *models, *SMALL, "reward_model.level=2", f"output_dir={out}")
    rollouts = check_records(out, "reward_model")
    rows, tenant = [row for row in records(out / "switch.jsonl") if row["step"] == 2], "reward model"
    assert hand_overs(rows) == [(TRAINER, ENGINE), (ENGINE, tenant), (tenant, TRAINER), (TRAINER, ENGINE)]
    assert phases(rows, (ENGINE, tenant)) == ["sleep", "reload", "verify"]
    assert phases(rows, (tenant, TRAINER)) == ["offload", "onload"]
    tokenizer = build_tokenizer()
    for row in rollouts:
        text = row["prompt"] + row["completion"]
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert row["rewards"]["reward_model"] == pytest.approx(float(model(tokens).logits), abs=1e-4)


def test_mode_rewards_asks_the_models_too(run_train, judged, tmp_path: Path) -> None:
    printed = run_train(*judged, "mode=rewards", cwd=tmp_path).stdout
    lines = [line.split() for line in printed.splitlines()]
    assert [line for line in lines if line[:5] == ["judge", "gold", "answers", "64", "0"]]
    assert [line for line in lines if line[:5] == ["judge", "the", "model's", "8", "0"]]
    assert not list(tmp_path.iterdir())
