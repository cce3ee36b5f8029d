"""Runs programs as a user does, in separate processes, but imports the libraries only once."""

import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from rlswitch.command.cli import run_job
from rlswitch.processes.fork_server import start_process


class Finished(NamedTuple):
    returncode: int | None
    stdout: str
    stderr: str


def start(
    target: Callable[[list[str]], object],
    words: Sequence[object],
    cwd: Path,
    outputs: tuple[int, int],
    **variables: str,
) -> BaseProcess:
    """Starts `target(words)` in `cwd`; `outputs` are the file descriptors of its stdout and stderr."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | variables
    args = [target, str(cwd), [str(word) for word in words]]
    return start_process(_in_directory, args, environment=environment, outputs=outputs)


def finish(
    target: Callable[[list[str]], object], words: Sequence[object], cwd: Path, timeout: float = 1000
) -> Finished:
    """Runs `target(words)` until it exits, or kills it."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start(target, words, cwd, (stdout.fileno(), stderr.fileno()))
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        printed = [file.seek(0) or file.read() for file in (stdout, stderr)]
    return Finished(process.exitcode, *printed)


def train(words: list[str]) -> None:
    """train.py."""
    run_job(words)


def program(words: list[str]) -> None:
    """`python words[0] words[1:]`."""
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _in_directory(target: Callable[[list[str]], object], cwd: str, words: list[str]) -> None:
    os.chdir(cwd)
    target(words)
