"""Calls that are answered before torch is imported: nobody should wait for it to hear of a typo.

transformers reads tokenizers and configurations without torch, but only in a process that never had it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

from rlswitch.types import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def without_torch(function: Callable[P, T], *args: P.args, **given: P.kwargs) -> Iterator[Callable[[], T]]:
    """Calls `function` in a forked child that finds no torch; yields what waits for its result.

    That calls it in this process where torch is imported already, and where the child could not answer
    without it. The result must be picklable. Raises what `function` raises.
    """
    call = partial(function, *args, **given)
    if "torch" in sys.modules:
        yield call
        return
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_answer, args=(theirs, call))
    child.start()
    theirs.close()

    def answer() -> T:
        try:
            result, refusal = ours.recv()
        except EOFError:  # it had no answer, or was killed: whatever it was is met here again
            return call()
        if refusal:
            raise refusal
        return result

    try:
        yield answer
    finally:
        child.kill()
        child.join()
        ours.close()


def _answer(connection: Connection, call: Callable[[], object]) -> None:
    """Sends (result, None) or (None, the ConfigError); nothing where only torch would tell."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that it is not
    with suppress(Exception, KeyboardInterrupt), connection:
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
