"""An answer before torch is imported: nobody should wait for it to hear of a typo.

transformers reads tokenizers and configurations without torch, but only in a process that never had it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

from rlswitch.errors import ConfigError
from rlswitch.processes.exit import POLITE

P = ParamSpec("P")
T = TypeVar("T")


class Torchless:
    """A forked process that finds no torch: it imports transformers at once, and is asked one thing.

    There is none where torch is imported already. Then, and where question or answer cannot be pickled, or
    it has none, the question is answered in this process.
    """

    def __init__(self) -> None:
        self._child: multiprocessing.process.BaseProcess | None = None
        if "torch" in sys.modules:
            return
        self._connection, theirs = multiprocessing.Pipe()
        self._child = multiprocessing.get_context("fork").Process(
            target=_serve, args=(theirs, self._connection)
        )
        self._child.start()
        theirs.close()

    def ask(self, function: Callable[P, T], *args: P.args, **given: P.kwargs) -> Callable[[], T]:
        """Calls `function` there; what is returned waits for the result, or raises what `function` raised."""
        call = partial(function, *args, **given)
        if self._child is None:
            return call
        try:
            self._connection.send(call)
        except Exception:  # it has ended, or the question cannot be pickled
            self.close()
            return call

        def answer() -> T:
            with closing(self):
                try:
                    result, refusal = self._connection.recv()
                except (EOFError, OSError):  # killed, or without an answer: what kept it from one is met here
                    return call()
            if refusal:
                raise refusal
            return result

        return answer

    def close(self) -> None:
        if self._child is not None:
            self._connection.close()
            self._child.kill()
            self._child.join()


def _serve(connection: Connection, others: Connection) -> None:
    """Sends (result, None) or (None, the ConfigError); nothing where only torch would tell."""
    others.close()  # so that this process ends with its owner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C: the owner ends it
    for number in POLITE:
        signal.signal(number, signal.SIG_DFL)
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that it is not
    with suppress(Exception), connection:
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401  (which takes a second or two)

        call = connection.recv()
        try:
            result = call()
            sys.stdout.flush()  # who has its answer waits no longer
            connection.send((result, None))
        except ConfigError as error:
            if not _for_want_of_a_module(error):
                connection.send((None, ConfigError(*error.problems)))


def _for_want_of_a_module(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ImportError):
            return True
        error = error.__cause__ or error.__context__
    return False
