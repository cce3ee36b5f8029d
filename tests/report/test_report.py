"""The report on complete, partial, broken, long and hostile runs."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rlswitch.errors import ConfigError
from rlswitch.records.jsonl import PART_COLORS
from rlswitch.report.figures import MAX_BARS, MAX_POINTS, lines, stacked, svg, thinned
from rlswitch.report.page import load, run_page, write_report
from rlswitch.report.samples import Samples

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
VOID = {"meta", "input"}
HARMLESS = set(
    "lang charset name content http-equiv class style title id hidden".split()
    + "type step value placeholder nonce".split()
)
"""Attributes of the page: none of them loads or runs anything."""


class Tags(HTMLParser):
    """Checks that every tag is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            self.scripts.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page_of(run_dir: Path) -> str:
    """The report, after checks that apply to all: it loads nothing and runs only our script."""
    html = write_report(run_dir).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.attributes <= HARMLESS
    assert [script.get("type") for script in tags.scripts] == ["text/plain", "text/plain", None]
    [nonce] = {script["nonce"] for script in tags.scripts if "nonce" in script}
    policy = html.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy.startswith("default-src 'none';") and f"script-src 'nonce-{nonce}'" in policy
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|import\(", visible(html))
    assert len(html.encode()) <= 5_000_000
    return html


def visible(html: str) -> str:
    """The page without the two packed blocks."""
    return re.sub(r'<script type="text/plain".*?</script>', "", html, flags=re.DOTALL)


def data_of(html: str) -> dict:
    """The script's data, parsed by a browser's JSON rules."""
    packed = re.search(r'id="data">(.*?)</script>', html)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])), parse_constant=pytest.fail)


