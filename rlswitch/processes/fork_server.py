"""Processes that start warm: forked from a server that has imported torch and vLLM once.

vLLM runs its engine core and its workers in processes of their own, and a sweep runs its jobs so. Started
plainly each of them imports the same libraries anew, one after the other: most of the time until the first
token of a small model. The server imports them while this process does, computes nothing, touches no GPU,
and is forked whenever vLLM asks for a process to be spawned. docs/starting.md says what that saves.

vLLM's own API server has the idea too (VLLM_WORKER_MULTIPROC_METHOD=forkserver), but not its LLM class.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import psutil

from rlswitch.processes.exit import INTERRUPTED
from rlswitch.processes.output import redirected_output

SUPPORTED = (3, 11, 1) <= sys.version_info < (3, 14)
"""Before, any user of the machine could have the server run things (CVE-2022-42919); later ones give it a key
that its children do not inherit."""

DIRECTORY = "RLSWITCH_FORK_SERVER_DIRECTORY"
"""Where it listens: it removes that when it ends, for its owner may have been killed."""

_get_context = multiprocessing.get_context


def prepare() -> None:
    """Starts the server unless there is one. It is ready some seconds later; who asks before that waits."""
    server: Any = forkserver._forkserver
    if not SUPPORTED or server._forkserver_address is not None:
        return
    forkserver.set_forkserver_preload([f"{__package__}.preload"])
    root, before = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *([before] if before else [])])
    os.environ[DIRECTORY] = multiprocessing.util.get_temp_dir()
    try:
        with redirected_output(Path(os.devnull)):  # what the imports have to say is said again here
            forkserver.ensure_running()
        atexit.register(_end_server, os.getpid())
    finally:
        del os.environ[DIRECTORY]
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _end_server(owner: int) -> None:
    """It would end by itself soon after its last client; nothing of ours is to outlive us even so long."""
    server: Any = forkserver._forkserver
    pid, server._forkserver_pid = server._forkserver_pid, None
    if pid is not None and os.getpid() == owner:
        signal.signal(signal.SIGINT, _leave_nothing)  # killed, it removes no directory
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _leave_nothing(*_: object) -> None:
    shutil.rmtree(multiprocessing.util.get_temp_dir(), ignore_errors=True)
    os._exit(INTERRUPTED)


def socket_directory() -> str | None:
    """Where the server listens, in one of its children: a killed owner cannot remove it any more."""
    address = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
    return os.path.dirname(address) if address else None


@contextmanager
def serving_vllm(warm: bool) -> Iterator[None]:
    """While it is open the processes that vLLM spawns are forked from the server, if `warm`.

    By way of multiprocessing.get_context, where vLLM asks for them: it takes no context from its caller.
    """
    if warm and SUPPORTED:
        prepare()
        multiprocessing.get_context = _warm_context
    try:
        yield
    finally:
        multiprocessing.get_context = _get_context


def start_process(
    target: Callable[..., object],
    args: Sequence[Any],
    *,
    environment: Mapping[str, str] | None = None,
    outputs: tuple[int, int] = (1, 2),
    warm: bool = True,
) -> multiprocessing.process.BaseProcess:
    """Starts `target(*args)`, out of the reach of a terminal's Ctrl-C.

    `environment` and the file descriptors `outputs` (stdout, stderr) are ours by default. `target` must be
    importable, as with any spawned process.
    """
    warm = warm and SUPPORTED
    process = (WarmProcess if warm else _ColdProcess)(target=_in_own_group, args=(target, *args))
    process.environment = dict(environment or os.environ)
    process.outputs = outputs
    if warm:
        prepare()
    process.start()
    return process


class _Travelling:
    """Takes environment and output along, in place before anything of the process is unpickled."""

    environment: Mapping[str, str] | None = None
    """By default this process's, as it is when the process starts."""
    outputs = (1, 2)

    def __reduce__(self) -> tuple[Any, ...]:
        environment = dict(os.environ) if self.environment is None else self.environment
        streams = [DupFd(descriptor) for descriptor in self.outputs]
        state = {**self.__dict__, "environment": None, "outputs": (1, 2)}
        return _arrive, (type(self), environment, streams), state


class WarmProcess(_Travelling, ForkServerProcess):
    """Forked from the server."""

    def join(self, timeout: float | None = None) -> None:
        """Until it has ended, also where the server was killed and cannot tell: the exit code is 255 then."""
        deadline = None if timeout is None else time.monotonic() + timeout
        super().join(timeout)
        if self.exitcode == 255:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                psutil.Process(self.pid).wait(left)


class _ColdProcess(_Travelling, SpawnProcess):
    """A new interpreter."""


class _WarmContext(ForkServerContext):
    Process = WarmProcess


def _warm_context(method: str | None = None) -> Any:
    return _WarmContext() if method in ("spawn", "forkserver") else _get_context(method)


def _arrive(kind: type[_Travelling], environment: Mapping[str, str], streams: Sequence[Any]) -> _Travelling:
    """In the new process, first of all. What it starts in turn comes from the same server."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # what the server found in its own environment
    for target, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream.detach(), target)
    for text in (sys.stdout, sys.stderr):  # made by the server, for whom nobody listens
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if issubclass(kind, WarmProcess):
        # Python itself would start a second server here, though it has just told us where ours is.
        forkserver._forkserver.ensure_running = partial(  # type: ignore[method-assign]
            _replace_if_dead, os.getppid(), forkserver._forkserver.ensure_running
        )
        multiprocessing.get_context = _warm_context
    return kind.__new__(kind)


def _replace_if_dead(server: int, start: Callable[[], None]) -> None:
    if os.getppid() == server:
        return
    if forkserver._forkserver._forkserver_pid is None:  # type: ignore[attr-defined]
        # Another one listens in a directory of ours: the server's is for others too, and outlives us.
        multiprocessing.process.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
    start()


def _in_own_group(target: Callable[..., object], *args: Any) -> None:
    leave_group()
    target(*args)


def leave_group() -> None:
    """A terminal sends Ctrl-C to one group of processes, and ours ends its children in order.

    Not a session: Linux shares the cores out by session first, and what takes turns here has to yield to
    each other (vLLM's waiting workers spin, and another session's would keep a core of two).
    """
    if os.getsid(0) != os.getpid():  # who leads a session leads a group already, and may not leave it
        os.setpgrp()
