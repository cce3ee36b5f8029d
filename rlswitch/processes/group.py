"""The processes of an engine: ended together, whoever dies first, without leaving files behind."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil

from rlswitch.processes.fork_server import socket_directory

VARIABLE = "RLSWITCH_OWNER"
SHUTDOWN_SECONDS = 30.0


class Owner(NamedTuple):
    """The run that owns an engine's processes, passed to them in RLSWITCH_OWNER."""

    pid: int = 0
    """The run's; 0: no run owns them, as with a server that a user started."""
    server: int = 0
    """vLLM's server between the run and the engine core, if there is one."""
    directories: Sequence[str] = ()
    """Directories of the run, removed should the run be killed."""

    @classmethod
    def read(cls) -> Self:
        return cls(**json.loads(os.environ.get(VARIABLE, "{}")))

    def variable(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(self._asdict())}


class ProcessGroup:
    """The processes of one engine, found from the pids of its workers and their cores."""

    def __init__(self, pids: Sequence[int] = (), files: Iterable[str] = ()):
        """`files`: more of their files, removed at the end."""
        found: dict[int, psutil.Process] = {}
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                top = psutil.Process(pid)
                found |= {it.pid: it for it in (top, *top.children(recursive=True))}
        self.processes = list(found.values())
        self.vital = [process for process in self.processes if process.pid in pids]
        """The ones nothing works without, unless they have ended already."""
        self._files = shared_memory_of(process.pid for process in self.processes) | set(map(Path, files))

    def end(self, ask: Callable[[], object]) -> None:
        """Calls `ask`, kills whatever is left, and removes its shared memory."""
        self._files |= shared_memory_of(process.pid for process in self.processes)  # mapped since
        with suppress(Exception):  # they may be dead already
            ask()
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.processes, timeout=SHUTDOWN_SECONDS)
        for file in self._files:
            file.unlink(missing_ok=True)


def shared_memory_of(pids: Iterable[int]) -> set[Path]:
    """Python's shared memory and semaphores that these processes have mapped; vLLM, killed, leaves them."""
    files = set()
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                name = line.split(maxsplit=5)[5:]
                if name and name[0].startswith(("/dev/shm/psm_", "/dev/shm/sem.mp-")):
                    files.add(Path(name[0].removesuffix(" (deleted)")))
    return files


def own_family() -> list[int]:
    """In a worker: its pid and its engine core's, which may be the same process."""
    core = multiprocessing.parent_process()  # the original one, whoever has adopted us since
    return [os.getpid()] if core is None or core.pid in (None, Owner.read().pid) else [os.getpid(), core.pid]


def kin_of(workers: Sequence[dict[str, Any]]) -> tuple[list[int], list[str]]:
    """Pids and files of an engine, as its workers' `memory` reports them."""
    pids = [pid for worker in workers for pid in worker["family"]]
    return pids, [file for worker in workers for file in worker["files"]]


def watch_owner(files: Sequence[str] = ()) -> None:
    """Ends this process and its engine core as soon as a process they depend on has ended.

    dies first        ends with it                      removed
    the run           server, engine core, workers      their shared memory and `files`, the run's directories
    server or core    the others of these               the same, but the directories stay with the run,
                                                        unless it dies too within half a second
    a worker          nothing here: vLLM notices

    vLLM's engine core does not notice the death of its parent (vllm#55510): after kill -9 of the run it would
    hold the device for ever. Watched by pidfd, because a pid can be reused.
    """
    owner = Owner.read()
    if not owner.pid:
        return
    directories = list(owner.directories)
    parent = psutil.Process().parent()
    if parent is not None and parent.ppid() == owner.pid:  # else the fork server is a sweep's, which lives on
        directories += [it for it in [socket_directory()] if it]
    others = {owner.server, *own_family()} - {0, owner.pid, os.getpid()}
    threading.Thread(target=_end_with, args=(owner.pid, others, directories, files), daemon=True).start()


def _end_with(owner: int, others: Iterable[int], directories: Sequence[str], files: Sequence[str]) -> None:
    handles: dict[int, int] = {}
    with suppress(ProcessLookupError):  # one has ended already
        for pid in (owner, *others):
            handles[pid] = os.pidfd_open(pid)
        wait(handles.values())
    doomed = own_family()[::-1]
    for file in [*shared_memory_of(doomed), *map(Path, files)]:
        file.unlink(missing_ok=True)
    # A scheduler kills all processes of a job, in any order.
    if owner not in handles or wait([handles[owner]], timeout=0.5):
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
