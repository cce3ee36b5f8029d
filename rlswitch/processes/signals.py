"""What signals mean to a run: the end after this step, or the end now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import NoReturn

from rlswitch.errors import Preempted
from rlswitch.processes.exit import INTERRUPTED, POLITE

Handler = Callable[[int, FrameType | None], object]

_raised: list[BaseException] = []
"""By handlers of ours."""


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
            _raised.append(Abandoned())
            raise _raised[-1]


@contextmanager
def preemptible() -> Iterator[StopSignals]:
    """Around a whole command: a stop signal breaks it off, until somebody inside has decided when it may.

    Raises Preempted then.
    """
    stop = StopSignals()
    with handling(POLITE, stop.receive):
        try:
            with stop.abandoning():
                yield stop
        except Abandoned:
            raise Preempted(
                f"stopped by {stop.names[0]} before the first step; run the same command again to go on"
            ) from None


@contextmanager
def let_through() -> Iterator[None]:
    """Raises an interrupt that comes inside, also where a library has taken it for a failure of its own."""
    count = len(_raised)
    try:
        yield
    except Exception:
        if len(_raised) == count:
            raise
    if len(_raised) > count:
        raise _raised[-1]


def leave_at_second_interrupt(stack: ExitStack) -> None:
    """The first Ctrl-C takes the run down in order, the next one ends the process as it is.

    Engine and reward processes notice that themselves (engines/processes.py, rewards/keeper.py).
    """
    asked: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        if asked:
            os._exit(INTERRUPTED)
        asked.append(number)
        _raised.append(KeyboardInterrupt())
        raise _raised[-1]

    stack.enter_context(handling([signal.SIGINT], interrupt))


@contextmanager
def handling(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    """While it is open; what we were started to ignore, as by nohup, we ignore."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers in the main thread only
        return
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
