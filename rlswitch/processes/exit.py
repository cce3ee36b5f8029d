"""Leaving the process with the exit code that was meant."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from typing import NoReturn

POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""A scheduler's, and the end of the terminal."""
DONE, FAILED, WRONG_CONFIG, NOT_PROVEN, PREEMPTED, INTERRUPTED = 0, 1, 2, 3, 75, 130


def leave(code: int) -> NoReturn:
    """Runs the exit handlers and ends the process without tearing the interpreter down.

    torch, vLLM and W&B keep native threads. Now and then one of them is still running when its library
    is unloaded, and the process ends with SIGABRT ("terminate called without an active exception")
    instead of `code`: seen once in about thirty runs, after a push that could not be proven.
    """
    for number in POLITE:
        signal.signal(number, signal.SIG_IGN)  # we are leaving
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))  # somebody cannot wait
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed by whoever reads it
            continue
    os._exit(code)
