"""The whole loop as a user runs it, on the real vLLM: small but complete."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from runs import start, train
from transformers import AutoModelForCausalLM

from rlswitch.checkpoint.run_directory import only_run_in

pytestmark = pytest.mark.engine

GROUPS = (
    "reward/mean reward/std reward/exact_match/mean reward/frac_zero_std reward/error_rate"
    " actor/pg_loss actor/clip_ratio actor/clip_ratio_low actor/clip_ratio_high actor/ppo_kl"
    " actor/entropy actor/grad_norm actor/lr actor/ratio_mean"
    " response_length/mean response_length/max response_length/min response_length/clip_ratio"
    " prompt_length/mean prompt_length/max"
    " mismatch/logp_abs_diff_mean mismatch/logp_abs_diff_max mismatch/kl mismatch/is_mean"
    " mismatch/is_max mismatch/is_ess"
    " switch/offload_s switch/publish_s switch/wake_weights_s switch/reload_s switch/verify_s"
    " switch/wake_kv_cache_s switch/reset_prefix_cache_s switch/sleep_s switch/onload_s"
    " switch/total_s switch/share switch/bytes switch/verified"
    " timing_s/rollout timing_s/reward timing_s/prepare timing_s/update timing_s/switch"
    " timing_s/evaluation timing_s/checkpoint timing_s/step"
    " perf/rollout_tokens_per_s perf/train_tokens_per_s perf/samples_per_s perf/max_device_gib"
    " perf/host_rss_gib training/global_step training/policy_version training/epoch"
).split()
STEPS = 6
PPO = (
    *("recipe=ppo", f"num_steps={STEPS}", "trainer.warmup_steps=3", "rollout.num_prompts=32"),
    *("data.eval_rows=128", f"evaluation.every={STEPS}"),
)
CRITIC = "critic/vf_loss critic/vf_clip_ratio critic/explained_var critic/values_mean".split()
SMALL = ("rollout.num_prompts=16", "evaluation.every=2", "evaluation.num_samples=2", "data.eval_rows=64")


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(record: dict) -> dict:
    """A record without fields that differ between identical runs."""
    clocks = ("timing_s/", "perf/", "switch/")
    return {key: value for key, value in record.items() if not key.startswith(clocks)}


@pytest.fixture(scope="module")
def ppo_run(run_train, tmp_path_factory) -> tuple[Path, str]:
    """A short recipe=ppo: its directory and what it printed."""
    out = tmp_path_factory.mktemp("ppo") / "run"
    return out, run_train(*PPO, f"output_dir={out}").stdout


def test_ppo_learns(ppo_run) -> None:
    out, printed = ppo_run
    steps = records(out / "metrics.jsonl")
    first, last = steps[0]["val/addition/acc"], steps[-1]["val/addition/acc"]
    # The first accuracy and the gain depend on the seed and on how the CPU rounds.
    assert 0.2 <= first <= 0.5 and last >= first + 0.15
    assert steps[-1]["val/addition/pass@4"] >= last
    assert f"step {STEPS}/{STEPS}" in printed and "proven" in printed


def test_every_step_is_written_down_and_proven(ppo_run) -> None:
    out, _ = ppo_run
    steps = records(out / "metrics.jsonl")
    assert [record["step"] for record in steps] == list(range(STEPS + 1))
    for record in steps[1:]:
        missing = [name for name in (*GROUPS, *CRITIC, "actor/kl_ref") if name not in record]
        assert not missing
        assert record["switch/verified"] == 1
        assert record["mismatch/logp_abs_diff_max"] <= 1e-3
    rollouts = records(out / "rollouts.jsonl")
    assert len(rollouts) == STEPS * 256
    assert all(row["policy_version"] == row["step"] - 1 for row in rollouts)
    assert json.loads((out / "trace.json").read_text().rstrip().rstrip(",") + "]")
    assert (out / "config.yaml").is_file() and (out / "report.html").is_file()


def test_the_engines_memory_falls_on_every_sleep_and_comes_back(ppo_run) -> None:
    out, _ = ppo_run
    phases = records(out / "switch.jsonl")
    kv_cache, weights = 0.25 * 2**30, 6e6
    sleeps = [row for row in phases if row["phase"] == "sleep"]
    assert len(sleeps) >= STEPS
    for row in sleeps:
        assert row["resident_before"] - row["resident_after"] >= 0.9 * (kv_cache + weights)
    for row in phases:
        if row["phase"] == "wake_kv_cache":
            assert row["resident_after"] - row["resident_before"] >= 0.9 * kv_cache


def test_a_checkpoint_is_safe_to_load_anywhere(ppo_run) -> None:
    saved = ppo_run[0] / "checkpoints" / f"step_{STEPS:06d}"
    AutoModelForCausalLM.from_pretrained(saved / "policy")
    kinds = {file.suffix for file in saved.rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".jinja"}


def test_a_finished_run_says_so_and_changes_nothing(ppo_run, run_train) -> None:
    out, _ = ppo_run
    before = (out / "metrics.jsonl").read_bytes()
    again = run_train(*PPO, f"output_dir={out}")
    assert "complete" in again.stdout and "num_steps" in again.stdout
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_run_goes_on_neither_as_another_one_nor_beside_another(ppo_run, run_train) -> None:
    out, _ = ppo_run
    before = (out / "metrics.jsonl").read_bytes()
    words = (*(it.replace(f"num_steps={STEPS}", f"num_steps={STEPS + 1}") for it in PPO), f"output_dir={out}")
    changed = run_train(*words, "trainer.lr=0.5", "rollout.group_size=4", check=False)
    lines = [line for line in changed.stderr.splitlines() if line.startswith("rlswitch: error: ")]
    assert changed.returncode == 2 and len(lines) == 2, changed.stderr
    assert f"rollout.group_size = 4: was 8 when step_{STEPS:06d} was saved" in changed.stderr
    with only_run_in(out, print):
        second = run_train(*words, check=False)
    assert second.returncode == 2
    assert f"a run with pid {os.getpid()} on host" in second.stderr
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_run_cut_off_after_a_checkpoint_ends_like_an_uninterrupted_one(run_train, tmp_path: Path) -> None:
    out, kept = tmp_path / "run", tmp_path / "straight"
    words = ("recipe=grpo", *SMALL, "checkpoint.every=2", "num_steps=4", f"output_dir={out}")
    run_train(*words)
    shutil.copytree(out, kept)
    shutil.rmtree(out / "checkpoints" / "step_000004")  # as if killed before this save
    assert "at step 2" in run_train(*words).stdout
    ours, theirs = (records(path / "metrics.jsonl") for path in (out, kept))
    assert [timeless(record) for record in ours] == [timeless(record) for record in theirs]
    policy = "checkpoints/step_000004/policy/model.safetensors"
    assert (out / policy).read_bytes() == (kept / policy).read_bytes()
    assert (out / "rollouts.jsonl").read_bytes() == (kept / "rollouts.jsonl").read_bytes()


def test_both_engines_make_the_same_run(run_train, tiny_model, tmp_path: Path) -> None:
    reward = tmp_path / "variety.py"
    reward.write_text(
        "def variety(prompts, completions, **_):\n    return [len(set(c)) for c in completions]\n"
    )
    words = (
        *("recipe=grpo", f"model.path={tiny_model().path}", "data.max_prompt_tokens=8", "data.eval_rows=16"),
        *("rollout.num_prompts=8", "rollout.group_size=8", "rollout.max_new_tokens=12", "trainer.lr=1e-3"),
        *(f"reward.functions=[{reward}:variety]", "num_steps=3", "evaluation.every=3"),
    )
    for engine in ("local", "server"):
        run_train(*words, f"engine={engine}", f"output_dir={tmp_path / engine}")
    ours, theirs = (records(tmp_path / engine / "metrics.jsonl") for engine in ("local", "server"))
    assert len(ours) == 4 and all(record["switch/verified"] == 1 for record in theirs)
    assert ours[-1]["actor/grad_norm"] > 0
    assert [timeless(record) for record in theirs] == [timeless(record) for record in ours]
    rollouts = [(tmp_path / engine / "rollouts.jsonl").read_bytes() for engine in ("local", "server")]
    assert rollouts[0] == rollouts[1]


def test_a_push_that_cannot_be_proven_stops_the_run_with_exit_3(run_train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("recipe=grpo", *SMALL, "num_steps=1", "switch.canary_tolerance=1e-12")
    finished = run_train(*words, f"output_dir={out}", check=False)
    assert finished.returncode == 3
    errors = [line for line in finished.stderr.splitlines() if line.startswith("rlswitch: error:")]
    assert len(errors) == 1 and "canary" in errors[0] and "limit 1e-12" in errors[0]
    assert "Traceback" not in finished.stderr


def test_a_signal_stops_the_run_after_a_step_with_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["recipe=grpo", *SMALL, "evaluation.every=0", "num_steps=500", f"output_dir={out}", "logger=[]"]
    reader, writer = os.pipe()
    with open(reader) as lines, open(tmp_path / "stderr", "w+") as errors:
        process = start(train, words, tmp_path, (writer, errors.fileno()))
        os.close(writer)
        for line in lines:
            if line.startswith("step ") and "/500" in line:
                os.kill(process.pid, signal.SIGTERM)
                break
        lines.read()  # to the end
        process.join(120)
        errors.seek(0)
        said = errors.read()
    assert process.exitcode == 75, said
    # In a finished step, or during the next step's rollouts.
    assert re.search(r"stopped by SIGTERM .* checkpoint (of step \d+ )?saved", said)
    steps = records(out / "metrics.jsonl")
    saved = out / "checkpoints" / f"step_{steps[-1]['step']:06d}"
    assert saved.is_dir() and steps[-1]["step"] < 500


def test_adapters_are_pushed_merged_and_proven(run_train, tmp_path: Path) -> None:
    """Also with packing, a KL to the base model, a mismatch correction and one update per step."""
    out = tmp_path / "run"
    words = [
        *("recipe=grpo", *SMALL, "num_steps=2", "evaluation.every=0", f"output_dir={out}"),
        *("model.lora_rank=8", "checkpoint.merged=true", "trainer.packing=true", "trainer.minibatches=1"),
        *("trainer.warmup_steps=0", "trainer.lr=3e-3", "algorithm.kl_coef=0.01", "algorithm.kl_target=0.05"),
        "algorithm.mismatch_correction=tis",
    ]
    printed = run_train(*words).stdout
    assert "not recomputed" in printed
    first, second = records(out / "metrics.jsonl")
    for record in (first, second):
        assert record["switch/verified"] == 1
        assert 0 < record["mismatch/logp_abs_diff_max"] <= 1e-3
        assert record["mismatch/weight_mean"] == pytest.approx(1, abs=1e-3)
        assert record["actor/ratio_mean"] == 1
    # adapters start as the base model: only the second step's rollouts use other weights
    assert first["actor/kl_ref"] == pytest.approx(0, abs=1e-9)
    assert second["actor/kl_ref"] > 1e-6
    saved = out / "checkpoints" / "step_000002"
    adapted, merged = (AutoModelForCausalLM.from_pretrained(saved / name) for name in ("policy", "merged"))
    tokens = torch.tensor([[13, 1, 2, 10, 3, 4, 11]])
    logits = [model(input_ids=tokens).logits for model in (adapted, merged)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_mode_rewards_scores_gold_answers_and_samples_and_leaves_nothing(run_train, tmp_path) -> None:
    printed = run_train("recipe=ppo", "mode=rewards", cwd=tmp_path).stdout
    lines = [line.split() for line in printed.splitlines()]
    assert ["exact_match", "gold", "answers", "64", "0", "1.000", "1.000", "1.000"] in lines
    assert [line for line in lines if line[:5] == ["exact_match", "the", "model's", "8", "0"]]
    assert not list(tmp_path.iterdir())
