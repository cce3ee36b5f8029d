"""Whether a process forked from the fork server can use CUDA: not once an import has initialised it there."""

import ctypes
import platform
import sys
from functools import cache

from rlswitch.processes.fork_server import SUPPORTED, start_process

NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED
ANSWER_SECONDS = 60


def driver_status() -> int | None:
    """The driver's answer to a call that needs cuInit, without making it; None without a driver."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    except OSError:
        return None


@cache
def forks_are_usable() -> bool:
    """Asks a process of the fork server, once; prints a line if CUDA is unusable there."""
    if not SUPPORTED or driver_status() is None:  # nothing is forked, or there is no CUDA
        return True
    if "microsoft" in platform.release().lower():
        problem = "under WSL2 NVIDIA's driver does not survive a fork"
    else:
        problem = fork_problem(ask_fork())
    if problem:
        print(f"rlswitch: engines start cold, without the fork server: {problem}", file=sys.stderr)
    return not problem


def fork_problem(code: int | None) -> str:
    """What is wrong with the fork server whose child `tell_status` exits with `code`; empty if nothing is."""
    what = {0: "an import has initialised CUDA in it", None: "it does not answer", NOT_INITIALIZED: ""}
    return what.get(code, f"cuDeviceGetCount = {code} in its child, not {NOT_INITIALIZED}")


def ask_fork() -> int | None:
    """The exit code of `tell_status` in a forked process; None if it does not start or end."""
    try:
        process = start_process(tell_status, [])
    except (OSError, EOFError):  # the server has died
        return None
    process.join(ANSWER_SECONDS)
    if (code := process.exitcode) is None:
        process.kill()
    return code


def tell_status() -> None:
    status = driver_status()
    sys.exit(NOT_INITIALIZED if status is None else min(status, 254))  # 255: the server was killed
