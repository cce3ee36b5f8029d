"""Metrics and texts as a person reads them: plain strings, for the console and the report."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise

from rlswitch.records import Summary

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


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


def fitted(facts: Sequence[str], width: int) -> str:
    """As many facts as fit on a line: none is cut in the middle of a number."""
    line = ""
    for fact in facts:
        longer = f"{line}  {fact}" if line else fact
        if len(longer) > width:
            break
        line = longer
    return line


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as `width` block characters at most, each the mean of its stretch."""
    values = list(values)
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def first_line(error: BaseException) -> str:
    """What an exception says, in a line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def prompt_text(messages: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt as one text: chat messages become `role: content` lines."""
    if isinstance(messages, str):
        return messages
    return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in messages)


def printable(text: str, keep_newlines: bool = False) -> str:
    """Control, format and unassigned characters escaped: what is left cannot move a cursor."""
    return "".join(
        char
        if unicodedata.category(char)[0] != "C" or (keep_newlines and char == "\n")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def duration(seconds: float) -> str:
    """`4.2 s`, `8m 26s`, `1h 02m`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
