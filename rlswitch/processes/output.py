"""vLLM logs to a file of the run, which keeps the run's own output readable."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def redirected_output(path: Path) -> Iterator[None]:
    """Sends stdout and stderr of this process, and of processes started inside, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, source in zip((1, 2), saved, strict=True):
                os.dup2(source, target)
                os.close(source)


def log_to_file(path: Path) -> None:
    """Sends the log of vLLM's client in this process to the file of its engine core."""
    logging.getLogger("vllm").handlers = [logging.FileHandler(path)]


def tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def last_error(path: Path) -> str | None:
    """The last exception or error in a log."""
    found = re.findall(r"\b(?:\w*(?:Error|Exception)|error): .*", path.read_text(errors="replace"))
    return found[-1] if found else None
