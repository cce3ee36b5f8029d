"""Metrics as a person reads them: plain strings, for the console and the report."""

from __future__ import annotations

from collections.abc import Mapping

from rlswitch.records.jsonl import Summary
from rlswitch.text import duration, printable


def policy_facts(metrics: Mapping[str, float]) -> list[str]:
    named = [
        ("version", "training/policy_version", "{:.0f}"),
        ("length", "response_length/mean", "{:.1f}"),
        ("kl ref", "actor/kl_ref", "{:.2g}"),
        ("kl", "actor/ppo_kl", "{:.2g}"),
        ("entropy", "actor/entropy", "{:.2f}"),
        ("grad", "actor/grad_norm", "{:.2g}"),
        ("lr", "actor/lr", "{:.1e}"),
    ]
    return [f"{name} {form.format(metrics[key])}" for name, key, form in named if key in metrics]


def speed_facts(metrics: Mapping[str, float]) -> list[str]:
    named = [
        ("perf/rollout_tokens_per_s", "rollout {:,.0f} tok/s"),
        ("perf/train_tokens_per_s", "train {:,.0f} tok/s"),
        ("perf/max_device_gib", "device {:.1f} GiB"),
        ("perf/host_rss_gib", "host {:.1f} GiB"),
    ]
    return [form.format(metrics[key]) for key, form in named if metrics.get(key)]


def step_facts(metrics: Mapping[str, float]) -> list[str]:
    """The key facts of a step for the plain line; a column only where there is a number."""
    facts = []
    named = [
        ("reward/mean", "reward {:.3f}"),
        ("response_length/mean", "len {:5.1f}"),
        ("actor/ppo_kl", "kl {:.1e}"),
        ("mismatch/logp_abs_diff_max", "mismatch {:.1e}"),
    ]
    facts += [form.format(metrics[key]) for key, form in named if key in metrics]
    if "switch/share" in metrics:
        proven = {True: " proven", False: ""}[metrics.get("switch/verified", 0) > 0]
        facts.append(f"switch {metrics['switch/share']:5.1%}{proven}")
    if "perf/rollout_tokens_per_s" in metrics:
        facts.append(f"{metrics['perf/rollout_tokens_per_s']:,.0f} tok/s")
    if "timing_s/step" in metrics:
        facts.append(f"{metrics['timing_s/step']:.1f} s")
    return facts + [f"{printable(key)} {value:.3f}" for key, value in accuracies(metrics)]


def summary_rows(summary: Summary, session_seconds: float) -> list[tuple[str, str]]:
    """Label and text of what a finished run comes to."""
    rows = [("steps", f"{summary.last_step}")]
    names = {"reward/mean": "reward"}
    for key in sorted(summary.last, key=lambda key: (key != "reward/mean", key)):
        if key in names or key.endswith("/acc"):
            change = f"{summary.first[key]:.3f} -> {summary.last[key]:.3f}"
            rows.append((names.get(key, "accuracy"), change + ("" if key in names else f"  {key}")))
    wall = f"{duration(session_seconds)} this session"
    if summary.wall_seconds > 0:
        wall = f"{duration(summary.wall_seconds)} in steps, {wall}"
    rows.append(("wall time", wall))
    shares = [(part, share) for part, share in summary.shares().items() if share >= 0.001]
    if shares:
        rows.append(("went to", "  ".join(f"{part} {share:.1%}" for part, share in shares)))
    if summary.pushes:
        rows.append(("pushes", f"{summary.proven} of {summary.pushes} proven"))
    return rows


def accuracies(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """(val/<dataset>, accuracy) of every dataset that was evaluated."""
    return [
        (key.removesuffix("/acc"), value)
        for key, value in metrics.items()
        if key.startswith("val/") and key.endswith("/acc")
    ]
