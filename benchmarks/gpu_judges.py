"""The verdicts of gpu_check.py: each stage's limits, and pure functions of the files it wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .gpu_findings import (
    Findings,
    Limit,
    Limits,
    Outputs,
    Verdict,
    largest,
    middle,
    rows,
    smallest,
)

GIB, MIB = 2**30, 2**20

EXACT_ON_CPU = 1e-4
"""Log-probability differences in float32, as switch.canary_tolerance. GPU runs use bfloat16."""

FORK: Limits = {"exit_code": Limit("<=", 0, 0), "sum_error": Limit("<=", 0, 0)}
TURNS: Limits = {
    "hand_overs": Limit(">=", 6, 6),
    "hand_over_s_max": Limit("<=", 1, None),
    "canary_gap_max": Limit("<=", 0.02, EXACT_ON_CPU),
    "unproven_hand_overs": Limit("<=", 0, 0),
    "answers_that_changed": Limit("<=", 0, 0),
    "sleep_freed_bytes_min": Limit(">", 0, 0),
}
TRAINING: Limits = {
    "unproven_steps": Limit("<=", 0, 0),
    "engine_restarts": Limit("<=", 0, 0),
    "grad_norm_min": Limit(">", 0, 0),
    "offload_bytes_min": Limit(">", 0, None),
    "onload_bytes_min": Limit(">", 0, None),
    "asleep_drift_mib": Limit("<=", 256, 64),
}
PPO: Limits = TRAINING | {
    "canary_gap_max": Limit("<=", 0.1, EXACT_ON_CPU),
    "mismatch_mean_max": Limit("<=", 0.02, EXACT_ON_CPU),
    "reward_first": Limit(">=", 0.2, 0.2),
    "reward_change": Limit(">=", -0.1, -0.3),  # 512 samples a step, 64 on a CPU
}
DISK: Limits = TRAINING | {
    "canary_gap_max": Limit("<=", 2.0, EXACT_ON_CPU),  # a stale head gives 2 to 4
    "mismatch_mean_max": Limit("<=", 0.1, EXACT_ON_CPU),
    "sleep_freed_share": Limit(">=", 0.9, 0.7),
}
SHM: Limits = DISK | {
    "reload_gb_per_s": Limit(">=", 1.5, None),
    "offload_gb_per_s": Limit(">=", 10, None),  # pageable memory gives 3 to 6
    "onload_gb_per_s": Limit(">=", 10, None),
}
SERVER: Limits = {name: TRAINING[name] for name in ("unproven_steps", "engine_restarts")} | {
    "canary_gap_max": PPO["canary_gap_max"]
}
BENCH: Limits = {
    "answers_that_differ": Limit("<=", 0, 0),
    "modes_not_measured": Limit("<=", 0, 0),
    "wake_s_max": Limit("<=", 1, None),
}
CANARY: Limits = {"canary_gap_max": Limit("<=", 2.0, EXACT_ON_CPU), "runs": Limit(">=", 1, 1)}
SPEED: Limits = {"tokens_per_s": Limit(">=", 2000, None)}
MEMORY: Limits = {"share_of_device_max": Limit("<=", 0.98, None), "device_gib_max": Limit(">", 0, 0)}
TRL: Limits = {"trl_steps": Limit(">=", 3, 3), "our_steps": Limit(">=", 2, 2)}


Judge = Callable[[Outputs], Verdict]


def judge_machine(outputs: Outputs) -> Verdict:
    findings = Findings(outputs, {})
    findings.expect(bool(outputs.machine), "machine.json was not written")
    missing = outputs.machine.get("not_installed", ())
    findings.expect(not missing, f"not installed: {', '.join(missing)}")
    driver, mode = outputs.machine.get("driver"), outputs.machine.get("compute_mode", "")
    if outputs.kind == "cuda":
        findings.expect(bool(driver), "no driver version found")
        findings.expect(
            "Exclusive" not in mode,
            f"compute mode {mode}: trainer and engine are two processes",
        )
    else:  # the driver is too old or torch is a CPU build: the check would test no GPU
        findings.expect(not driver, f"driver {driver} is installed, but torch finds no GPU")
    return findings.verdict()


def judge_fork(outputs: Outputs) -> Verdict:
    """The fork server must neither initialise CUDA nor import code that patches torch for CPUs."""
    found, findings = outputs.document("fork.json"), Findings(outputs, FORK)
    figures = {name: found.get(name) for name in ("exit_code", "driver_status", "stream", "seconds")}
    total = found.get("sum")
    findings.add(**figures, sum_error=None if total is None else abs(total - 3.0))
    findings.expect(bool(found.get("imported")), "the forked process had not imported vLLM")
    if outputs.kind == "cuda":
        status, stream = found.get("driver_status"), found.get("stream")
        findings.expect(status == 3, f"cuDeviceGetCount = {status} in the child: CUDA is initialised (not 3)")
        findings.expect(stream == "Stream", f"torch.cuda.Stream is {stream}: the CPU worker patched torch")
    return findings.verdict()


def judge_models(outputs: Outputs) -> Verdict:
    findings, models = Findings(outputs, {}), outputs.document("models.json")
    findings.add(parameters=models.get("parameters"))
    findings.expect(bool(models), "models.json was not written")
    return findings.verdict()


def judge_turns(outputs: Outputs, levels: tuple[str, ...]) -> Verdict:
    """Two engines take turns: fast after the first visit, proven, always the same answer."""
    findings = Findings(outputs, TURNS)
    found = outputs.rows("turns.jsonl")
    for level in levels:
        turns = [row for row in found if row["level"] == level]
        findings.expect(len(turns) >= 6, f"level {level}: {len(turns)} of 6 hand-overs")
    visits: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in found:
        visits.setdefault((row["level"], row["engine"]), []).append(row)
    engines = {row["engine"] for row in found}
    answers = {engine: [row["answer"] for row in found if row["engine"] == engine] for engine in engines}
    sleeps = [
        row["bytes"]
        for level in levels
        for row in rows(outputs.directory / f"level-{level}" / "switch.jsonl")
        if row["phase"] == "sleep"
    ]
    findings.add(
        hand_overs=len(found),
        hand_over_s_first=largest(row["seconds"] for it in visits.values() for row in it[:1]),
        hand_over_s_max=largest(row["seconds"] for it in visits.values() for row in it[1:]),
        canary_gap_max=largest(row["canary_gap"] for row in found),
        unproven_hand_overs=sum(not row["proven"] for row in found),
        answers_that_changed=sum(answer != it[0] for it in answers.values() for answer in it),
        sleep_freed_bytes_min=smallest(sleeps),
        start_s=largest(row["start_seconds"] for row in found),
    )
    return findings.verdict()


def judge_training(
    outputs: Outputs, *, steps: int, limits: Limits, asleep_bytes: float | None = None
) -> Verdict:
    """A training run of `steps` steps whose sleeping engine freed most of `asleep_bytes`."""
    findings = Findings(outputs, limits)
    metrics, phases = outputs.rows("metrics.jsonl"), Phases(outputs.rows("switch.jsonl"))
    findings.expect(len(metrics) == steps, f"{len(metrics)} of {steps} steps")
    rewards = [row["reward/mean"] for row in metrics if row.get("reward/mean") is not None]
    freed = smallest(row["bytes"] for row in phases.of("sleep"))
    findings.add(
        steps=len(metrics),
        unproven_steps=sum(row.get("switch/verified") != 1 for row in metrics),
        engine_restarts=largest(row.get("switch/restarts") for row in metrics),
        canary_gap_first=metrics[0].get("switch/canary_gap") if metrics else None,
        canary_gap_max=largest(row.get("switch/canary_gap") for row in metrics),
        mismatch_mean_max=largest(row.get("mismatch/logp_abs_diff_mean") for row in metrics),
        grad_norm_min=smallest(row.get("actor/grad_norm") for row in metrics),
        reward_first=rewards[0] if rewards else None,
        reward_change=rewards[-1] - rewards[0] if rewards else None,
        step_s=middle(row.get("timing_s/step") for row in metrics[1:]),
        switch_s=middle(row.get("switch/total_s") for row in metrics[1:]),
        update_s=middle(row.get("timing_s/update") for row in metrics[1:]),
        tokens_per_s=middle(row.get("perf/rollout_tokens_per_s") for row in metrics[1:]),
        device_gib_max=largest(row.get("perf/max_device_gib") for row in metrics),
        sleep_freed_gib_min=freed / GIB if freed is not None else None,
        sleep_freed_share=freed / asleep_bytes if freed is not None and asleep_bytes else None,
        asleep_drift_mib=phases.drift(outputs.kind),
        asleep_held_gib=phases.held_asleep(outputs.machine.get("device_gib")),
        **phases.figures(),
    )
    return findings.verdict()


class Phases:
    """The phases of a run's hand-overs, without those of its start (step 0)."""

    def __init__(self, found: Iterable[dict[str, Any]]):
        self.rows = [row for row in found if row["step"] > 0]

    def of(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["phase"] == name]

    def figures(self) -> dict[str, float | None]:
        """Least bytes parked; median speed of phases that copy, median seconds of the others."""
        found: dict[str, float | None] = {}
        for name in ("offload", "onload"):
            found[f"{name}_bytes_min"] = smallest(row["bytes"] for row in self.of(name))
        for name in ("publish", "reload", "offload", "onload"):
            moved = [row["bytes"] / row["seconds"] / 1e9 for row in self.of(name) if row["bytes"]]
            found[f"{name}_gb_per_s"] = middle(moved)
        for name in ("wake_weights", "wake_kv_cache", "reset_prefix_cache", "sleep", "verify"):
            found[f"{name}_s"] = middle(row["seconds"] for row in self.of(name))
        return found

    def drift(self, kind: str) -> float | None:
        """MiB by which the memory held while the engine sleeps changed after step 1."""
        key = "device_free_after" if kind == "cuda" else "resident_after"
        held = [row[key] for row in self.of("sleep") if row["step"] > 1]
        if not held:
            return None
        moved = max(held) - min(held) if kind == "cuda" else held[-1] - held[0]
        return moved / MIB

    def held_asleep(self, device_gib: float | None) -> float | None:
        """GiB of GPU memory still held with everything asleep and parked."""
        least = smallest(row["device_free_after"] for row in self.of("sleep"))
        return device_gib - least / GIB if device_gib and least is not None else None


