"""Calls that are answered before torch is imported: nobody should wait for it to hear of a typo.

transformers reads tokenizers and configurations without torch, but only in a process that never had it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

from rlswitch.types import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


def without_torch(function: Callable[P, T], *args: P.args, **given: P.kwargs) -> T:
    """`function(*args, **given)`, from a forked child that finds no torch. Its result must be picklable.

    Called right here where torch is imported already, and where the child could do nothing without it.
    Raises what `function` raises.
    """
    if "torch" in sys.modules:
        return function(*args, **given)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=_answer, args=(theirs, lambda: function(*args, **given)), daemon=True
    )
    child.start()
    theirs.close()
    try:
        result, refusal = ours.recv()
    except EOFError:  # it had no answer, or was killed: whatever it was is met here again
        return function(*args, **given)
    finally:
        ours.close()
    child.join()
    if refusal:
        raise refusal
    return result


def _answer(connection: Connection, call: Callable[[], object]) -> None:
    """Sends (result, None) or (None, the ConfigError); nothing where only torch would tell."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that it is not
    with suppress(Exception, KeyboardInterrupt), connection:
        try:
            connection.send((call(), None))
        except ConfigError as error:
            if not _for_want_of_a_module(error):
                connection.send((None, ConfigError(*error.problems)))


def _for_want_of_a_module(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ImportError):
            return True
        error = error.__cause__ or error.__context__
    return False
