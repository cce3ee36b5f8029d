"""Breaks off a call to processes that have died or fallen silent.

vLLM's synchronous client waits for an answer without a limit, and still does so when its engine core has
been killed (0.32): a monitor thread closes the sockets, and nobody wakes the caller. A signal does.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NamedTuple

import psutil

from rlswitch.config.sections import EngineConfig
from rlswitch.errors import EngineLost

BREAK_OFF = signal.SIGRTMIN + 5
"""To ourselves, and of no meaning to anybody else."""
LOOK_SECONDS = 0.5


class Patience(NamedTuple):
    """How long vLLM may be silent, and the setting that says so."""

    setting: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.setting} = {self.seconds:g}"


def at_start(config: EngineConfig) -> Patience:
    """The first forward passes build what later ones only use."""
    return Patience("engine.start_timeout_s", config.start_timeout_s)


def at_work(config: EngineConfig) -> Patience:
    return Patience("engine.request_timeout_s", config.request_timeout_s)


class _BrokenOff(BaseException):
    """What the signal raises: no `except Exception` on the way out of a library may take it for its own."""


_guarded: Guard | None = None
"""The call that the main thread is in."""


@contextmanager
def guard(processes: Sequence[psutil.Process], patience: Patience) -> Iterator[Callable[[], None]]:
    """Raises EngineLost out of the body once one of `processes` is gone, or silent beyond `patience`.

    Yields what is to be called whenever it was heard of. Only the main thread can be interrupted: in
    another one the body runs as it is.
    """
    global _guarded
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    if signal.getsignal(BREAK_OFF) is not _interrupt:
        signal.signal(BREAK_OFF, _interrupt)
    call = Guard(processes, patience)
    try:
        try:
            _guarded = call
            call.start()
            yield call.hear
        finally:
            _guarded = None
    except _BrokenOff:
        raise EngineLost(call.reason) from None
    except Exception as error:
        if call.reason:  # a library has taken it for a failure of its own
            raise EngineLost(call.reason) from error
        raise
    finally:
        call.stop()


def has_ended(processes: Sequence[psutil.Process]) -> bool:
    """Whether one of them is no longer there, or only as a zombie."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                continue
        return True
    return False


class Guard:
    """One guarded call: a thread that waits for the end of the processes, of the silence, or of the call."""

    def __init__(self, processes: Sequence[psutil.Process], patience: Patience):
        self.reason = ""
        self._patience = patience
        self._heard = time.monotonic()
        self._processes = processes
        self._caller = threading.get_ident()
        self._over = os.eventfd(0)
        self._thread = threading.Thread(target=self._watch, name="rlswitch-guard", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hear(self) -> None:
        self._heard = time.monotonic()

    def stop(self) -> None:
        os.eventfd_write(self._over, 1)
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._over)

    def _watch(self) -> None:
        poller, handles = select.poll(), []
        poller.register(self._over, select.POLLIN)
        try:
            for process in self._processes:
                with suppress(ProcessLookupError):
                    handles.append(os.pidfd_open(process.pid))
                    poller.register(handles[-1], select.POLLIN)
            while not self._is_over(dict(poller.poll(1000 * LOOK_SECONDS))):
                pass
        finally:
            for handle in handles:
                os.close(handle)

    def _is_over(self, events: dict[int, int]) -> bool:
        if self._over in events:
            return True
        if events or has_ended(self._processes):
            self.reason = "has died"
        elif time.monotonic() - self._heard > self._patience.seconds:
            self.reason = f"was silent for {self._patience}"
        else:
            return False
        signal.pthread_kill(self._caller, BREAK_OFF)
        return True


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _guarded is not None and _guarded.reason:
        raise _BrokenOff