def judge_bench(outputs: Outputs) -> Verdict:
    """A short bench_switch.py: every mode measured, the same answer after every wake-up."""
    found, findings = outputs.document("switch.json"), Findings(outputs, BENCH)
    findings.expect(bool(found), "switch.json was not written")
    for row in found.get("summary", []):
        if row["what"] in ("wake", "verify", "load") and row["model"]:
            mode = row["mode"] or "start"
            findings.add(**{f"{row['what']}_s_{mode}_{row['model']}": row["median"]})
    missing = found.get("missing", {})
    findings.add(
        answers_that_differ=len(found["outputs"]["differing"]) if found else None,
        modes_not_measured=len(missing) if found else None,
        wake_s_max=largest(v for name, v in findings.figures.items() if name.startswith("wake_s_")),
    )
    for what, why in missing.items():
        findings.problems.append(f"{what}: {why}")
    return findings.verdict()


def judge_canary(outputs: Outputs) -> Verdict:
    """The canary gap of every run, as the basis for its tolerance."""
    findings, gaps, runs = Findings(outputs, CANARY), [], 0
    for file in sorted(outputs.directory.parent.glob("*/metrics.jsonl")):
        found = [
            {
                name: value
                for name, value in row.items()
                if name.startswith("switch/canary") and value is not None
            }
            for row in rows(file)
        ]
        runs += bool(found)
        gaps += [row["switch/canary_gap"] for row in found if "switch/canary_gap" in row]
        for name in found[0] if found else ():
            label = f"{file.parent.name}_{name.removeprefix('switch/')}"
            values = [row[name] for row in found if name in row]
            findings.add(**{f"{label}_first": values[0], f"{label}_max": max(values)})
    findings.add(runs=runs, canary_gap_max=largest(gaps))
    return findings.verdict()


