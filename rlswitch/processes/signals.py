"""What signals mean to a run: stop after this step, or stop now."""

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
"""The interrupts that our handlers have raised."""


class Abandoned(BaseException):
    """A stop signal interrupts work that loses nothing. Not an Exception, so that no library catches it."""


class StopSignals:
    """The stop signals received so far. They stop the run after its step, or inside `abandoning` at once.

    During a save a signal is only noted: the save completes and is the last.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._may_abandon = False

    def __bool__(self) -> bool:
        return bool(self.names)

    @contextmanager
    def abandoning(self) -> Iterator[None]:
        """Inside, a stop signal raises Abandoned; after an earlier one entering does."""
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
    """Wraps a whole command: a stop signal raises Preempted until the code inside enters `abandoning`."""
    stop = StopSignals()
    with handling(POLITE, stop.receive):
        try:
            with stop.abandoning():
                yield stop
        except Abandoned:
            raise Preempted(
                f"stopped by {stop.names[0]} before the first step; run the same command again to resume"
            ) from None


@contextmanager
def reraise_interrupts() -> Iterator[None]:
    """Raises an interrupt that arrived inside even if a library swallowed it or turned it into an error."""
    count = len(_raised)
    try:
        yield
    except Exception:
        if len(_raised) == count:
            raise
    if len(_raised) > count:
        raise _raised[-1]


def leave_at_second_interrupt(stack: ExitStack) -> None:
    """The first Ctrl-C raises KeyboardInterrupt, the second ends the process immediately.

    Engine and reward processes then notice that their owner has died, and end too.
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
    """Installs `handler` inside. Signals ignored since start-up (nohup) stay ignored."""
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
