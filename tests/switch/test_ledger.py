"""The ledger: what a phase writes to switch.jsonl, trace.json and the metrics."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlswitch.switch.device import Device
from rlswitch.switch.ledger import SWITCH_PHASES, WORK_PHASES, Ledger

FIELDS = {
    "step",
    "from",
    "to",
    "phase",
    "seconds",
    "bytes",
    "device_free_before",
    "device_free_after",
    "host_rss",
}


class Clock:
    """A clock that advances only on request, by seconds that add up exactly."""

    def __init__(self) -> None:
        self.now = 1000.0

    def tick(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    stopped = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr("rlswitch.switch.ledger.time", stopped)
    return clock


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Ledger:
    return Ledger(Device("cpu"), tmp_path)


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "switch.jsonl").open()]


def trace(directory: Path) -> list[dict]:
    """Parses it as a viewer does: the closing bracket is optional, a trailing comma is an error."""
    return json.loads((directory / "trace.json").read_text().rstrip().rstrip(",") + "]")


def phase(ledger: Ledger, name: str, moved: int = 0, clock: Clock | None = None, takes=0.0) -> None:
    with ledger.phase(name, [os.getpid()]) as running:
        running.bytes = moved
        if clock:
            clock.tick(takes)


def test_a_phase_is_one_record_with_the_promised_fields(ledger, clock, tmp_path):
    ledger.step = 4
    with ledger.between("trainer", "rollout engine"):
        phase(ledger, "reload", 123, clock, takes=0.25)
    (row,) = rows(tmp_path)
    assert row.keys() >= FIELDS
    promised = {"step": 4, "from": "trainer", "to": "rollout engine", "phase": "reload"}
    assert row.items() >= (promised | {"bytes": 123, "seconds": 0.25}).items()
    assert row["host_rss"] > 2**20 and row["device_free_after"] > 2**20


def test_phases_outside_a_hand_over_name_nobody(ledger: Ledger, tmp_path: Path):
    with ledger.between("a", "b"):
        phase(ledger, "sleep")
    phase(ledger, "sleep")
    assert [(row["from"], row["to"]) for row in rows(tmp_path)] == [("a", "b"), ("", "")]


def test_metrics_are_sums_over_the_step(ledger: Ledger, clock: Clock):
    phase(ledger, "verify", 5, clock, takes=0.25)
    phase(ledger, "verify", 7, clock, takes=0.5)
    phase(ledger, "sleep", 1, clock, takes=1.0)
    with ledger.work("rollout"):
        clock.tick(4.0)
    clock.tick(1.25)
    metrics = ledger.step_metrics()
    assert metrics["switch/verify_s"] == 0.75
    assert metrics["switch/sleep_s"] == 1.0
    assert metrics["switch/bytes"] == 13
    assert metrics["switch/total_s"] == metrics["timing_s/switch"] == 1.75
    assert metrics["timing_s/rollout"] == 4.0
    assert metrics["timing_s/step"] == 7.0
    assert metrics["switch/share"] == 0.25


def test_every_phase_and_every_kind_of_work_is_a_metric_of_every_step(ledger: Ledger):
    metrics = ledger.step_metrics()  # zero seconds: must not divide by them
    names = {f"switch/{name}_s" for name in SWITCH_PHASES}
    names |= {f"timing_s/{name}" for name in (*WORK_PHASES, "switch", "step")}
    assert metrics.keys() == names | {"switch/total_s", "switch/share", "switch/bytes"}
    assert not any(metrics.values())


def test_a_phase_is_counted_in_one_record_only(ledger: Ledger, clock: Clock):
    phase(ledger, "reload", 5, clock, takes=0.5)
    first = ledger.step_metrics()
    clock.tick(0.25)
    second = ledger.step_metrics()
    assert (first["switch/bytes"], first["switch/reload_s"]) == (5, 0.5)
    assert (second["switch/bytes"], second["switch/reload_s"]) == (0, 0)
    assert (first["timing_s/step"], second["timing_s/step"]) == (0.5, 0.25)


def test_restart_forgets_what_came_before(ledger: Ledger, clock: Clock):
    phase(ledger, "sleep", 5, clock, takes=0.5)
    ledger.restart()
    assert not any(ledger.step_metrics().values())


def test_unknown_names_are_refused(ledger: Ledger):
    with pytest.raises(AssertionError), ledger.phase("nap"):
        pass
    with pytest.raises(AssertionError), ledger.work("nap"):
        pass


def test_whoever_listens_hears_what_begins(ledger: Ledger):
    heard: list[str] = []
    ledger.on_phase = heard.append
    with ledger.work("update"):
        assert heard[-1:] == ["update"]


def test_the_trace_has_the_same_phases_and_the_work(ledger, clock, tmp_path):
    ledger.step = 2
    clock.tick(1.0)
    with ledger.work("update"):
        clock.tick(0.5)
        phase(ledger, "publish", 9, clock, takes=0.25)
    inner, outer = trace(tmp_path)
    assert (inner["name"], inner["cat"]) == ("publish", "switch")
    assert (outer["name"], outer["cat"], outer["args"]) == ("update", "work", {"step": 2})
    assert inner["args"] == rows(tmp_path)[0]
    assert {inner["ph"], outer["ph"]} == {"X"}
    assert (outer["ts"], outer["dur"]) == (1_000_000, 750_000)
    assert (inner["ts"], inner["dur"]) == (1_500_000, 250_000)


def test_the_trace_is_readable_at_any_moment(ledger: Ledger, tmp_path: Path):
    for count in range(1, 4):
        phase(ledger, "sleep")
        assert len(trace(tmp_path)) == count


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path):
    first = Ledger(Device("cpu"), tmp_path)
    for step in (1, 2, 3):
        first.step = step
        phase(first, "reload", moved=step)
    with (tmp_path / "switch.jsonl").open("a") as log:
        log.write('{"step": 2, "phase": "sl')  # killed while writing a line
    resumed = Ledger(Device("cpu"), tmp_path, kept=2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    resumed.step = 3
    phase(resumed, "reload", moved=33)
    assert [(row["step"], row["bytes"]) for row in rows(tmp_path)] == [(1, 1), (2, 2), (3, 33)]
    assert len(trace(tmp_path)) == 4


def test_a_run_started_afresh_drops_everything(tmp_path: Path):
    first = Ledger(Device("cpu"), tmp_path)
    phase(first, "sleep")
    Ledger(Device("cpu"), tmp_path)
    assert rows(tmp_path) == []


def test_a_phase_that_fails_leaves_no_record_and_the_next_hand_over_its_own_names(
    ledger: Ledger, tmp_path: Path
):
    with pytest.raises(OSError), ledger.between("a", "b"), ledger.phase("sleep"):
        raise OSError
    with ledger.between("b", "c"):
        phase(ledger, "onload")
    assert [(row["from"], row["phase"]) for row in rows(tmp_path)] == [("b", "onload")]
