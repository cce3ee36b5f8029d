"""The report of whole, partial, broken and hostile runs."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlswitch.charts import Series, line_chart, log_ticks, nice_ticks, stacked_chart, thinned
from rlswitch.errors import ConfigError
from rlswitch.report import load, pick_samples, write_report

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
HARMLESS = {
    "lang",
    "charset",
    "name",
    "content",
    "class",
    "style",
    "title",
    "viewbox",
    "role",
    "aria-label",
    "text-anchor",
    "points",
    "colspan",
    "x",
    "y",
    "x1",
    "x2",
    "y1",
    "y2",
    "cx",
    "cy",
    "r",
    "width",
    "height",
}
"""Attributes of the page: none of them loads or runs anything."""


class Balance(HTMLParser):
    """Checks that every tag is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page_of(run_dir: Path) -> str:
    html = write_report(run_dir).read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(html)
    assert balance.open == []
    assert "script" not in balance.seen
    assert balance.attributes <= HARMLESS
    assert "url(" not in html.partition("</style>")[0]
    return html


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
    assert "<strong>12.5%</strong>" in html  # 0.5 s of switching in 4 s
    assert "<strong>30</strong><small>of 30</small>" in html  # pushes proven
    assert "trainer to engine" in html
    assert "2.00 &rarr; 0.70" in html
    assert "4.00" in html  # GB/s: 10^9 bytes in 0.25 s
    assert "prefers-color-scheme: dark" in html
    assert "all done" in html
    assert "Gradient norm" not in html  # never finite: no empty chart


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


def test_an_unfinished_run_names_its_goal(run_dir):
    (run_dir / "config.yaml").write_text("num_steps: 100\n")
    assert "<strong>30</strong><small>of 100</small>" in page_of(run_dir)


def test_records_of_one_step_belong_together(run_dir):
    write_lines(run_dir / "metrics.jsonl", [{"step": 1, "reward/mean": 0.5}, {"step": 1, "val/a/acc": 0.25}])
    [record] = load(run_dir).records
    assert record == {"step": 1, "reward/mean": 0.5, "val/a/acc": 0.25}


def test_nothing_in_a_run_can_write_markup(run_dir):
    evil = '<script>alert(1)</script><img src=x onerror="y">\x1b[2J\ud800'
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
    assert "<script" not in html
    assert "<img" not in html
    assert "\x1b" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_samples_are_the_best_the_worst_and_the_newest():
    rows = [rollout(step, f"{step}", reward) for step, reward in enumerate([0.0, 1.0, 0.5, None])]
    rows += [rollout(4, "same", 0.25), rollout(4, "same", 0.25)]
    samples = pick_samples(rows)
    assert [row["completion"] for row in samples["Best"]] == ["1", "2", "same", "0"]
    assert [row["completion"] for row in samples["Worst"]] == ["0", "same", "2", "1"]
    assert [row["completion"] for row in samples["Newest"]] == ["same"]
    assert pick_samples([]) == {}


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


def test_the_command_names_what_it_wrote(run_dir):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "report.py", run_dir], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(run_dir / "report.html"))
    assert not (run_dir / "report.html.tmp").exists()


def test_ticks_are_round_and_inside():
    assert nice_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert nice_ticks(3, 3) == [3]
    assert all(2e-7 <= tick <= 3e-7 for tick in nice_ticks(2e-7, 3e-7))
    assert log_ticks(1e-6, 1e-3) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3])
    assert len(log_ticks(1e-6, 5e-6)) == 3


def test_charts_take_flat_single_empty_and_long_curves():
    assert line_chart("x", [Series("a", [])]) == ""
    assert line_chart("x", [Series("a", [(1, 0.0)])], log=True) == ""
    assert stacked_chart("x", [], ("a",), "") == ""
    for points in ([(1, 2.0)], [(1, 0.0), (2, 0.0)], [(i, 1e-9 * i) for i in range(5000)]):
        chart = line_chart("x", [Series("a", points)])
        assert "nan" not in chart
        assert len(chart) < 60_000
    bars = [(i, {"a": 1.0, "b": 2.0}) for i in range(5000)]
    assert stacked_chart("x", bars, ("a", "b"), "").count("<g>") <= 110


def test_thinning_keeps_the_mean():
    points = [(float(i), float(i % 7)) for i in range(1000)]
    thin = thinned(points, 100)
    assert len(thin) == 100
    assert sum(y for _, y in thin) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
