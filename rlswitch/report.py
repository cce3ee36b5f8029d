"""RUN_DIR/report.html: a run on one page, in one file, readable without a network."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import yaml

from rlswitch.charts import Series, chart_grid, line_chart, smoothed, stacked_chart
from rlswitch.errors import ConfigError
from rlswitch.records.jsonl import PARTS, Summary, accuracies, numbers, read, time_by_part
from rlswitch.report_style import CSS
from rlswitch.report_switch import switch_section
from rlswitch.text import duration, printable, prompt_text, shortened

SAMPLES = 4
SAMPLE_CHARS = 700


@dataclass(slots=True)
class RunFiles:
    """What a run directory holds; whatever is missing is empty."""

    path: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    """One per step, in order."""
    hand_overs: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    summary: Summary = field(default_factory=Summary)

    def curve(self, key: str) -> list[tuple[float, float]]:
        return [(record["step"], record[key]) for record in self.records if key in record]


def write_report(run_dir: Path) -> Path:
    """Writes report.html and returns its path; raises ConfigError where no run has been."""
    target = run_dir / "report.html"
    draft = target.with_name(target.name + ".tmp")
    page = render(load(run_dir))
    draft.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    os.replace(draft, target)
    return target


def load(run_dir: Path) -> RunFiles:
    """Reads a run, also one that is going on or was cut short."""
    names = ("config.yaml", "metrics.jsonl")
    if not any((run_dir / name).is_file() for name in names):
        what = f"holds neither {' nor '.join(names)}" if run_dir.is_dir() else "no such directory"
        raise ConfigError(f"RUN_DIR = {run_dir}: {what}; name the output_dir of a run")
    run = RunFiles(run_dir)
    config = run_dir / "config.yaml"
    if config.is_file():
        run.config_text = config.read_text(encoding="utf-8", errors="replace")
        run.config = _parsed(run.config_text)
    by_step: dict[int, dict[str, Any]] = {}
    for record in read(run_dir / "metrics.jsonl"):
        by_step.setdefault(record["step"], {}).update(numbers(record))
    run.records = [by_step[step] for step in sorted(by_step)]
    for record in run.records:
        run.summary.add(record)
    run.hand_overs = [row for row in read(run_dir / "switch.jsonl") if "phase" in row]
    run.samples = pick_samples(read(run_dir / "rollouts.jsonl"))
    return run


def pick_samples(rollouts: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The best, the worst and the newest completions; among equals the newer. Reads a stream."""
    best: list[tuple[float, int, dict[str, Any]]] = []
    worst: list[tuple[float, int, dict[str, Any]]] = []
    newest: list[dict[str, Any]] = []
    for i, rollout in enumerate(rollouts):
        if newest and newest[-1]["step"] != rollout["step"]:
            newest = []
        newest.append(rollout)
        reward = rollout.get("reward")
        if isinstance(reward, int | float):
            for heap, score in ((best, reward), (worst, -reward)):
                heapq.heappush(heap, (score, i, rollout))
                if len(heap) > 8 * SAMPLES:
                    heapq.heappop(heap)
    groups = {
        "Newest": newest[:: max(len(newest) // SAMPLES, 1)],
        "Best": [entry[2] for entry in sorted(best, key=lambda e: e[:2], reverse=True)],
        "Worst": [entry[2] for entry in sorted(worst, key=lambda e: e[:2], reverse=True)],
    }
    return {name: _distinct(rows)[:SAMPLES] for name, rows in groups.items() if rows}


def render(run: RunFiles) -> str:
    """The whole page."""
    name = str(run.config.get("recipe") or run.path.resolve().name)
    sections = [
        ("", _cards(run)),
        ("Curves", _curves(run)),
        ("Where the time went", _time(run)),
        ("The switch", switch_section(run.hand_overs)),
        ("Samples", _samples(run)),
        ("Configuration", _configuration(run)),
    ]
    body = "".join(
        f"<section>{f'<h2>{title}</h2>' if title else ''}{html}</section>" for title, html in sections if html
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>rlswitch: {escape(printable(name))}</title><style>{CSS}</style></head>"
        f"<body><main>{_header(run, name)}{body}</main></body></html>\n"
    )


def _header(run: RunFiles, name: str) -> str:
    model, data = run.config.get("model"), run.config.get("data")
    algorithm, git = run.config.get("algorithm"), run.config.get("git")
    versions = run.config.get("versions")
    facts = [
        _of(algorithm, "class"),
        _of(model, "path"),
        "" if _of(data, "path") == _of(model, "path") else _of(data, "path"),
        f"seed {run.config['seed']}" if "seed" in run.config else "",
    ]
    revision = _of(git, "revision")[:10]
    dirty = " + local changes" if isinstance(git, dict) and git.get("dirty") else ""
    packages = versions.items() if isinstance(versions, dict) else ()
    built = [f"{package} {version}" for package, version in packages]
    built += [f"git {revision}{dirty}"] if revision else []
    lines = (" &middot; ".join(escape(fact) for fact in row if fact) for row in (facts, built))
    subtitles = "".join(f"<p>{line}</p>" for line in lines if line)
    return f"<header><h1><span>rlswitch</span> {escape(printable(name))}</h1>{subtitles}</header>"


def _cards(run: RunFiles) -> str:
    summary, target = run.summary, run.config.get("num_steps")
    if not run.records:
        return '<p class="empty">No step has been recorded yet: the run is starting, or died.</p>'
    behind = isinstance(target, int) and summary.last_step < target
    cards = [("Steps", f"{summary.last_step}", f"of {target}" if behind else "all done")]
    if not isinstance(target, int):
        cards = [("Steps", f"{summary.last_step}", "")]
    if "reward/mean" in summary.last:
        cards.append(("Reward", *_change(summary, "reward/mean")))
    for dataset, _ in accuracies(summary.last)[:2]:
        value, first = _change(summary, f"{dataset}/acc")
        cards.append(("Accuracy", value, f"{first} on {dataset.removeprefix('val/')}"))
    if summary.wall_seconds:
        per_step = summary.wall_seconds / max(summary.last_step, 1)
        cards.append(("Time in steps", duration(summary.wall_seconds), f"{per_step:.2f} s a step"))
        share = summary.seconds.get("switch", 0.0) / summary.wall_seconds
        cards.append(("Switching", f"{share:.1%}", "of that time"))
    if summary.pushes:
        cards.append(("Pushes proven", f"{summary.proven}", f"of {summary.pushes}"))
    return '<div class="cards">' + "".join(map(_card, cards)) + "</div>"


def _card(card: tuple[str, str, str]) -> str:
    label, value, note = (escape(printable(text)) for text in card)
    return f'<div class="card"><div>{label}</div><strong>{value}</strong><small>{note}</small></div>'


def _change(summary: Summary, key: str) -> tuple[str, str]:
    return f"{summary.last[key]:.3f}", f"from {summary.first[key]:.3f}"


def _curves(run: RunFiles) -> str:
    reward = run.curve("reward/mean")
    noisy = len(reward) >= 20
    rewards = [Series("reward", reward, "c0", faint=noisy)]
    rewards += [Series("running mean", smoothed(reward), "c0")] if noisy else []
    evaluated = sorted({key for record in run.records for key in record if key.startswith("val/")})
    scores = [
        Series(key.removeprefix("val/"), run.curve(key), f"c{i % 5}", dots=True)
        for i, key in enumerate(evaluated)
    ]
    charts = [
        line_chart("Reward", rewards, note=_ends(reward)),
        line_chart("Held-out accuracy", scores),
        _lines(run, "Response length", "response_length/mean", "response_length/max"),
        _lines(run, "KL", "actor/kl_ref", "actor/ppo_kl"),
        _lines(
            run,
            "Rollout against trainer: |log-probability difference|",
            "mismatch/logp_abs_diff_mean",
            "mismatch/logp_abs_diff_max",
            log=True,
        ),
        _lines(run, "Entropy", "actor/entropy"),
        _lines(run, "Gradient norm", "actor/grad_norm"),
        _lines(run, "Learning rate", "actor/lr"),
        _lines(run, "Clipped ratios", "actor/clip_ratio"),
        _lines(run, "Value loss", "critic/vf_loss"),
        _lines(run, "Explained variance of the critic", "critic/explained_var"),
    ]
    return chart_grid(charts)


def _lines(run: RunFiles, title: str, *keys: str, log: bool = False) -> str:
    series = [Series(key, run.curve(key), f"c{i}") for i, key in enumerate(keys)]
    note = _ends(series[0].points) if len(series) == 1 else ""
    return line_chart(title, series, note=note, log=log)


def _time(run: RunFiles) -> str:
    bars = [(r["step"], parts) for r in run.records if (parts := time_by_part(r))]
    if not bars:
        return ""
    shares, seconds = run.summary.shares(), run.summary.seconds
    pieces = "".join(
        f'<i class="p-{part}" style="width:{share:.3%}" title="{part} {share:.1%}"></i>'
        for part, share in shares.items()
    )
    rows = "".join(
        f'<tr><td><span class="key p-{part}">{part}</span></td><td>{duration(seconds[part])}</td>'
        f"<td>{share:.1%}</td></tr>"
        for part, share in sorted(shares.items(), key=lambda item: -item[1])
    )
    chart = stacked_chart("Seconds a step", bars, (*PARTS, "other"), "")
    totals = f"<table class='numbers'><tr><th>part</th><th>total</th><th>share</th></tr>{rows}</table>"
    return f'<div class="bar">{pieces}</div>' + chart_grid([chart, f"<figure>{totals}</figure>"])


def _samples(run: RunFiles) -> str:
    if not run.samples:
        return ""
    head = "<tr><th>step</th><th>prompt</th><th>completion</th><th>reward</th><th>end</th></tr>"
    rows = []
    for name, samples in run.samples.items():
        rows.append(f'<tr class="group"><td colspan="5">{name}</td></tr>')
        rows += [_sample_row(sample) for sample in samples]
    return f'<div class="scroll"><table class="samples">{head}{"".join(rows)}</table></div>'


def _sample_row(sample: Mapping[str, Any]) -> str:
    prompt, completion = (
        escape(printable(shortened(text, SAMPLE_CHARS), keep_newlines=True))
        for text in (prompt_text(sample.get("prompt", "")), str(sample.get("completion", "")))
    )
    rewards = sample.get("rewards")
    each = rewards.items() if isinstance(rewards, dict) and len(rewards) > 1 else ()
    parts = "".join(f"<small>{escape(printable(name))} {_value(v)}</small>" for name, v in each)
    if isinstance(sample.get("advantage"), int | float):
        parts += f"<small>advantage {_value(sample['advantage'])}</small>"
    return (
        f"<tr><td>{sample['step']}</td><td><pre>{prompt}</pre></td><td><pre>{completion}</pre></td>"
        f"<td>{_value(sample.get('reward'))}{parts}</td>"
        f"<td>{escape(printable(str(sample.get('finish_reason', ''))))}</td></tr>"
    )


def _configuration(run: RunFiles) -> str:
    if not run.config_text:
        return ""
    text = escape(printable(run.config_text, keep_newlines=True))
    return f"<details><summary>config.yaml</summary><pre>{text}</pre></details>"


def _ends(points: Sequence[tuple[float, float]]) -> str:
    if not points:
        return ""
    return f"{points[0][1]:.3g} to {points[-1][1]:.3g}"


def _distinct(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    seen = {(str(row.get("prompt")), str(row.get("completion"))): row for row in reversed(rows)}
    return list(reversed(seen.values()))


def _parsed(text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def _of(section: object, key: str) -> str:
    value = section.get(key) if isinstance(section, dict) else None
    return "" if value is None else printable(str(value))


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "-"
