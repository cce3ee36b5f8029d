"""The reward functions, called in worker processes: a call that fails costs its own rows only."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from rlswitch.config.sections import TENANTS, RewardConfig
from rlswitch.errors import ConfigError, RewardError
from rlswitch.rewards.workers.process import Lost, WorkerProcess
from rlswitch.rewards.workers.resolve import ONE_BY_ONE
from rlswitch.types import Score

LOAD_SECONDS = 600.0
"""For importing the modules that define the functions."""
PARTS = 8
"""A failed call is retried in this many parts, and a failed part again, down to single rows."""
RETRY_TIMEOUTS = 8.0
"""Retries may take this many times reward.timeout_s per `submit`; then the remaining rows fail."""

CLOSED = "the rewards were given up: the run is ending"

Indices = tuple[int, ...]
Arguments = Callable[[Indices], dict[str, Any]]
"""Rows -> keyword arguments of the functions."""
NamedScore = tuple[str, int, Score]
"""Name of the function, row, and its score."""


@dataclass(slots=True)
class Job:
    """What the calls of one `submit` share."""

    arguments: Arguments
    retry_seconds: float
    """What is left for retries."""


class Pool:
    """Workers with the same functions, each started when it is needed and replaced when it is lost.

    A thread waits for each busy worker and enforces its time limit.
    """

    def __init__(self, config: RewardConfig, log: Callable[[str], None]):
        """Raises ConfigError with a line for each entry that is not a function."""
        self._config, self._log = config, log
        self._entries = [entry for entry in config.functions if entry not in TENANTS]
        self._threads = ThreadPoolExecutor(config.workers, "rewards")
        self._lock = threading.Lock()
        self._workers: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = []
        self._closed = False
        self.names: list[str] = []
        self._is_async: list[bool] = []
        if not self._entries:
            return
        try:
            worker, loaded = self._start()
        except RewardError as error:
            raise ConfigError(str(error)) from error  # nothing has run yet: the input is wrong
        if loaded["problems"]:
            self.close()
            raise ConfigError(*loaded["problems"])
        self._idle.append(worker)
        self.names, self._is_async = loaded["names"], loaded["is_async"]

    def signature_problems(self, columns: Sequence[str]) -> list[str]:
        """A line for each function that cannot be called with these columns."""
        if not self._entries:
            return []
        worker = self._free_worker()
        try:
            problems = self._ask(worker, ("check", columns), LOAD_SECONDS)["problems"]
        except Lost as lost:
            raise RewardError(f"reward.functions = {self._entries}: the process with them {lost}") from lost
        self._idle.append(worker)
        return problems

    def submit(self, group_sizes: Sequence[int], arguments: Arguments) -> list[Future[list[NamedScore]]]:
        """Calls every function on every row, in the background; the rows of a group stay in one call.

        The futures raise RewardError once the pool is closed.
        """
        job = Job(arguments, RETRY_TIMEOUTS * self._config.timeout_s)
        return [self._threads.submit(self._call, job, *call) for call in self._first_calls(group_sizes)]

    def close(self) -> None:
        """Ends all workers and whatever they started."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.hang_up()
        self._threads.shutdown()
        while self._workers:
            self._workers.pop().end()

    def _first_calls(self, group_sizes: Sequence[int]) -> Iterator[tuple[Indices, Indices]]:
        """(functions, rows): whole groups, shared out among the workers; async functions share a call."""
        ends = [0, *accumulate(group_sizes)]
        share = math.ceil(len(group_sizes) / self._config.workers) or 1
        chunks = [tuple(range(*edges)) for edges in pairwise([*ends[:-1:share], ends[-1]])]
        waiting = tuple(i for i, is_async in enumerate(self._is_async) if is_async)
        alone = [(i,) for i, is_async in enumerate(self._is_async) if not is_async]
        for functions in filter(None, [*alone, waiting]):
            one_by_one = self._entries[functions[0]] in ONE_BY_ONE
            for rows in [(row,) for row in range(ends[-1])] if one_by_one else filter(None, chunks):
                yield functions, rows

    def _call(self, job: Job, functions: Indices, rows: Indices, after: str = "") -> list[NamedScore]:
        """Scores of all `rows`. After a failure, retries the functions one by one, then the rows in parts.

        after: for a retry, why the call that it is a part of failed.
        """
        if after and job.retry_seconds <= 0:
            error = f"{after} (it or another of {len(rows)} that were tried together)"
            return [(self.names[function], row, Score(error=error)) for function in functions for row in rows]
        worker, message = self._free_worker(), ("score", functions, job.arguments(rows))
        began = time.monotonic()
        try:
            results = self._ask(worker, message, self._config.timeout_s)["results"]
            self._idle.append(worker)
        except Lost as lost:
            results = [{"error": str(lost)}] * len(functions)
        job.retry_seconds -= time.monotonic() - began if after else 0.0
        scores: list[NamedScore] = []
        for function, result in zip(functions, results, strict=True):
            if "error" not in result:
                scores += [(self.names[function], row, _score(result, i)) for i, row in enumerate(rows)]
            elif len(functions) == len(rows) == 1:
                scores.append((self.names[function], rows[0], Score(error=result["error"])))
            else:
                size = math.ceil(len(rows) / PARTS) if len(functions) == 1 else len(rows)
                for i in range(0, len(rows), size):
                    scores += self._call(job, (function,), rows[i : i + size], result["error"])
        return scores

    def _free_worker(self) -> WorkerProcess:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        return worker or self._start()[0]

    def _ask(self, worker: WorkerProcess, message: tuple[Any, ...], seconds: float) -> dict[str, Any]:
        """The answer of `worker`, which is ended without one. Raises Lost, or RewardError once closed."""
        try:
            return worker.ask(message, seconds)
        except Lost:
            with self._lock:
                self._workers.discard(worker)
            worker.end()
            if self._closed:
                raise RewardError(CLOSED) from None
            raise

    def _start(self) -> tuple[WorkerProcess, dict[str, Any]]:
        with self._lock:
            if self._closed:
                raise RewardError(CLOSED)
            worker = WorkerProcess(int(self._config.memory_gib * 2**30), self._log)
            self._workers.add(worker)
        blame = f"reward.functions = {self._entries}"
        try:
            loaded = self._ask(worker, ("load", self._entries, self._config), LOAD_SECONDS)
        except Lost as lost:
            raise RewardError(f"{blame}: importing them {lost}") from lost
        if self.names and (loaded["problems"] or loaded["names"] != self.names):
            changed = "; ".join(loaded["problems"]) or f"their names are {', '.join(loaded['names'])} now"
            raise RewardError(f"{blame}: changed since the run began: {changed}")
        return worker, loaded


def _score(result: Mapping[str, Any], i: int) -> Score:
    extra = {column: values[i] for column, values in result["extra"].items()}
    value, error = result["scores"][i]
    return Score(value=value, error=error, extra=extra)
