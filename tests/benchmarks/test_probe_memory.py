"""scripts/probe.py: memory figures of a GPU and of a CPU."""

from __future__ import annotations

import pytest
from rlswitch.benchmarks.probe import SLACK, Memory, memory_problem

from rlswitch.switch import device
from rlswitch.switch.device import Device

GIB = 2**30
AWAKE, ASLEEP = 120 * GIB, 3 * GIB


def cycles(*asleep: int, awake: int = AWAKE) -> list[Memory]:
    return [Memory(awake=awake, asleep=it) for it in asleep]


def test_on_a_gpu_the_weights_that_level_1_keeps_in_host_memory_do_not_count(monkeypatch) -> None:
    free, resident = {"awake": 20 * GIB, "asleep": 137 * GIB}, {"awake": 4 * GIB, "asleep": 21 * GIB}
    now = "awake"
    monkeypatch.setattr(Device, "free_bytes", lambda it: free[now])
    monkeypatch.setattr(Device, "total_bytes", lambda it: 140 * GIB)
    monkeypatch.setattr(device, "resident_bytes", lambda pids: resident[now])
    for kind, works in (("cuda", True), ("cpu", False)):
        now = "awake"
        awake = Device(kind).used_bytes([1])
        now = "asleep"
        memory = cycles(*[Device(kind).used_bytes([1])] * 3, awake=awake)
        assert (memory_problem("1", memory) == "") is works


@pytest.mark.parametrize("level", ["0", "kv", "1", "2"])
def test_memory_that_does_not_come_back_fails_at_every_level(level: str) -> None:
    assert memory_problem(level, cycles(ASLEEP, ASLEEP + SLACK, ASLEEP + SLACK)) == ""
    leaking = cycles(ASLEEP, ASLEEP + 2 * GIB, ASLEEP + 4 * GIB)
    assert memory_problem(level, leaking) == "grew by 4096 MiB while asleep"


def test_a_sleep_that_frees_nothing_is_only_right_at_level_0() -> None:
    assert memory_problem("0", cycles(AWAKE, AWAKE)) == ""
    assert memory_problem("1", cycles(AWAKE, AWAKE)) == "holds as much memory asleep as awake"
