"""Runs Python that a model wrote: isolated by the kernel, under limits, with no process left behind.

isolation: a new session; PID, network, IPC and mount namespaces; another user, or a user namespace
limits: CPU seconds, wall seconds, address space, processes, file size, open files, output
environment: six variables, and no descriptor but the first three
files: the interpreter and /usr, read-only, and a private /tmp in memory
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from rlswitch.errors import RLSwitchError

SUPERVISOR = Path(__file__).with_name("supervisor.py")
VISIBLE = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class SandboxError(RLSwitchError, RuntimeError):
    """The sandbox could not run the program, which says nothing about the program."""


PATIENCE = 3.0
"""Wall time allowed per second of CPU time: on a busy machine a correct program waits for a core."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The resources of one program."""

    seconds: float = 10.0
    """CPU time per process; PATIENCE times as much wall time."""
    memory_bytes: int = 4 << 30
    """Address space per process."""
    processes: int = 64
    file_bytes: int = 16 << 20
    open_files: int = 64
    output_bytes: int = 1 << 20
    """Standard output and error together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a program ended."""

    problem: str | None
    """None after exit code 0; else `exit code 1: ZeroDivisionError: ...`, `killed by SIGSEGV`,
    `ran longer than 10 s`, `did not end within 30 s`, `printed more than 1048576 bytes`."""
    output: str
    errors: str


class Sandbox:
    """Runs programs, each in a new sandbox."""

    def __init__(self, limits: Limits, allow_unsandboxed: bool = False):
        """Raises SandboxError when the kernel allows no isolation here, unless `allow_unsandboxed`."""
        self._limits, self._isolate = limits, True
        self.missing = ""
        """Why programs run without isolation."""
        try:
            if problem := self.run("").problem:
                raise SandboxError(f"Python does not start in the sandbox ({problem})")
        except SandboxError as error:
            if not allow_unsandboxed:
                raise
            self.missing, self._isolate = str(error), False

    def run(self, source: str, stdin: str = "", argv: tuple[str, ...] = ()) -> Outcome:
        """Runs `source` as a Python program in a private, empty directory."""
        began = time.monotonic()
        supervisor, reader = start_supervisor(
            self._spec(source, stdin, argv),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT | {"TMPDIR": os.environ.get("TMPDIR", "/tmp")},
        )
        with supervisor, os.fdopen(reader, "rb") as status:
            assert supervisor.stdin and supervisor.stdout and supervisor.stderr
            try:
                problem, output, errors = self._listen(supervisor.stdout, supervisor.stderr, began)
            finally:
                supervisor.stdin.close()  # ends whatever still runs
                supervisor.wait()
            return self._outcome(problem, status.readline(), output, errors)

    def _listen(self, stdout: IO[bytes], stderr: IO[bytes], began: float) -> tuple[str | None, bytes, bytes]:
        """Reads both until they are closed or a limit is exceeded: the problem, and what was read."""
        read = {stdout.fileno(): b"", stderr.fileno(): b""}
        still_open, problem = [*read], None
        while still_open and problem is None:
            left = began + self._limits.seconds * PATIENCE - time.monotonic()
            ready = wait(still_open, max(left, 0.0))
            for fd in [fd for fd in still_open if fd in ready]:
                piece = os.read(fd, 1 << 16)
                read[fd] += piece
                if not piece:
                    still_open.remove(fd)
            if sum(map(len, read.values())) > self._limits.output_bytes:
                problem = f"printed more than {self._limits.output_bytes} bytes"
            elif left <= 0:
                problem = f"did not end within {self._limits.seconds * PATIENCE:g} s"
        output, errors = (text[: self._limits.output_bytes] for text in read.values())
        return problem, output, errors

    def _outcome(self, problem: str | None, status: bytes, output: bytes, errors: bytes) -> Outcome:
        ended = json.loads(status) if status else {}
        if "refused" in ended:
            raise SandboxError(f"the sandbox could not be set up ({ended['refused']})")
        text = errors.decode(errors="replace")
        if problem is None and not ended:
            raise SandboxError(f"the supervisor of the sandbox died{': ' if text else ''}{text[-200:]}")
        if problem is None and "signal" in ended and ended["cpu"] >= self._limits.seconds:
            problem = f"ran longer than {self._limits.seconds:g} s"
        elif problem is None and "signal" in ended:
            problem = f"killed by {signal_name(ended['signal'])}"
        elif problem is None and ended["exit"] != 0:
            last = text.strip().splitlines()[-1:]
            problem = ": ".join([f"exit code {ended['exit']}", *last])[:200]
        return Outcome(problem=problem, output=output.decode(errors="replace"), errors=text)

    def _spec(self, source: str, stdin: str, argv: tuple[str, ...]) -> dict[str, object]:
        limits = self._limits
        return {
            "argv": [sys.executable, "-s", "-B", "main.py", *argv],
            "env": ENVIRONMENT,
            "limits": {
                "RLIMIT_CPU": math.ceil(limits.seconds),
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_CORE": 0,
                # outside a namespace it would count everything that the user runs
                **({"RLIMIT_NPROC": limits.processes} if self._isolate else {}),
            },
            "isolate": self._isolate,
            "visible": list(dict.fromkeys(p for p in (*VISIBLE, *interpreter_paths()) if os.path.exists(p))),
            "files": {"main.py": source, "stdin": stdin},
            "keep": [],
        }


def start_supervisor(
    spec: Mapping[str, Any], stdout: int, stderr: int, env: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], int]:
    """supervisor.py on its way with `spec`, and the descriptor on which it reports how the program ended."""
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SUPERVISOR), str(writer)],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            pass_fds=[writer, *spec["keep"]],
            env=env,
            start_new_session=True,
        )
    finally:
        os.close(writer)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has died already, and its status or output says why
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        process.stdin.flush()
    return process, reader


def interpreter_paths() -> list[str]:
    """Where this Python and its packages live, which a sandboxed program has to see."""
    return [path for path in (sys.base_prefix, sys.prefix) if Path(path) not in (Path("/"), Path("/usr"))]


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
