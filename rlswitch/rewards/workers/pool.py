"""The reward functions, called in worker processes: a call that fails costs its own rows only."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import wait
from typing import Any

from rlswitch.errors import ConfigError, RewardError
from rlswitch.rewards.scores import Score
from rlswitch.rewards.workers.builtin import ONE_BY_ONE, Settings
from rlswitch.rewards.workers.process import Lost, WorkerProcess

LOAD_SECONDS = 600.0
"""For importing the modules that define the functions."""
PARTS = 8
"""A failed call is retried in this many parts, and a failed part again, down to single rows."""
RETRY_TIMEOUTS = 8.0
"""Retries may take this many times reward.timeout_s per `map`; then the remaining rows fail."""

Arguments = Callable[[Sequence[int]], Mapping[str, Any]]
"""Rows -> keyword arguments of the functions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """Functions, by index, that one worker calls on some rows."""

    functions: tuple[int, ...]
    rows: tuple[int, ...]
    after: str = ""
    """For a retry: why the call that it is a part of failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A result per function (see worker.py), or why the worker was lost."""

    call: Call
    results: list[dict[str, Any]]
    lost: str = ""
    seconds: float = 0.0


class Pool:
    """Up to `size` workers with the same functions, started when they are needed and replaced when lost."""

    def __init__(self, entries: Sequence[str], settings: Settings, size: int, log: Callable[[str], None]):
        """Raises ConfigError with a line for each entry that is not a function."""
        self._entries, self._settings, self._size, self._log = list(entries), settings, size, log
        self._idle: list[WorkerProcess] = []
        self._busy: dict[WorkerProcess, tuple[Call, float]] = {}
        """What each works on, and since when."""
        self._closed = False
        self.names: list[str] = []
        self._is_async: list[bool] = []
        if not self._entries:
            return
        try:
            worker, loaded = self._start()
        except RewardError as error:
            raise ConfigError(str(error)) from error  # nothing has run yet: the input is wrong
        self._idle.append(worker)
        if loaded["problems"]:
            self.close()
            raise ConfigError(*loaded["problems"])
        self.names, self._is_async = loaded["names"], loaded["is_async"]

    def signature_problems(self, columns: Sequence[str]) -> list[str]:
        """A line for each function that cannot be called with these columns."""
        if not self.names:
            return []
        try:
            return self._idle[0].ask(("check", list(columns)), LOAD_SECONDS)["problems"]
        except Lost as lost:
            raise RewardError(f"reward.functions = {self._entries}: the process with them {lost}") from lost

    def map(
        self, group_sizes: Sequence[int], arguments: Arguments
    ) -> Generator[tuple[str, int, Score], None, None]:
        """Yields (name of the function, row, score) for every function and row, as results arrive.

        The rows of a group stay in one call. Raises RewardError when the pool is stopped meanwhile.
        """
        calls, retried = deque(self._first_calls(group_sizes)), 0.0
        try:
            for answer in self._answers(calls, arguments):
                scores, retries = self._read(answer)
                calls.extendleft(reversed(retries))
                yield from scores
                retried += answer.seconds if answer.call.after else 0.0
                if retried > RETRY_TIMEOUTS * self._settings.timeout_s:
                    yield from self._drop_retries(calls)
        finally:
            for worker in self._busy:  # the caller needs no more
                worker.end()
            self._busy.clear()

    def stop(self) -> None:
        """Makes `map` raise RewardError soon, in whichever thread it runs."""
        self._closed = True
        for worker in (*self._idle, *self._busy):
            worker.hang_up()

    def close(self) -> None:
        """Ends all workers. Only once no `map` runs any more."""
        self._closed = True
        for worker in self._idle:
            worker.end()
        self._idle.clear()

    # -- what to call --------------------------------------------------------------------------

    def _first_calls(self, group_sizes: Sequence[int]) -> Iterator[Call]:
        """Whole groups, shared out among the workers; the async functions share their calls."""
        ends = [0]
        for size in group_sizes:
            ends.append(ends[-1] + size)
        share = math.ceil(len(group_sizes) / self._size) or 1
        edges = [*ends[:-1:share], ends[-1]]
        chunks = [tuple(range(first, end)) for first, end in pairwise(edges)]
        waiting = tuple(i for i, is_async in enumerate(self._is_async) if is_async)
        alone = [(i,) for i, is_async in enumerate(self._is_async) if not is_async]
        for functions in [*alone, *filter(None, [waiting])]:
            one_by_one = self._entries[functions[0]] in ONE_BY_ONE
            for rows in [(row,) for row in range(ends[-1])] if one_by_one else chunks:
                if rows:
                    yield Call(functions=functions, rows=rows)

    def _read(self, answer: Answer) -> tuple[list[tuple[str, int, Score]], list[Call]]:
        """The scores in an answer, and the calls that retry what it lacks."""
        call, scores, retries = answer.call, list[tuple[str, int, Score]](), list[Call]()
        if answer.lost and len(call.functions) > 1:
            return [], [Call(functions=(f,), rows=call.rows, after=answer.lost) for f in call.functions]
        results = answer.results or [{"error": answer.lost}]
        for function, result in zip(call.functions, results, strict=True):
            name = self.names[function]
            if "error" not in result:
                scores += [(name, row, _score(result, i)) for i, row in enumerate(call.rows)]
            elif len(call.rows) == 1:
                scores.append((name, call.rows[0], Score(error=result["error"])))
            else:
                size = math.ceil(len(call.rows) / PARTS)
                parts = [call.rows[i : i + size] for i in range(0, len(call.rows), size)]
                retries += [Call(functions=(function,), rows=part, after=result["error"]) for part in parts]
        return scores, retries

    def _drop_retries(self, calls: deque[Call]) -> Iterator[tuple[str, int, Score]]:
        for call in [call for call in calls if call.after]:
            calls.remove(call)
            error = f"{call.after} (it or another of {len(call.rows)} that were tried together)"
            for function in call.functions:
                yield from ((self.names[function], row, Score(error=error)) for row in call.rows)

    # -- who calls it --------------------------------------------------------------------------

    def _answers(self, calls: deque[Call], arguments: Arguments) -> Iterator[Answer]:
        """An answer per call, as they arrive, until `calls` is empty; the caller may add calls meanwhile."""
        while calls or self._busy:
            if self._closed:
                raise RewardError("the rewards were given up: the run is ending")
            while calls and len(self._busy) < self._size:
                yield from self._send(calls.popleft(), arguments)
            if self._busy:
                yield from self._receive()

    def _send(self, call: Call, arguments: Arguments) -> Iterator[Answer]:
        worker = self._idle.pop() if self._idle else self._start_another()
        self._busy[worker] = call, time.monotonic()
        try:
            worker.send(("score", call.functions, dict(arguments(call.rows))))
        except Lost as lost:
            yield self._give_up(worker, str(lost))

    def _receive(self) -> Iterator[Answer]:
        limit = self._settings.timeout_s
        left = min(since for _, since in self._busy.values()) + limit - time.monotonic()
        wait([end for worker in self._busy for end in worker.ends], max(left, 0.0))
        for worker, (call, since) in list(self._busy.items()):
            try:
                reply = worker.take()  # first: an answer that is there is not late
                if reply is None and time.monotonic() - since > limit:
                    raise Lost(f"took longer than {limit:g} s")
            except Lost as lost:
                yield self._give_up(worker, str(lost))
                continue
            if reply is not None:
                del self._busy[worker]
                self._idle.append(worker)
                yield Answer(call=call, results=reply["results"], seconds=time.monotonic() - since)

    def _give_up(self, worker: WorkerProcess, why: str) -> Answer:
        call, since = self._busy.pop(worker)
        worker.end()
        return Answer(call=call, results=[], lost=why, seconds=time.monotonic() - since)

    def _start_another(self) -> WorkerProcess:
        worker, loaded = self._start()
        if loaded["problems"] or loaded["names"] != self.names:
            worker.end()
            changed = "; ".join(loaded["problems"]) or f"their names are {', '.join(loaded['names'])} now"
            raise RewardError(f"reward.functions = {self._entries}: changed since the run began: {changed}")
        return worker

    def _start(self) -> tuple[WorkerProcess, dict[str, Any]]:
        worker = WorkerProcess(self._settings.memory_bytes, self._log)
        try:
            return worker, worker.ask(("load", self._entries, self._settings), LOAD_SECONDS)
        except Lost as lost:
            worker.end()
            raise RewardError(f"reward.functions = {self._entries}: importing them {lost}") from lost


def _score(result: Mapping[str, Any], i: int) -> Score:
    extra = {column: values[i] for column, values in result["extra"].items()}
    return Score(value=result["scores"][i], error=dict(result["bad"]).get(i, ""), extra=extra)
