"""The engine's processes exit with ours, however ours dies, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from bench import open_bench
from runs import start
from samples import eventually

from rlswitch.processes.group import shared_memory_of

pytestmark = pytest.mark.engine

DONE = "done"
"""A file in the owner's directory."""


class Owned(NamedTuple):
    owner: psutil.Process
    processes: list[psutil.Process]
    """Processes that must not outlive the owner: its engine's and others."""
    files: set[Path]
    end: Callable[[float], object]
    """Waits at most so many seconds for the owner to exit."""


def own(words: list[str]) -> None:
    """The owner: starts an engine, reports what belongs to it, and exits once DONE exists."""
    directory, engine = words
    with open_bench(Path(directory), engine) as bench:
        bench.publish()
        pids = [process.pid for process in bench.backend.family.processes]
        print(os.getpid(), *pids, bench.publisher.root, flush=True)
        eventually((Path(directory) / DONE).exists, 1000)


@contextmanager
def started_owner(directory: Path, engine: str, *, warm: bool) -> Iterator[Owned]:
    """A process that owns an engine. Cold: a separate program that owns its fork server."""
    reader, writer = os.pipe()
    words = [str(directory), engine]
    if warm:
        end = start(own, words, directory, (writer, 2), TMPDIR=str(directory)).join
    else:
        environment = os.environ | {"TMPDIR": str(directory), "PYTHONPATH": os.pathsep.join(sys.path)}
        end = subprocess.Popen([sys.executable, __file__, *words], stdout=writer, env=environment).wait
    os.close(writer)
    with open(reader) as lines:
        *pids, root = lines.readline().split()
        owner, *engines = [psutil.Process(int(pid)) for pid in pids]
        others = [] if warm else owner.children(recursive=True)
        # Semaphores are unlinked once both sides have opened them.
        files = set(left(shared_memory_of([owner.pid, *(process.pid for process in engines)])))
        assert files, "vLLM's processes talk through shared memory"
        try:
            yield Owned(owner, list({*engines, *others}), {*files, Path(root)}, end)
        finally:
            for process in (owner, *engines, *others):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def left(paths: set[Path]) -> list[Path]:
    return [path for path in paths if path.exists()]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: vLLM and multiprocessing create sockets in it, with at most 107 characters."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def sockets(directory: Path) -> list[str]:
    """Sockets, and the directories of engines and fork servers."""
    return sorted(
        path.name.split("-")[0]
        for path in directory.iterdir()
        if path.is_socket() or (path.is_dir() and "-" in path.name)
    )


@pytest.mark.parametrize(("engine", "warm"), [("local", False), ("server", True)])
def test_a_killed_owner_takes_its_engine_along(directory: Path, engine: str, warm: bool) -> None:
    with started_owner(directory, engine, warm=warm) as (owner, processes, files, end):
        assert len(processes) >= 2 and not gone(processes) and len(left(files)) == len(files)
        assert sockets(directory) == (["rlswitch"] if engine == "server" else ["pymp", "rlswitch"])
        owner.send_signal(signal.SIGKILL)
        end(120)
        assert eventually(lambda: gone(processes)), processes
        assert eventually(lambda: not left(files)), left(files)
        assert eventually(lambda: not sockets(directory)), sockets(directory)


@pytest.mark.parametrize("engine", ["local", "server"])
def test_an_ordinary_end_leaves_nothing(directory: Path, engine: str) -> None:
    with started_owner(directory, engine, warm=True) as (_, processes, files, end):
        assert not gone(processes) and len(left(files)) == len(files)
        (directory / DONE).touch()
        end(300)
        assert gone(processes) and not left(files)
        assert not sockets(directory)


if __name__ == "__main__":
    own(sys.argv[1:])
