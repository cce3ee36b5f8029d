"""Which process ends with which: the table in watch_owner's docstring, with plain processes for vLLM's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rlswitch.processes.group import VARIABLE, Owner, ProcessGroup

pytestmark = pytest.mark.processes

WATCHER = """
import sys, time
from rlswitch.processes.group import watch_owner
watch_owner(sys.argv[1:])
print("watching", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """start(words, **variables): a process that is killed at the end of the test."""
    started: list[subprocess.Popen] = []

    def run(words: list[str], **variables: str) -> subprocess.Popen:
        environment = os.environ | variables
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def watcher(start, tmp_path: Path) -> Callable[[Owner], subprocess.Popen]:
    """watcher(owner): a process of that owner, with its own file."""

    def run(owner: Owner) -> subprocess.Popen:
        file = tmp_path / "file"
        file.touch()
        process = start([sys.executable, "-c", WATCHER, str(file)], **owner.variable())
        assert process.stdout.readline() == "watching\n"
        return process

    return run


def sleeper(start: Callable[..., subprocess.Popen]) -> subprocess.Popen:
    return start(["sleep", "600"])


def test_an_owner_survives_the_environment(monkeypatch: pytest.MonkeyPatch):
    owner = Owner(7, 8, ["/a", "/b"])
    monkeypatch.setenv(VARIABLE, owner.variable()[VARIABLE])
    assert Owner.read() == owner
    monkeypatch.delenv(VARIABLE)
    assert Owner.read() == Owner()


def test_a_process_ends_with_its_run_and_removes_its_directories(start, watcher, tmp_path: Path):
    run, directory = sleeper(start), tmp_path / "published"
    directory.mkdir()
    process = watcher(Owner(run.pid, directories=[str(directory)]))
    assert process.poll() is None and directory.exists()
    run.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert not directory.exists() and not (tmp_path / "file").exists()


def test_a_process_ends_with_its_server_and_leaves_the_directories_to_the_run(start, watcher, tmp_path: Path):
    run, server, directory = sleeper(start), sleeper(start), tmp_path / "published"
    directory.mkdir()
    process = watcher(Owner(run.pid, server.pid, [str(directory)]))
    server.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert directory.exists() and not (tmp_path / "file").exists()


def test_a_process_whose_run_has_ended_already_does_not_start(start, tmp_path: Path):
    run = sleeper(start)
    run.kill()
    run.wait()
    process = start([sys.executable, "-c", WATCHER], **Owner(run.pid).variable())
    assert process.wait(30) == -signal.SIGKILL


def test_a_group_ends_with_its_descendants_and_files(start, tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    parent = start(["sh", "-c", "sleep 600 & echo started; wait"])
    assert parent.stdout.readline() == "started\n"
    group = ProcessGroup([parent.pid], [str(file)])
    assert len(group.processes) == 2 and [it.pid for it in group.vital] == [parent.pid]
    group.end(lambda: 1 / 0)  # it does not respond
    assert not file.exists()
    assert not [it for it in group.processes if it.is_running() and it.status() != psutil.STATUS_ZOMBIE]
