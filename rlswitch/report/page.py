"""RUN_DIR/report.html: a run on one page, in one file, readable without a network."""

import base64
import functools
import gzip
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import vl_convert
import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from rlswitch.errors import ConfigError
from rlswitch.records import jsonl
from rlswitch.records.provenance import flattened
from rlswitch.report import figures
from rlswitch.report.hand_overs import memory_figures, phase_table
from rlswitch.report.samples import Samples
from rlswitch.text import duration, printable

Page = dict[str, Any]
"""The variables of page.html.j2: title, facts, cards, notes, sections (figures, table), samples, config."""
CURVES = {
    "Rollout against trainer: |log-probability difference|": [
        "mismatch/logp_abs_diff_mean",
        "mismatch/logp_abs_diff_max",
    ],
    "Response length": ["response_length/mean", "response_length/max"],
    "KL": ["actor/kl_ref", "actor/ppo_kl"],
    "Entropy": ["actor/entropy"],
    "Gradient norm": ["actor/grad_norm"],
    "Learning rate": ["actor/lr"],
    "Clipped ratios": ["actor/clip_ratio"],
    "Value loss": ["critic/vf_loss"],
    "Explained variance of the critic": ["critic/explained_var"],
}
SMOOTHED_FROM = 20
"""Steps; a shorter reward curve has no running mean beside it."""
FOLLOWED = figures.lines("Rewards of the prompt", {name: [(0, 0)] for name in ("mean", "best", "worst")})[0]
"""The page fills in the steps of the prompt that a reader follows."""
MAX_SAMPLES_BYTES = 3_500_000
"""Of a page that stays below 5 MB; everything else takes at most one."""


@dataclass(slots=True)
class RunFiles:
    """The contents of a run directory; a missing file leaves its part empty."""

    path: Path
    config: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    """By dotted key."""
    records: list[dict[str, float]] = field(default_factory=list)
    """One per step, in order; finite numbers only."""
    non_finite: dict[str, int] = field(default_factory=dict)
    """Metric -> the first step at which it was not finite."""
    hand_overs: list[dict[str, Any]] = field(default_factory=list)
    samples: Samples = field(default_factory=Samples)
    summary: jsonl.Summary = field(default_factory=jsonl.Summary)

    def curve(self, key: str) -> list[figures.Point]:
        return [(record["step"], record[key]) for record in self.records if key in record]

    @property
    def steps_missing(self) -> bool:
        target = self.settings.get("num_steps", "")
        return target.isdecimal() and self.summary.last_step < int(target)


def write_report(run_dir: Path) -> Path:
    """Writes report.html and returns its path; raises ConfigError if `run_dir` holds no run."""
    page = render(run_page(load(run_dir)))
    with jsonl.replacing(run_dir / "report.html") as file:
        file.write(page.encode())
    return run_dir / "report.html"


def load(run_dir: Path) -> RunFiles:
    """Reads a run, also one that is still running or was cut short."""
    config_file, metrics_file = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    if not config_file.is_file() and not metrics_file.is_file():
        raise ConfigError(
            f"RUN_DIR = {run_dir}: no config.yaml and no metrics.jsonl there; name the output_dir of a run"
        )
    run = RunFiles(run_dir)
    if config_file.is_file():
        run.config = config_file.read_text(encoding="utf-8", errors="replace")
        with suppress(yaml.YAMLError, AttributeError):  # not YAML, or not a mapping
            settings = flattened(yaml.safe_load(run.config))
            run.settings = {key: str(value) for key, value in settings.items() if value is not None}
    by_step: dict[int, dict[str, float]] = {}
    for record in jsonl.read(metrics_file):
        by_step.setdefault(record["step"], {}).update(jsonl.numbers(record))
        for key in record.get("non_finite", ()):
            run.non_finite.setdefault(str(key), record["step"])
    run.records = [by_step[step] for step in sorted(by_step)]
    for record in run.records:
        run.summary.add(record)
    run.hand_overs = [row for row in jsonl.read(run_dir / "switch.jsonl") if "phase" in row]
    for rollout in jsonl.read(run_dir / "rollouts.jsonl"):
        run.samples.add(rollout)
    return run


def run_page(run: RunFiles) -> Page:
    while len(_packed(samples := run.samples.table())) > MAX_SAMPLES_BYTES:
        run.samples.halve()
    switch = {"wide": True, "figures": memory_figures(run.hand_overs), "table": phase_table(run.hand_overs)}
    sections: list[Page] = [
        {"title": "Curves", "figures": _curves(run)},
        {"title": "Where the time went"} | _time(run),
        {"title": "The switch"} | switch,
    ]
    return {
        "title": run.settings.get("recipe") or run.path.resolve().name,
        "facts": _facts(run),
        "notes": list(_notes(run)),
        "cards": list(_cards(run)) if run.records else [],
        "sections": [section for section in sections if section["figures"] or section.get("table")],
        "samples": samples,
        "config": run.config,
    }


