"""The switching benchmark without an engine: settings, summaries, tables and charts."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from rlswitch.benchmarks import charts, tables
from rlswitch.benchmarks.experiment import Result, Sample
from rlswitch.benchmarks.models import limits
from rlswitch.benchmarks.settings import BenchSettings, settings_from_words

from rlswitch.errors import ConfigError
from rlswitch.switch.device import Device


def measured() -> Result:
    """A restart of 40 s and a level 2 wake-up of 0.5 s, for each model; answers that agree."""
    samples = []
    for model in "AB":
        samples += [Sample("base", "local", "restart", model, "load", v) for v in (39.0, 40.0, 60.0)]
        for what, seconds in (("wake_weights", 0.1), ("reload", 0.3), ("wake_kv_cache", 0.1), ("wake", 0.5)):
            samples.append(Sample("base", "local", "2", model, what, seconds))
        samples.append(Sample("base", "server", "", model, "load", 50.0))
        samples.append(Sample("base", "server", "2", model, "wake", 1.0))
        samples.append(Sample("base", "local", "2", model, "gap", 0.0))
    return Result(samples=samples, missing={"fp8": "no kernels"})


def test_words_become_settings() -> None:
    settings = settings_from_words(
        BenchSettings, ["model_a=/a", "modes=restart,2", "cycles=5", "kv_cache_gib=1.5", "prompt=a=b"]
    )
    assert (settings.model_a, settings.modes, settings.cycles) == ("/a", ["restart", "2"], 5)
    assert (settings.kv_cache_gib, settings.prompt) == (1.5, "a=b")
    assert not list(settings.problems())


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["cycle=3"], ["cycle=3: unknown setting; did you mean 'cycles'?"]),
        (["fast"], ["fast: expected key=value"]),
        (["cycles=ten", "x=1"], ["cycles = ten: must be a whole number", "x=1: unknown setting"]),
        (["cycles=0"], ["cycles = 0: must be at least 1"]),
        (["dtype=float33"], ["dtype = float33: not one of auto, float32"]),
    ],
)
def test_mistakes_are_named_all_at_once(words: list[str], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_from_words(BenchSettings, words)
    assert len(caught.value.problems) == len(lines)
    assert all(found.startswith(line) for found, line in zip(caught.value.problems, lines, strict=True))


def test_values_that_no_bound_can_tell() -> None:
    wrong = BenchSettings(model_a="x", model_b="x", modes=["restat"], transports=["local"])
    lines = list(wrong.problems())
    assert any("modes = restat" in line and "did you mean 'restart'?" in line for line in lines)
    assert any(line.startswith("model_b = x: the same as model_a") for line in lines)


def test_a_cpu_says_what_it_cannot_do() -> None:
    found = limits(Device("cpu"))
    assert "fp8" in found and "tp2" in found


def test_the_summary_is_minimum_median_and_maximum() -> None:
    spread = tables.summary(measured().samples)["base", "local", "restart", "A", "load"]
    assert spread == (39.0, 40.0, 60.0, 3)


def test_a_speed_up_is_against_the_median_restart_and_never_against_a_warm_start() -> None:
    assert tables.speed_up(measured(), "2", "A") == 80
    assert tables.speed_up(measured(), "2", "A", "server") == 40
    assert tables.speed_up(measured(), "1", "A") is None


def test_the_tables_name_what_was_not_measured_and_what_differed() -> None:
    result, settings = measured(), BenchSettings()
    result.differing.append("local, level 2, visit 3, model A")
    lines = [part for part in tables.render(result, settings) if isinstance(part, str)]
    assert "not measured: fp8: no kernels" in lines
    assert "outputs DIFFER: local, level 2, visit 3, model A" in lines


def test_a_longer_bar_is_a_longer_time_and_every_bar_is_labelled(tmp_path: Path) -> None:
    found = charts.bars(measured(), BenchSettings(modes=["restart", "2"]))
    assert [bar.label for bar in found][:3] == ["local, restart, A", "local, restart, B", "local, level 2, A"]
    assert found[2].note == "500 ms  80x"
    rows = charts.figure(found, "title")["data"]["values"]
    ends = {row["label"]: row["end"] for row in rows if "note" in row}
    assert ends == {bar.label: pytest.approx(bar.seconds) for bar in found}
    parts = [row for row in rows if row["label"] == "local, level 2, A" and "series" in row]
    assert [row["seconds"] for row in parts] == [0.1, 0.3, 0.1]
    assert parts[0]["start"] == pytest.approx(0.1) and parts[-1]["end"] == pytest.approx(0.5)
    assert all(a["end"] == pytest.approx(b["start"]) for a, b in pairwise(parts))
    logs = [math.log(row["end"] / row["start"]) for row in parts]
    assert logs[1] == pytest.approx(3 * logs[0])  # parts divide a bar by their linear shares


@pytest.mark.slow
def test_the_page_holds_the_figure_and_the_numbers(tmp_path: Path) -> None:
    picture, page = charts.write(measured(), BenchSettings(), "A = <x>", tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert charts.TITLE in text and "0.3000" in text and "A = &lt;x&gt;" in text


def test_nothing_measured_is_nothing_drawn(tmp_path: Path) -> None:
    assert charts.write(Result(), BenchSettings(), "", tmp_path) == []
