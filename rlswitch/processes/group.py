"""Ending the engine's processes without leaving anything behind. No vLLM needed here."""

from __future__ import annotations

import multiprocessing
import os
import select
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from rlswitch.processes.fork_server import socket_directory

OWNER_PID = "RLSWITCH_OWNER_PID"
SERVER_PID = "RLSWITCH_SERVER_PID"
PUBLISH_ROOT = "RLSWITCH_PUBLISH_ROOT"
SOCKET_DIRECTORY = "RLSWITCH_SOCKET_DIRECTORY"

SHUTDOWN_SECONDS = 30.0


def shared_memory_of(pids: Iterable[int]) -> set[Path]:
    """Python's shared memory and semaphores that these processes have mapped.

    vLLM's processes talk through them; when one is killed nobody else removes the files.
    """
    files = set()
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                name = line.split(maxsplit=5)[5:]
                if name and name[0].startswith(("/dev/shm/psm_", "/dev/shm/sem.mp-")):
                    files.add(Path(name[0].removesuffix(" (deleted)")))
    return files


def own_family() -> list[int]:
    """In a worker: its pid and its engine core's, which may be one and the same process."""
    core = multiprocessing.parent_process()  # as it was when we were started, whoever adopted us since
    owner = int(os.environ.get(OWNER_PID, "0"))
    return [os.getpid()] if core is None or core.pid in (None, owner) else [os.getpid(), core.pid]


def families_of(pids: Iterable[int]) -> list[psutil.Process]:
    """These processes and whatever they have started."""
    return list({process.pid: process for pid in pids for process in family_of(pid)}.values())


def family_of(pid: int) -> list[psutil.Process]:
    """The process and everything that it has started; nothing once it has gone."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kin_of(workers: Iterable[dict[str, Any]]) -> tuple[list[int], list[str]]:
    """Pids and files of an engine, as its workers tell them (`memory`)."""
    pids = [pid for worker in workers for pid in worker["family"]]
    return pids, [file for worker in workers for file in worker["files"]]


class Family:
    """The processes of one engine, from the workers' and their cores' pids; they end together."""

    def __init__(self, pids: Sequence[int] = (), files: Iterable[str] = ()):
        """`files`: what else of theirs nobody would remove."""
        self.processes = families_of(pids)
        self.vital = [process for process in self.processes if process.pid in pids]
        """Those that nothing works without; one that was gone before we looked is not among them."""
        self._files = shared_memory_of(process.pid for process in self.processes) | set(map(Path, files))

    def end(self, ask: Callable[[], object]) -> None:
        """Asks them to end, ends them, and removes the shared memory that they leave behind."""
        self._files |= shared_memory_of(process.pid for process in self.processes)  # of the living
        with suppress(Exception):  # they may be dead already: what counts comes below
            ask()
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.processes, timeout=SHUTDOWN_SECONDS)
        for file in self._files:
            file.unlink(missing_ok=True)


def watch_owner(files: Sequence[str] = ()) -> None:
    """Ends this process, and the engine core above it, as soon as one is gone that they work for: the run
    that owns them, the server between, or the core.

    vLLM's engine core does not notice the death of its parent (vllm#55510): after a kill -9 of the
    run it would keep the device for ever. A pidfd cannot be fooled by a reused pid. `files` go too.
    """
    owner = int(os.environ.get(OWNER_PID, "0"))
    if owner:
        directories = [os.environ.get(name) for name in (PUBLISH_ROOT, SOCKET_DIRECTORY)]
        parent = psutil.Process().parent()
        if parent is not None and parent.ppid() == owner:  # a job's fork server is the sweep's: it lives on
            directories.append(socket_directory())
        others = {int(os.environ.get(SERVER_PID, "0")), *own_family()} - {0, owner, os.getpid()}
        args = (owner, [owner, *others], [directory for directory in directories if directory], files)
        threading.Thread(target=_end_with, args=args, daemon=True).start()


def _end_with(owner: int, masters: Iterable[int], directories: Sequence[str], files: Sequence[str]) -> None:
    handles: dict[int, int] = {}
    poller, owner_ends = select.poll(), select.poll()
    with suppress(ProcessLookupError):  # one is gone already
        for master in masters:
            handles[master] = os.pidfd_open(master)
            poller.register(handles[master], select.POLLIN)
        poller.poll()
    doomed = own_family()[::-1]
    for file in [*shared_memory_of(doomed), *map(Path, files)]:
        file.unlink(missing_ok=True)
    if owner in handles:
        owner_ends.register(handles[owner], select.POLLIN)
    if owner not in handles or owner_ends.poll(500):  # a scheduler kills all of a job, in any order
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
