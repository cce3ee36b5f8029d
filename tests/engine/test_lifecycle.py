"""The engine's processes die with ours, however ours dies, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

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


def start_owner(tmp_path: Path, engine: str, then: str) -> tuple[subprocess.Popen, list[int], Path]:
    """A process that owns an engine; returns it with the engine's pids and its publish directory."""
    script = tmp_path / "owner.py"
    here = str(Path(__file__).parent)
    script.write_text(OWNER.format(here=here, directory=str(tmp_path), engine=engine, then=then))
    owner = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    *pids, root = owner.stdout.readline().split()
    return owner, [int(pid) for pid in pids], Path(root)


def gone(pids: list[int]) -> bool:
    return not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    )


def wait_until(condition, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def engine_files() -> set[str]:
    names = os.listdir("/dev/shm")
    return {name for name in names if name.startswith(("psm_", "sem.mp-", "rlswitch-"))}


def sockets(tmp_path: Path) -> list[Path]:
    """Directories of a launched server's socket."""
    return list(tmp_path.glob("rlswitch-socket-*"))


def test_a_killed_owner_takes_its_engine_along(tmp_path: Path, engine: str) -> None:
    before = engine_files()
    owner, pids, root = start_owner(tmp_path, engine, "time.sleep(600)")
    assert len(pids) >= 2 and not gone(pids) and root.is_dir()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert wait_until(lambda: gone(pids)), [psutil.Process(p) for p in pids if psutil.pid_exists(p)]
    assert wait_until(lambda: not root.exists() and engine_files() <= before)
    assert not sockets(tmp_path)


def test_an_ordinary_end_leaves_nothing(tmp_path: Path, engine: str) -> None:
    before = engine_files()
    owner, pids, root = start_owner(tmp_path, engine, "pass")
    assert owner.wait(timeout=120) == 0
    assert gone(pids) and not root.exists() and engine_files() <= before
    assert not sockets(tmp_path)
