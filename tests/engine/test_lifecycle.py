"""The engine's processes die with ours, however ours dies, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlswitch.engines.processes import shared_memory_of

pytestmark = [pytest.mark.engine, pytest.mark.parametrize("engine", ["local", "server"])]

OWNER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})

if __name__ == "__main__":
    from bench import open_bench
    with open_bench(Path({directory!r}), {engine!r}) as bench:
        bench.publish()
        pids = [process.pid for process in bench.backend.processes]
        print(*pids, bench.publisher.root, flush=True)
        {then}
"""


def start_owner(tmp_path: Path, engine: str, then: str) -> tuple[subprocess.Popen, list[int], set[Path]]:
    """A process that owns an engine; returns it, the engine's pids, and what must not outlive it."""
    script = tmp_path / "owner.py"
    here = str(Path(__file__).parent)
    script.write_text(OWNER.format(here=here, directory=str(tmp_path), engine=engine, then=then))
    owner = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    *words, root = owner.stdout.readline().split()
    pids = [int(word) for word in words]
    # Semaphores have no name any more once both sides have opened them.
    files = set(left(shared_memory_of([owner.pid, *pids])))
    assert files, "vLLM's processes talk through shared memory"
    return owner, pids, {*files, Path(root)}


def gone(pids: list[int]) -> bool:
    return not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    )


def wait_until(condition, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def left(paths: set[Path]) -> list[Path]:
    return [path for path in paths if path.exists()]


def sockets(tmp_path: Path) -> list[Path]:
    """Directories of a launched server's socket."""
    return list(tmp_path.glob("rlswitch-socket-*"))


def test_a_killed_owner_takes_its_engine_along(tmp_path: Path, engine: str) -> None:
    owner, pids, files = start_owner(tmp_path, engine, "time.sleep(600)")
    assert len(pids) >= 2 and not gone(pids) and len(left(files)) == len(files)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert wait_until(lambda: gone(pids)), [psutil.Process(p) for p in pids if psutil.pid_exists(p)]
    assert wait_until(lambda: not left(files)), left(files)
    assert not sockets(tmp_path)


def test_an_ordinary_end_leaves_nothing(tmp_path: Path, engine: str) -> None:
    owner, pids, files = start_owner(tmp_path, engine, "time.sleep(3)")
    assert owner.wait(timeout=120) == 0
    assert gone(pids) and not left(files)
    assert not sockets(tmp_path)
