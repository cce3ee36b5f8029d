"""What signals mean to a run: the end after this step, or the end now."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import NoReturn

from rlswitch.leave import INTERRUPTED

POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""A scheduler's, and the end of the terminal."""

Handler = Callable[[int, FrameType | None], object]


class Abandoned(BaseException):
    """Raised out of what a stop signal may break off; not an Exception: nobody on the way is to catch it."""


class StopSignals:
    """The signals that have asked the run to stop: after this step, or at once where that loses nothing.

    One that comes during a save is one more name in the list: the save goes on, and is the last.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._may_abandon = False

    def __bool__(self) -> bool:
        return bool(self.names)

    @contextmanager
    def abandoning(self) -> Iterator[None]:
        """Inside, a stop signal raises Abandoned; one that came before does so at once."""
        if self.names:
            raise Abandoned
        self._may_abandon = True
        try:
            yield
        finally:
            self._may_abandon = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.names.append(signal.Signals(number).name)
        if self._may_abandon:
            self._may_abandon = False
            raise Abandoned


def listen_for_signals(stack: ExitStack) -> StopSignals:
    """Collects POLITE ones instead of dying of them."""
    stop = StopSignals()
    for number in POLITE:
        _handle(number, stop.receive, stack)
    return stop


def leave_at_second_interrupt(stack: ExitStack) -> None:
    """The first Ctrl-C takes the run down in order, the next one ends the process as it is.

    Engine and reward processes notice that themselves (engines/processes.py, rewards/keeper.py).
    """
    asked: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        if asked:
            os._exit(INTERRUPTED)
        asked.append(number)
        raise KeyboardInterrupt

    _handle(signal.SIGINT, interrupt, stack)


def _handle(number: signal.Signals, handler: Handler, stack: ExitStack) -> None:
    """Until `stack` is closed; what the run was started to ignore, as by nohup, it ignores."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        stack.callback(signal.signal, number, signal.signal(number, handler))
