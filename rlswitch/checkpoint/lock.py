"""One run in a run directory: two would write the same files and remove each other's checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlswitch.errors import ConfigError

LOCK = ".lock"


@contextmanager
def only_run_in(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Makes `directory` and holds it while the block runs. Raises ConfigError: another has it, or nobody can.

    The kernel lets go of the lock when its owner dies, however it does, and closes the file in every program
    that the owner starts (PEP 446): no engine and no reward process can keep it.
    """
    handle = _take(directory, say)
    try:
        yield
    finally:
        with suppress(OSError):  # somebody has removed it
            if os.listdir(directory) == [LOCK]:  # refused before anything was made
                (directory / LOCK).unlink()
                directory.rmdir()
        os.close(handle)


def _take(directory: Path, say: Callable[[str], None]) -> int:
    path = directory / LOCK
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(directory, error) from error
        try:
            _lock(handle, directory, say)
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(handle)):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
                return handle
        except OSError as error:
            os.close(handle)
            raise _unwritable(directory, error) from error
        except ConfigError:
            os.close(handle)
            raise
        os.close(handle)  # its owner has just removed it: there is another file now, or none


def _lock(handle: int, directory: Path, say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"output_dir = {directory}: {_owner(handle)} has it; both would write the same files; wait for"
            " its end, or set another output_dir"
        ) from error
    except OSError as error:  # some network file systems
        say(f"{directory} cannot be locked ({error.strerror}): see to it that no second run uses it")


def _owner(handle: int) -> str:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"a run with pid {owner['pid']} on host {owner['host']}"
    except (ValueError, KeyError, TypeError):  # it has not said so yet
        return "another run"


def _unwritable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"output_dir = {directory}: cannot be written to ({error.strerror}); nothing of the run would be"
        " kept; set a directory that can"
    )
