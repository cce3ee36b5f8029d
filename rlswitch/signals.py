"""What signals mean to a run: the end after this step, or the end now."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import NoReturn

from rlswitch.leave import INTERRUPTED

POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""A scheduler's, and the end of the terminal."""

Handler = Callable[[int, FrameType | None], object]


def listen_for_signals(stack: ExitStack) -> list[str]:
    """Collects POLITE ones instead of dying of them: the loop saves after its step, and ends.

    One that comes during a save is one more name in the list: the save goes on, and is the last.
    """
    received: list[str] = []
    for number in POLITE:
        _handle(number, lambda n, frame: received.append(signal.Signals(n).name), stack)
    return received


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
