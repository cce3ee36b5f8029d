"""Whether forked processes could use CUDA: what the driver's answer in one of them is taken for."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from rlswitch.config.sections import EngineConfig
from rlswitch.processes import driver


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(driver, "SUPPORTED", True)
    monkeypatch.setattr(driver.platform, "release", lambda: "6.8.0-generic")
    driver.forks_are_usable.cache_clear()
    yield
    driver.forks_are_usable.cache_clear()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, ""),  # not initialised
        (0, "an import has initialised CUDA"),
        (100, "cuDeviceGetCount = 100 in its child"),  # initialised, when no GPU was visible
        (1, "cuDeviceGetCount = 1 in its child"),  # by an exception
        (-9, "cuDeviceGetCount = -9 in its child"),
        (255, "cuDeviceGetCount = 255 in its child"),  # the server was killed
        (None, "does not answer"),
    ],
)
def test_one_answer_alone_leaves_the_start_warm(code: int | None, words: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(driver, "driver_status", lambda: 0)
    monkeypatch.setattr(driver, "ask_fork", lambda: code)
    assert driver.forks_are_usable() == (words == "") == driver.forks_are_usable()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(words) and words in "".join(said)


def test_under_wsl2_nothing_is_forked(monkeypatch, capsys) -> None:
    monkeypatch.setattr(driver, "driver_status", lambda: 0)
    monkeypatch.setattr(driver, "ask_fork", lambda: pytest.fail("a process was forked"))
    monkeypatch.setattr(driver.platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    assert not driver.forks_are_usable()
    assert "WSL2" in capsys.readouterr().err


def test_without_a_driver_nothing_is_asked(monkeypatch) -> None:
    monkeypatch.setattr(driver, "ask_fork", lambda: pytest.fail("a process was forked"))
    monkeypatch.setattr(driver, "driver_status", lambda: None)
    monkeypatch.setattr(driver.platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    assert driver.forks_are_usable(), "on a CPU WSL2 forks like any Linux"


def test_the_driver_is_only_asked(monkeypatch) -> None:
    def missing(name: str) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    class Library:
        """Answers like the driver before cuInit; it has no cuInit."""

        @staticmethod
        def cuDeviceGetCount(count: Any) -> int:
            return 3

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert driver.driver_status() == 3
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert driver.driver_status() is None


@pytest.mark.parametrize(("status", "code"), [(None, 3), (3, 3), (0, 0), (100, 100), (999, 254)])
def test_a_process_tells_the_status_by_its_exit_code(status: int | None, code: int, monkeypatch) -> None:
    monkeypatch.setattr(driver, "driver_status", lambda: status)
    with pytest.raises(SystemExit) as exit:
        driver.tell_status()
    assert exit.value.code == code


def test_a_fork_server_that_has_died_does_not_answer(monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(driver, "start_process", refuse)
    assert driver.ask_fork() is None


def test_an_unusable_fork_server_makes_engines_start_cold(monkeypatch) -> None:
    from rlswitch.engines.vllm.arguments import starts_warm
    from rlswitch.switch.device import Device

    for usable in (True, False):
        monkeypatch.setattr("rlswitch.engines.vllm.arguments.forks_are_usable", lambda usable=usable: usable)
        assert starts_warm(EngineConfig(), Device("cuda")) == usable
        assert not starts_warm(EngineConfig(fork_server=False), Device("cuda"))
