"""Processes that start warm: forked from a server that has imported torch and vLLM once (docs/starting.md).

Spawned, vLLM's engine core and workers and the jobs of a sweep would each import them again. The server does
so while this process does, computes nothing and touches no GPU. vLLM's own
VLLM_WORKER_MULTIPROC_METHOD=forkserver only works for its API server, not for LLM.
"""

import atexit
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
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
"""Before 3.11.1 any user of the machine could make the server run things (CVE-2022-42919); from 3.14 on it
asks for a key that its children do not inherit."""

DIRECTORY = "RLSWITCH_FORK_SERVER_DIRECTORY"
"""Environment variable: the socket directory, which the server removes if its owner was killed."""

_get_context = multiprocessing.get_context
_forkserver: Any = forkserver._forkserver


def prepare() -> None:
    """Starts the server unless it runs already. Processes requested before it is ready wait for it."""
    if not SUPPORTED or _forkserver._forkserver_address is not None:
        return
    forkserver.set_forkserver_preload([f"{__package__}.preload"])
    root, before = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *([before] if before else [])])
    os.environ[DIRECTORY] = multiprocessing.util.get_temp_dir()
    try:
        with redirected_output(Path(os.devnull)):  # this process prints the same warnings
            forkserver.ensure_running()
        atexit.register(_end_server, os.getpid())
    finally:
        del os.environ[DIRECTORY], os.environ["PYTHONPATH"]
        os.environ.update({"PYTHONPATH": before} if before is not None else {})


def _end_server(owner: int) -> None:
    """Kills the server, which would otherwise outlive its last client, and so us, for a moment."""
    pid, _forkserver._forkserver_pid = _forkserver._forkserver_pid, None
    if pid is not None and os.getpid() == owner:
        signal.signal(signal.SIGINT, _leave_nothing)  # killed, the server removes no directory
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _leave_nothing(*_: object) -> None:
    shutil.rmtree(multiprocessing.util.get_temp_dir(), ignore_errors=True)
    os._exit(INTERRUPTED)


def socket_directory() -> str | None:
    """The server's socket directory, for its children to remove if the owner was killed."""
    address = _forkserver._forkserver_address
    return os.path.dirname(address) if address else None


@contextmanager
def serving_vllm(warm: bool) -> Iterator[None]:
    """Inside, the processes that vLLM spawns are forked from the server, if `warm`.

    vLLM takes no multiprocessing context from its caller, so this patches multiprocessing.get_context.
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
    """Starts `target(*args)`, importable, in its own process group, out of reach of a terminal's Ctrl-C.

    `environment` and the file descriptors `outputs` (stdout, stderr) default to ours.
    """
    if warm:
        prepare()
    kind = WarmProcess if warm and SUPPORTED else _ColdProcess
    process = kind(target=_in_own_group, args=(target, *args))
    process.environment, process.outputs = environment, outputs
    process.start()
    return process


class _Travelling:
    """A process that sets environment and output before anything else of it is unpickled."""

    environment: Mapping[str, str] | None = None
    """None: that of the process that starts it."""
    outputs = (1, 2)

    def __reduce__(self) -> tuple[Any, ...]:
        environment = dict(os.environ if self.environment is None else self.environment)
        streams = [DupFd(descriptor) for descriptor in self.outputs]
        state = {**self.__dict__, "environment": None, "outputs": (1, 2)}
        return _arrive, (type(self), environment, streams), state


class WarmProcess(_Travelling, ForkServerProcess):
    """Forked from the server."""

    def join(self, timeout: float | None = None) -> None:
        """Waits until it has ended, even if the server was killed; the exit code is then 255."""
        super().join(timeout)  # returns at once if the server was killed
        if self.exitcode == 255:
            with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                psutil.Process(self.pid).wait(timeout)


class _ColdProcess(_Travelling, SpawnProcess):
    """A new interpreter."""


class _WarmContext(ForkServerContext):
    Process = WarmProcess


def _warm_context(method: str | None = None) -> Any:
    return _WarmContext() if method in ("spawn", "forkserver") else _get_context(method)


def _arrive(kind: type[_Travelling], environment: Mapping[str, str], streams: Sequence[Any]) -> _Travelling:
    """Runs first in the new process. The processes that it starts come from the same server."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # cached from the server's environment
    for target, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream.detach(), target)
    for text in (sys.stdout, sys.stderr):  # inherited from the server, whose output nobody reads
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if issubclass(kind, WarmProcess):
        # Python would start a second server here, although the first has just passed on its address.
        _forkserver.ensure_running = partial(_replace_if_dead, os.getppid(), _forkserver.ensure_running)
        multiprocessing.get_context = _warm_context
    return kind.__new__(kind)


def _replace_if_dead(server: int, start: Callable[[], None]) -> None:
    if os.getppid() == server:
        return
    if _forkserver._forkserver_pid is None:
        # The new server needs a directory of its own: the old one's is shared and outlives us.
        multiprocessing.process.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
    start()


def _in_own_group(target: Callable[..., object], *args: Any) -> None:
    leave_group()
    target(*args)


def leave_group() -> None:
    """Leaves the terminal's process group, which Ctrl-C goes to: the run ends its children in order.

    Not a new session: Linux first shares the cores between sessions, and processes that take turns must yield
    to each other (a waiting vLLM worker spins, and in another session would keep one core of two).
    """
    if os.getsid(0) != os.getpid():  # a session leader leads a group already and may not leave it
        os.setpgrp()
