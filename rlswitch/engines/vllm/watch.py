"""Interrupts a call to processes that have died or fallen silent.

vLLM's synchronous client waits for an answer without a limit, even after its engine core was killed (0.32):
its monitor thread closes the sockets and does not wake the caller. A signal does.
"""

from __future__ import annotations

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

INTERRUPT = signal.SIGRTMIN + 5
"""Sent by this process to itself; nothing else uses it."""
LOOK_SECONDS = 0.1


class Deadline(NamedTuple):
    """How long vLLM may be silent, and the setting that limits it."""

    setting: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.setting} = {self.seconds:g}"


def at_start(settings: EngineConfig) -> Deadline:
    """The start has its own limit: its first forward passes compile and allocate."""
    return Deadline("engine.start_timeout_s", settings.start_timeout_s)


def at_work(settings: EngineConfig) -> Deadline:
    return Deadline("engine.request_timeout_s", settings.request_timeout_s)


class _Interrupted(BaseException):
    """Raised by the signal; not an Exception, so that no library on the way handles it."""


_guarded: Guard | None = None
"""The call that the main thread is in."""


@contextmanager
def guard(processes: Sequence[psutil.Process], deadline: Deadline) -> Iterator[Callable[[], None]]:
    """Raises EngineLost out of the body when one of `processes` ends, or is silent beyond `deadline`.

    Yields a function to call at every sign of life. Only the main thread can be interrupted; in any other
    the body runs unguarded.
    """
    global _guarded
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    if signal.getsignal(INTERRUPT) is not _interrupt:
        signal.signal(INTERRUPT, _interrupt)
    call = Guard(processes, deadline)
    try:
        try:
            _guarded = call
            call.start()
            yield call.hear
        finally:
            _guarded = None
    except _Interrupted:
        raise EngineLost(call.reason) from None
    except Exception as error:
        if call.reason:  # a library has turned the interrupt into an error of its own
            raise EngineLost(call.reason) from error
        raise
    finally:
        call.stop()


def has_ended(processes: Sequence[psutil.Process]) -> bool:
    """Whether one of them is gone or a zombie."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                continue
        return True
    return False


class Guard:
    """One guarded call of the current thread, and a thread that watches the processes meanwhile."""

    def __init__(self, processes: Sequence[psutil.Process], deadline: Deadline):
        self.reason = ""
        self._processes, self._deadline = processes, deadline
        self._heard = time.monotonic()
        self._caller = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rlswitch-guard", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hear(self) -> None:
        self._heard = time.monotonic()

    def stop(self) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            if has_ended(self._processes):
                self.reason = "has died"
            elif time.monotonic() - self._heard > self._deadline.seconds:
                self.reason = f"was silent for {self._deadline}"
            if self.reason:
                signal.pthread_kill(self._caller, INTERRUPT)
                return
            self._over.wait(LOOK_SECONDS)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _guarded is not None and _guarded.reason:
        raise _Interrupted