def judge_speed(outputs: Outputs) -> Verdict:
    """Tokens per second of a step's requests, each with its own seed; the first step is a warm-up."""
    findings = Findings(outputs, SPEED)
    for file, metrics in pushes(outputs):
        speed = middle(row.get("perf/rollout_tokens_per_s") for row in metrics[1:])
        findings.add(**{f"{file.parent.name}_tokens_per_s": speed})
    findings.add(tokens_per_s=largest(findings.figures.values()))
    findings.expect(bool(findings.figures["tokens_per_s"]), "no push run has a second step")
    return findings.verdict()


def judge_memory(outputs: Outputs) -> Verdict:
    """Device memory after an update, before torch's allocator releases it."""
    findings, total = Findings(outputs, MEMORY), outputs.machine.get("device_gib")
    for file, metrics in pushes(outputs):
        peak = largest(row.get("perf/max_device_gib") for row in metrics)
        findings.add(**{f"{file.parent.name}_device_gib_max": peak})
    most = largest(findings.figures.values())
    share = most / total if most is not None and total else None
    findings.add(device_gib_max=most, share_of_device_max=share)
    return findings.verdict()


def judge_trl(outputs: Outputs) -> Verdict:
    """Seconds per step compared with TRL's for the same model and batch. Only recorded."""
    findings, theirs = Findings(outputs, TRL), outputs.rows("trl.jsonl")
    ours = rows(outputs.directory.parent / "push_shm" / "metrics.jsonl")
    ours = ours or rows(outputs.directory.parent / "push_disk" / "metrics.jsonl")
    seconds = middle(row["seconds"] for row in theirs[1:])
    own = middle(row.get("timing_s/step") for row in ours[1:])
    ratio = seconds / own if seconds and own else None
    findings.add(trl_steps=len(theirs), our_steps=len(ours), trl_step_s=seconds, our_step_s=own)
    findings.add(trl_over_ours=ratio)
    return findings.verdict()


def pushes(outputs: Outputs) -> list[tuple[Path, list[dict[str, Any]]]]:
    """The metrics of the runs that push the larger model."""
    files = sorted(outputs.directory.parent.glob("push_*/metrics.jsonl"))
    return [(file, rows(file)) for file in files]
