"""The worker processes that reward functions run in: started once, started again when one is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Pipe, wait
from typing import Any

from rlswitch.config.sections import TENANTS
from rlswitch.errors import ConfigError, RewardError
from rlswitch.rewards.sandbox.sandbox import KEEPER, signal_name
from rlswitch.rewards.workers.builtin import Settings

LOAD_SECONDS = 600.0
"""For importing the modules that the functions are in."""
DEATH_SECONDS = 10.0
"""For a worker that has closed its connection to die by itself."""
OUTPUT_BYTES = 1 << 20
"""What a worker may print in one call; more ends it."""
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from rlswitch.rewards.workers import worker; "
)
BOOT += "worker.main(int(sys.argv[1]))"


class Lost(Exception):
    """A worker is gone, by itself or ended for what it did; the text says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One question to one worker: these functions on these rows of the step."""

    functions: tuple[int, ...]
    rows: tuple[int, ...]
    after: str = ""
    """Why the call failed that this one is a part of; a first call has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of a call: a result per function (worker.py), or why there is none."""

    call: Call
    results: list[dict[str, Any]] | None = None
    lost: str = ""
    seconds: float = 0.0


class Worker:
    """A process that answers one question at a time, and its keeper, which ends all that it starts."""

    def __init__(self, memory_bytes: int, say: Callable[[str], None]):
        self._say = say
        self._line = b""
        self._printed = 0
        self.call: Call | None = None
        """The question it works on."""
        self.since = 0.0
        self.connection, theirs = Pipe()
        status, writer = os.pipe()
        self.output, printed = os.pipe()
        self.status = status
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(KEEPER), str(writer)],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            pass_fds=[writer, theirs.fileno()],
            start_new_session=True,
        )
        spec = {
            "argv": [sys.executable, "-u", "-c", BOOT, str(theirs.fileno()), json.dumps(sys.path)],
            # The device has one holder at a time, and no reward function is one.
            "env": dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""},
            "limits": {"RLIMIT_DATA": memory_bytes, "RLIMIT_CORE": 0},
            "isolate": False,
            "visible": [],
            "files": {},
            "keep": [theirs.fileno()],
        }
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(json.dumps(spec).encode() + b"\n")
        self._keeper.stdin.flush()
        for end in (writer, printed):
            os.close(end)
        theirs.close()

    def send(self, message: tuple[Any, ...]) -> None:
        """Raises Lost when there is nobody to take it."""
        self._printed = 0
        try:
            self.connection.send(message)
        except OSError as error:
            raise Lost(self._death()) from error

    def ask(self, message: tuple[Any, ...], seconds: float) -> dict[str, Any]:
        """The answer to a message; raises Lost when there is none within `seconds`."""
        self.send(message)
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            wait([self.connection, self.output, self.status], left)
            if (reply := self.take()) is not None:
                return reply
        raise Lost(f"took longer than {seconds:g} s")

    def take(self) -> dict[str, Any] | None:
        """The answer, if it is there; passes on what was printed. Raises Lost."""
        ready = wait([self.connection, self.output, self.status], 0)
        if self.output in ready:
            self._pass_on(os.read(self.output, 1 << 16))
        if self.connection in ready:
            try:
                return json.loads(self.connection.recv_bytes())
            except (EOFError, OSError) as error:
                raise Lost(self._death()) from error
        if self.status in ready:
            raise Lost(self._death())
        return None

    def hang_up(self) -> None:
        """Asks the keeper for the end of the process and of whatever it has started."""
        assert self._keeper.stdin is not None
        with suppress(OSError, ValueError):  # gone already, or asked before
            self._keeper.stdin.write(b"\n")
            self._keeper.stdin.flush()

    def end(self) -> None:
        """Hangs up, and waits until all of it is gone."""
        self.hang_up()
        self._keeper.wait()
        assert self._keeper.stdin is not None
        with suppress(OSError):
            self._keeper.stdin.close()
        self.connection.close()
        os.close(self.output)
        os.close(self.status)

    def _pass_on(self, piece: bytes) -> None:
        self._printed += len(piece)
        if self._printed > OUTPUT_BYTES:
            raise Lost(f"printed more than {OUTPUT_BYTES} bytes")
        *lines, self._line = (self._line + piece).split(b"\n")
        for line in lines:
            self._say(line.decode(errors="replace"))

    def _death(self) -> str:
        with suppress(subprocess.TimeoutExpired):  # it ends with its child, once all is gone
            self._keeper.wait(DEATH_SECONDS)
        self.hang_up()
        self._keeper.wait()
        while (piece := os.read(self.output, 1 << 16)) and self._printed <= OUTPUT_BYTES:
            self._printed += len(piece)
            self._line += piece
        last = self._line.decode(errors="replace").strip().splitlines()[-1:]
        status = os.read(self.status, 1 << 16)
        ended = json.loads(status) if status else {}
        how = f"with exit code {ended['exit']}" if "exit" in ended else ended.get("refused", "without a word")
        if "signal" in ended:
            how = f"by {signal_name(ended['signal'])}"
        return ": ".join([f"ended its process {how}", *last])[:300]


class Pool:
    """Up to `size` workers, all with the same functions."""

    def __init__(self, entries: Sequence[str], settings: Settings, size: int, say: Callable[[str], None]):
        """Raises ConfigError, a line for each entry that is no function."""
        self.say = say
        self._entries, self._settings, self._size = list(entries), settings, size
        self._idle: list[Worker] = []
        self._busy: list[Worker] = []
        self._closed = False
        self.names: list[str] = []
        self.is_async: list[bool] = []
        if set(entries) <= set(TENANTS):  # no function: a worker would have nothing to do
            return
        try:
            worker, loaded = self._start()
        except RewardError as error:
            raise ConfigError(str(error)) from error  # nothing has run yet: the input is wrong
        self._idle.append(worker)
        if loaded["problems"]:
            self.close()
            raise ConfigError(*loaded["problems"])
        self.names, self.is_async = loaded["names"], loaded["is_async"]

    def check(self, columns: Sequence[str]) -> list[str]:
        """A line for each function that cannot be called with these columns."""
        if not self.names:
            return []
        try:
            return self._idle[0].ask(("check", list(columns)), LOAD_SECONDS)["problems"]
        except Lost as lost:
            raise RewardError(f"reward.functions = {self._entries}: the process with them {lost}") from lost

    def run(
        self, calls: deque[Call], arguments: Callable[[Sequence[int]], Mapping[str, Any]]
    ) -> Iterator[Answer]:
        """Answers as they come, until `calls` is empty; the caller may put more calls there meanwhile."""
        while calls or self._busy:
            if self._closed:
                raise RewardError("the rewards were given up: the run is ending")
            while calls and len(self._busy) < self._size:
                yield from self._hand_out(calls.popleft(), arguments)
            if self._busy:
                yield from self._collect()

    def stop(self) -> None:
        """Makes `run` raise RewardError soon, in whatever thread it is."""
        self._closed = True
        for worker in (*self._idle, *self._busy):
            worker.hang_up()

    def close(self) -> None:
        """Ends all workers; only once nothing runs any more."""
        self._closed = True
        for worker in (*self._idle, *self._busy):
            worker.end()
        self._idle.clear()
        self._busy.clear()

    def _hand_out(
        self, call: Call, arguments: Callable[[Sequence[int]], Mapping[str, Any]]
    ) -> Iterator[Answer]:
        worker = self._idle.pop() if self._idle else self._start_another()
        worker.call, worker.since = call, time.monotonic()
        self._busy.append(worker)
        try:
            worker.send(("score", call.functions, dict(arguments(call.rows))))
        except Lost as lost:
            yield self._give_up(worker, str(lost))

    def _collect(self) -> Iterator[Answer]:
        limit = self._settings.timeout_s
        left = min(worker.since for worker in self._busy) + limit - time.monotonic()
        wait([end for w in self._busy for end in (w.connection, w.output, w.status)], max(left, 0.0))
        for worker in list(self._busy):
            try:
                reply = worker.take()  # first: an answer that is there is not late
                if reply is None and time.monotonic() - worker.since > limit:
                    raise Lost(f"took longer than {limit:g} s")
            except Lost as lost:
                yield self._give_up(worker, str(lost))
                continue
            if reply is not None:
                assert worker.call is not None
                self._busy.remove(worker)
                self._idle.append(worker)
                seconds = time.monotonic() - worker.since
                yield Answer(call=worker.call, results=reply["results"], seconds=seconds)

    def _give_up(self, worker: Worker, why: str) -> Answer:
        assert worker.call is not None
        self._busy.remove(worker)
        worker.end()
        return Answer(call=worker.call, lost=why, seconds=time.monotonic() - worker.since)

    def _start_another(self) -> Worker:
        worker, loaded = self._start()
        if loaded["problems"] or loaded["names"] != self.names:
            worker.end()
            changed = "; ".join(loaded["problems"]) or f"they are called {', '.join(loaded['names'])} now"
            raise RewardError(f"reward.functions = {self._entries}: changed since the run began: {changed}")
        return worker

    def _start(self) -> tuple[Worker, dict[str, Any]]:
        worker = Worker(self._settings.memory_bytes, lambda line: self.say(line))
        try:
            return worker, worker.ask(("load", self._entries, self._settings), LOAD_SECONDS)
        except Lost as lost:
            worker.end()
            raise RewardError(f"reward.functions = {self._entries}: importing them {lost}") from lost