def samples_of(html: str) -> list[dict]:
    table = data_of(html)["samples"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    return [row | {"prompt": table["prompts"][row["prompt"]]} for row in rows]


def titles_of(html: str) -> list[str]:
    return [figure["title"] for figure in data_of(html)["figures"]]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(step: int) -> dict:
    return {
        "step": step,
        "reward/mean": step / 30,
        "val/addition/acc": step / 40,
        "response_length/mean": 5.0,
        "actor/ppo_kl": 1e-4,
        "mismatch/logp_abs_diff_max": 1e-6 * step,
        "actor/grad_norm": None,
        "actor/lr": 1e-6,
        "switch/verified": 1.0,
        "training/policy_version": step - 1,
        "timing_s/rollout": 2.0,
        "timing_s/update": 1.0,
        "timing_s/switch": 0.5,
        "timing_s/step": 4.0,
    }


def hand_over(step: int) -> list[dict]:
    phases = [
        ("trainer", "engine", "offload", 2.0, 0.7),
        ("trainer", "engine", "reload", 0.7, 1.5),
        ("engine", "trainer", "sleep", 1.5, 0.6),
    ]
    return [
        {
            "step": step,
            "from": source,
            "to": target,
            "phase": phase,
            "seconds": 0.25,
            "bytes": 10**9,
            "device_free_before": 6 * GIB,
            "device_free_after": 7 * GIB,
            "host_rss": GIB,
            "resident_before": int(before * GIB),
            "resident_after": int(after * GIB),
        }
        for source, target, phase, before, after in phases
    ]


def rollout(step: int, completion: str, reward: float | None) -> dict:
    return {
        "step": step,
        "prompt": "1+2=",
        "completion": completion,
        "reward": reward,
        "rewards": {"exact": reward, "format": 1.0},
        "finish_reason": "stop",
        "policy_version": step - 1,
        "sample": 0,
    }


@pytest.fixture
def run_dir(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [metrics(step) for step in range(1, 31)])
    write_lines(tmp_path / "switch.jsonl", [row for s in range(1, 31) for row in hand_over(s)])
    write_lines(
        tmp_path / "rollouts.jsonl",
        [rollout(step, f"answer {step}", step / 30) for step in range(1, 31)],
    )
    (tmp_path / "config.yaml").write_text("recipe: ppo\nnum_steps: 30\nalgorithm: {class: PPO}\n")
    return tmp_path


def test_a_whole_run_has_every_section(run_dir):
    html = page_of(run_dir)
    for section in ("Curves", "Where the time went", "The switch", "Samples", "Configuration"):
        assert f"<h2>{section}</h2>" in html
    page = run_page(load(run_dir))
    assert ("Switching", "12.5%", "of that time") in page["cards"]  # 0.5 s in 4 s
    assert ("Pushes proven", "30", "of 30") in page["cards"]
    assert ("Steps", "30", "all done") in page["cards"]
    [offload, *_] = page["sections"][2]["table"]["rows"]
    assert offload[0].startswith("trainer to engine")
    assert offload[-1] == "2.00 \u2192 0.70"
    assert offload[7] == "4.00"  # GB/s: 10^9 bytes in 0.25 s
    assert "prefers-color-scheme: dark" in html
    assert "Gradient norm" not in titles_of(html)  # never finite: no empty chart


def test_every_reward_function_has_its_chart(run_dir):
    rows = [metrics(s) | {"reward/exact/mean": s / 30, "reward/format/mean": 1.0} for s in range(1, 31)]
    write_lines(run_dir / "metrics.jsonl", rows)
    titles = titles_of(page_of(run_dir))
    assert {"Reward", "Reward function exact", "Reward function format"} <= set(titles)


@pytest.mark.parametrize("missing", ["config.yaml", "switch.jsonl", "rollouts.jsonl"])
def test_a_missing_file_costs_its_own_section_only(run_dir, missing):
    (run_dir / missing).unlink()
    html = page_of(run_dir)
    assert "<h2>Curves</h2>" in html
    section = {"config.yaml": "Configuration", "switch.jsonl": "The switch"}.get(missing, "Samples")
    assert f"<h2>{section}</h2>" not in html


def test_a_run_that_has_only_begun_says_so(run_dir):
    for name in ("metrics.jsonl", "switch.jsonl", "rollouts.jsonl"):
        (run_dir / name).unlink()
    assert "No step has been recorded yet" in page_of(run_dir)
    (run_dir / "metrics.jsonl").touch()
    assert "No step has been recorded yet" in page_of(run_dir)


def test_one_step_and_torn_lines_are_enough(run_dir):
    (run_dir / "metrics.jsonl").write_text(json.dumps(metrics(1)) + '\n{"step": 2, "rew')
    (run_dir / "switch.jsonl").write_text('{"step": 1, "phase": "sleep"}\n{"st')
    (run_dir / "rollouts.jsonl").write_text('{"step": 1}\nnull\n')
    (run_dir / "config.yaml").write_text("a: [1,\n")
    html = page_of(run_dir)
    assert "<h2>Curves</h2>" in html
    assert "in between" in html
    assert len(samples_of(html)) == 1


def test_an_unfinished_run_names_its_goal(run_dir):
    (run_dir / "config.yaml").write_text("num_steps: 100\n")
    html = page_of(run_dir)
    assert "<strong>30</strong><small>of 100</small>" in html
    assert "Ended at step 30 of 100" in html


def test_records_of_one_step_belong_together(run_dir):
    write_lines(run_dir / "metrics.jsonl", [{"step": 1, "reward/mean": 0.5}, {"step": 1, "val/a/acc": 0.25}])
    [record] = load(run_dir).records
    assert record == {"step": 1, "reward/mean": 0.5, "val/a/acc": 0.25}


def test_nothing_in_a_run_can_write_markup(run_dir):
    evil = '<script>alert(1)</script><img src=x onerror="y">{{ 7 * 7 }}\x1b[2J\u202e\ud800'
    rows = [
        rollout(31, evil, 1.0) | {"finish_reason": evil, "rewards": {evil: 1.0, "b": 0.0}},
        rollout(31, evil + "2", -1.0) | {"prompt": [{"role": evil, "content": evil}]},
    ]
    write_lines(run_dir / "rollouts.jsonl", rows)
    config = {"recipe": evil, "model": {"path": evil}, "git": {"revision": evil}}
    (run_dir / "config.yaml").write_text(json.dumps(config))
    write_lines(run_dir / "metrics.jsonl", [metrics(1) | {f"val/{evil}/acc": 0.5}])
    write_lines(run_dir / "switch.jsonl", [hand_over(1)[0] | {"phase": evil, "from": evil}])
    html = page_of(run_dir)
    assert "alert(1)</script>" not in html and "<img" not in html
    assert "\x1b" not in html and "\u202e" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    samples = samples_of(html)
    assert [row["completion"] for row in samples] == [evil, evil + "2"]  # as data, verbatim
    assert samples[0]["end"] == evil and samples[0][evil] == 1.0


def test_numbers_that_json_does_not_know_break_nothing(run_dir):
    odd = [metrics(1) | {"reward/mean": float("nan"), "actor/lr": float("inf")}]
    odd += [metrics(2) | {"actor/grad_norm": None, "non_finite": {"actor/grad_norm": "nan"}}]
    write_lines(run_dir / "metrics.jsonl", odd)
    write_lines(run_dir / "switch.jsonl", [row | {"seconds": float("nan")} for row in hand_over(1)])
    write_lines(run_dir / "rollouts.jsonl", [rollout(1, "a", float("-inf")), rollout(1, "b", 0.5)])
    html = page_of(run_dir)
    assert [row["reward"] for row in samples_of(html)] == [None, 0.5]
    assert "actor/grad_norm was not finite, first at step 2" in html


def test_every_sample_of_a_run_is_on_the_page(run_dir):
    rows = [
        rollout(step, f"{step} {n}", n / 8) | {"prompt": f"{step % 7}+{n % 2}", "advantage": n - 4.0}
        for step in range(1, 101)
        for n in range(8)
    ]
    failed = rollout(100, "broken", None) | {"errors": {"exact": "no number"}, "extra": {"judge": "why"}}
    write_lines(run_dir / "rollouts.jsonl", [*rows, failed])
    html = page_of(run_dir)
    found = samples_of(html)
    keys = ("step", "prompt", "completion", "reward", "advantage")
    assert [[row[key] for key in keys] for row in found[:-1]] == [[row[key] for key in keys] for row in rows]
    assert found[-1]["note"] == "exact: no number\njudge: why" and found[-1]["reward"] is None
    assert data_of(html)["samples"]["left_out"] == ""


@pytest.mark.slow
def test_a_long_run_fits_on_a_page_and_a_kept_prompt_keeps_all_of_its_steps(run_dir):
    steps, text = 2000, random.Random(0)
    write_lines(run_dir / "metrics.jsonl", [metrics(step) for step in range(1, steps + 1)])
    write_lines(run_dir / "switch.jsonl", [row for step in range(1, steps + 1) for row in hand_over(step)])
    rows = [
        rollout(step, base64.b64encode(text.randbytes(900)).decode(), 0.5) | {"prompt": f"prompt {n}"}
        for step in range(1, steps + 1)
        for n in range(8 * (step % 16), 8 * (step % 16) + 8)
    ]
    write_lines(run_dir / "rollouts.jsonl", rows)
    html = page_of(run_dir)  # of at most 5 MB
    found = samples_of(html)
    steps_of = {(row["prompt"], row["step"]) for row in found}
    kept = {row["prompt"] for row in found}
    assert 8 <= len(kept) < 128
    assert steps_of == {(row["prompt"], row["step"]) for row in rows if row["prompt"] in kept}
    assert "Too many for a page; kept: one prompt in" in html
    assert "Each point of a curve is a mean of neighboring steps" in html


def test_samples_of_one_prompt_are_thinned_over_all_steps():
    samples = Samples(max_chars=20_000)
    for step in range(1000):
        samples.add(rollout(step, "x" * 100, 1.0))
    table = samples.table()
    assert len(table["prompts"]) == 1 and table["total"] == 1000
    assert sum(len(row[2]) for row in table["rows"]) <= 20_000
    steps = [row[0] for row in table["rows"]]
    assert len(steps) >= 50 and len({b - a for a, b in pairwise(steps)}) == 1


def test_a_text_without_end_keeps_its_beginning_and_its_end():
    samples = Samples()
    samples.add(rollout(1, "start" + "x" * 10**6 + "end", 1.0))
    [text] = [row[2] for row in samples.table()["rows"]]
    assert text.startswith("start") and text.endswith("end") and len(text) < 5000
    assert "characters left out" in text


def test_where_no_run_has_been_there_is_one_line_and_exit_code_2(tmp_path):
    for where in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError):
            write_report(where)
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "report.py", where], capture_output=True, text=True
        )
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        assert line.startswith("rlswitch: error: RUN_DIR = ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_names_what_it_wrote(run_dir):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "report.py", run_dir], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(run_dir / "report.html"))
    assert not (run_dir / "report.html.tmp").exists()


def test_figures_take_flat_single_empty_and_long_curves():
    assert lines("x", {"a": []}) == []
    assert lines("x", {"a": [(1, 0.0)]}, log=True) == []
    for points in ([(1, 2.0)], [(1, 0.0), (2, 0.0)], [(i, 1e-9 * i) for i in range(5000)]):
        [figure] = lines("x", {"a": points})
        assert len(figure["data"]["values"]) <= MAX_POINTS
        assert "NaN" not in svg(figure)
    bars = [(i, {"update": 1.0, "switch": 2.0}) for i in range(5000)]
    figure = stacked("x", bars, PART_COLORS)
    assert len(figure["data"]["values"]) <= MAX_BARS
    drawn = svg(figure)
    assert PART_COLORS["update"] in drawn and PART_COLORS["rollout"] not in drawn


def test_a_figure_as_a_file_names_every_curve_whatever_its_name():
    names = ["val/a.b[0]", "\"'`\\", "<b>&amp;", "\x1b[2J"]
    [figure] = lines("title <i>", {name: [(1, 2.0), (2, 1.0)] for name in names})
    texts = [node.text for node in ElementTree.fromstring(svg(figure)).iter() if node.text]
    assert {"title <i>", *names[:3], "\\x1b[2J"} <= set(texts)


def test_thinning_keeps_the_mean():
    points = [(float(i), float(i % 7)) for i in range(1000)]
    thin = thinned(points, 100)
    assert len(thin) == 100
    assert sum(y for _, y in thin) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
