"""Exit codes, and an exit that keeps them."""

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Stop signals: a scheduler's, and that of a closed terminal."""
DONE, FAILED, WRONG_CONFIG, NOT_PROVEN, PREEMPTED, INTERRUPTED = 0, 1, 2, 3, 75, 130


def leave(code: int) -> NoReturn:
    """Exits without tearing down native threads, which could overwrite the exit code.

    torch, vLLM and W&B keep native threads. If one still runs while its library is unloaded, the process
    dies of SIGABRT ("terminate called without an active exception"): seen once in about thirty runs.
    """
    for number in POLITE:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))  # a second Ctrl-C does not wait
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has closed it
            stream.flush()
    os._exit(code)