def render(page: Page) -> str:
    """The whole page; its data and the plotting library are inside."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, keep_newlines=True) if type(value) is str else value,
    )
    drawn = [figure for section in page["sections"] for figure in section["figures"]]
    data = _packed({"figures": drawn, "samples": page.get("samples"), "followed": FOLLOWED})
    template = environment.get_template("page.html.j2")
    nonce = secrets.token_urlsafe(16)
    return template.render(page, data=Markup(data), plotting=Markup(_plotting()), nonce=nonce)


def _packed(data: object) -> str:
    """Compressed JSON in base64: small, and inert inside HTML."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


@functools.cache
def _plotting() -> str:
    """Vega, Vega-Lite and vegaEmbed from vl-convert's own copy, compressed."""
    return _packed(vl_convert.javascript_bundle("globalThis.vegaEmbed = vegaEmbed;"))


def _curves(run: RunFiles) -> list[figures.Spec]:
    keys = sorted({key for record in run.records for key in record})
    reward = run.curve("reward/mean")
    rewards, colors = {"reward": reward}, figures.COLORS[:1]
    if len(reward) >= SMOOTHED_FROM:
        rewards["running mean"] = _smoothed(reward)
        colors = [colors[0] + "66", colors[0]]  # the noisy one pale
    drawn = figures.lines("Reward", rewards, colors=colors)
    functions = [match[1] for key in keys if (match := re.fullmatch("reward/(.+)/mean", key))]
    for name in functions if len(functions) > 1 else ():
        key = f"reward/{name}/mean"
        drawn += figures.lines(f"Reward function {name}", {key: run.curve(key)})
    scores = {key.removeprefix("val/"): run.curve(key) for key in keys if key.startswith("val/")}
    drawn += figures.lines("Held-out accuracy", scores)
    for title, named in CURVES.items():
        drawn += figures.lines(title, {key: run.curve(key) for key in named}, log="mismatch" in named[0])
    return drawn


def _time(run: RunFiles) -> Page:
    seconds = run.summary.seconds
    share_of = jsonl.shares([seconds])
    steps = [(record["step"], parts) for record in run.records if (parts := jsonl.time_by_part(record))]
    largest = sorted(share_of, key=lambda part: -share_of[part])
    rows = [[part, duration(seconds[part]), f"{share_of[part]:.1%}"] for part in largest]
    return {
        "bar": [(part, share, jsonl.PART_COLORS[part]) for part, share in share_of.items()],
        "figures": [figures.stacked("Seconds a step", steps, jsonl.PART_COLORS)] if steps else [],
        "table": {"head": ["part", "total", "share"], "rows": rows, "text_columns": 1} if rows else None,
    }


def _facts(run: RunFiles) -> list[str]:
    """Two lines below the title: what was trained, and with which software."""
    settings = run.settings
    model, data = settings.get("model.path", ""), settings.get("data.path", "")
    seed = f"seed {settings['seed']}" if "seed" in settings else ""
    what = [settings.get("algorithm.class", ""), model, data if data != model else "", seed]
    versions = [(key, value) for key, value in settings.items() if key.startswith("versions.")]
    built = [f"{key.removeprefix('versions.')} {value}" for key, value in versions]
    if revision := settings.get("git.revision"):
        built.append(f"git {revision[:10]}" + " + local changes" * (settings.get("git.dirty") == "True"))
    return [" \u00b7 ".join(filter(None, line)) for line in (what, built) if any(line)]


def _notes(run: RunFiles) -> Iterator[str]:
    """What a reader should know first."""
    if not run.records:
        yield "No step has been recorded yet: the run is starting, or died."
    elif run.steps_missing:
        yield f"Ended at step {run.summary.last_step} of {run.settings['num_steps']}, or is still running."
    for key, step in run.non_finite.items():
        yield f"{key} was not finite, first at step {step}."
    if restarts := sum(value for _, value in run.curve("switch/restarts")):
        yield f"Engines were restarted {restarts:.0f} times."
    if len(run.records) > figures.MAX_POINTS:
        yield f"Each point of a curve is a mean of neighboring steps; there are {len(run.records):,} steps."


def _cards(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    """(label, value, remark) of the numbers at the top."""
    summary, first, last = run.summary, run.summary.first, run.summary.last
    target = run.settings.get("num_steps")
    yield "Steps", str(summary.last_step), f"of {target}" if run.steps_missing else "all done" * bool(target)
    if "reward/mean" in last:
        yield "Reward", f"{last['reward/mean']:.3f}", f"from {first['reward/mean']:.3f}"
    for name, value in jsonl.accuracies(last):
        yield "Accuracy", f"{value:.3f}", f"from {first[f'{name}/acc']:.3f} on {name.removeprefix('val/')}"
    if wall := summary.wall_seconds:
        yield "Time in steps", duration(wall), f"{wall / max(summary.last_step, 1):.2f} s a step"
        yield "Switching", f"{summary.seconds.get('switch', 0.0) / wall:.1%}", "of that time"
    if pushes := summary.pushes:
        yield "Pushes proven", f"{sum(pushes.values())}", f"of {len(pushes)}"


def _smoothed(points: Sequence[figures.Point]) -> list[figures.Point]:
    """A running mean over a tenth of the curve."""
    reach = max(len(points) // 20, 1)
    windows = ([y for _, y in points[max(i - reach, 0) : i + reach + 1]] for i in range(len(points)))
    return [(x, fmean(window)) for (x, _), window in zip(points, windows, strict=True)]
