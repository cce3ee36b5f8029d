"""A worker process as the trainer sees it, and the supervisor that ends everything the worker starts."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from typing import Any

from rlswitch.rewards.sandbox.sandbox import signal_name, start_supervisor

DEATH_SECONDS = 10.0
"""How long a worker that closed its connection may take to die."""
OUTPUT_BYTES = 1 << 20
"""How much a worker may print in one call; more ends it."""
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from rlswitch.rewards.workers import worker; "
    "worker.main(int(sys.argv[1]))"
)


class Lost(Exception):
    """The worker died or was ended; the text says why."""


class WorkerProcess:
    """Answers one message at a time (see worker.py)."""

    def __init__(self, memory_bytes: int, log: Callable[[str], None]):
        self._log = log
        self._line = b""
        self._printed = 0
        self._connection, theirs = Pipe()
        self._output, printed = os.pipe()
        spec = {
            "argv": [sys.executable, "-u", "-c", BOOT, str(theirs.fileno()), json.dumps(sys.path)],
            # The device has one holder at a time, and a reward function is never that.
            "env": dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""},
            "limits": {"RLIMIT_DATA": memory_bytes, "RLIMIT_CORE": 0},
            "isolate": False,
            "visible": [],
            "files": {},
            "keep": [theirs.fileno()],
        }
        self._supervisor, self._status = start_supervisor(spec, stdout=printed, stderr=printed)
        os.close(printed)
        theirs.close()

    def ask(self, message: tuple[Any, ...], seconds: float) -> dict[str, Any]:
        """The answer to a message. Raises Lost when the worker dies or takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        self._printed = 0
        try:
            self._connection.send(message)
            while (left := deadline - time.monotonic()) > 0:
                ready = wait([self._connection, self._output, self._status], left)
                if self._output in ready:
                    self._log_lines(os.read(self._output, 1 << 16))
                if self._connection in ready:
                    return json.loads(self._connection.recv_bytes())
                if self._status in ready:
                    raise Lost(self._cause_of_death())
        except (EOFError, OSError) as error:
            raise Lost(self._cause_of_death()) from error
        raise Lost(f"took longer than {seconds:g} s")

    def hang_up(self) -> None:
        """Asks the supervisor to end the process and all that it started."""
        assert self._supervisor.stdin is not None
        with suppress(OSError, ValueError):  # gone already, or asked before
            self._supervisor.stdin.write(b"\n")
            self._supervisor.stdin.close()

    def end(self) -> None:
        """Hangs up and waits until every process is gone."""
        self.hang_up()
        self._supervisor.wait()
        self._connection.close()
        os.close(self._output)
        os.close(self._status)

    def _log_lines(self, piece: bytes) -> None:
        self._printed += len(piece)
        if self._printed > OUTPUT_BYTES:
            raise Lost(f"printed more than {OUTPUT_BYTES} bytes")
        *lines, self._line = (self._line + piece).split(b"\n")
        for line in lines:
            self._log(line.decode(errors="replace"))

    def _cause_of_death(self) -> str:
        with suppress(subprocess.TimeoutExpired):  # it ends with its child, once all is gone
            self._supervisor.wait(DEATH_SECONDS)
        self.hang_up()
        self._supervisor.wait()
        while (piece := os.read(self._output, 1 << 16)) and self._printed <= OUTPUT_BYTES:
            self._printed += len(piece)
            self._line += piece
        last = self._line.decode(errors="replace").strip().splitlines()[-1:]
        status = os.read(self._status, 1 << 16)
        ended = json.loads(status) if status else {}
        if "signal" in ended:
            how = f"by {signal_name(ended['signal'])}"
        elif "exit" in ended:
            how = f"with exit code {ended['exit']}"
        else:
            how = ended.get("refused", "without a word")
        return ": ".join([f"ended its process {how}", *last])[:300]
