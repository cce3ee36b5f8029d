"""The program in a worker process: it calls the reward functions and answers in plain JSON.

A message is a pickled tuple that begins with a verb:

    ("load", entries, settings)       -> {"names": [...], "is_async": [...], "problems": [...]}
    ("check", columns)                -> {"problems": [...]}
    ("score", functions, arguments)   -> {"results": [one per function]}

A result is {"error": why}, or {"scores": [(value or null, why there is none)], "extra": {column: [...]}}.
"""

import asyncio
import json
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, SupportsFloat

from rlswitch.rewards.workers.resolve import Function, resolve
from rlswitch.text import shortened

LARGEST = 3.4e38
"""Of float32, which rewards become in training."""


def main(fd: int) -> None:
    """Answers messages until the other side hangs up."""
    connection, owner = Connection(fd), os.getpid()
    functions: list[Function] = []
    with asyncio.Runner() as runner:  # one loop for all calls: a client that a function keeps is bound to it
        while True:
            try:
                verb, *rest = connection.recv()
            except EOFError:
                return
            if verb == "load":
                functions, problems = resolve(*rest)
                names, is_async = [f.name for f in functions], [f.is_async for f in functions]
                reply: dict[str, Any] = {"problems": problems, "names": names, "is_async": is_async}
            elif verb == "check":
                found = (function.signature_problem(rest[0]) for function in functions)
                reply = {"problems": [problem for problem in found if problem]}
            else:
                reply = {"results": score([functions[i] for i in rest[0]], rest[1], runner)}
            if os.getpid() != owner:
                os._exit(0)  # a process that a function forked and let return
            connection.send_bytes(json.dumps(reply).encode())


def score(
    functions: Sequence[Function], arguments: Mapping[str, Any], runner: asyncio.Runner
) -> list[dict[str, Any]]:
    """The results of one function, or of several async ones, which wait together."""
    if not functions[0].is_async:  # outside the loop: it may run its own
        return [_result(function, arguments) for function in functions]

    async def gather() -> list[dict[str, Any]]:
        return await asyncio.gather(*(_async_result(function, arguments) for function in functions))

    return runner.run(gather())


def _result(function: Function, arguments: Mapping[str, Any]) -> dict[str, Any]:
    extra: dict[str, list[str]] = {}
    try:
        return _numbers(function.call(**arguments, **_offered(function, extra)), arguments, extra)
    except BaseException as error:
        return _raised(error)


async def _async_result(function: Function, arguments: Mapping[str, Any]) -> dict[str, Any]:
    extra: dict[str, list[str]] = {}
    try:
        return _numbers(await function.call(**arguments, **_offered(function, extra)), arguments, extra)
    except BaseException as error:
        return _raised(error)


def _offered(function: Function, extra: dict[str, list[str]]) -> dict[str, Any]:
    """TRL's log_extra, if the function takes it: it adds a column to rollouts.jsonl."""

    def log_extra(column: str, values: Sequence[Any]) -> None:
        extra[column] = [str(value)[:500] for value in values]

    return {"log_extra": log_extra} if function.takes("log_extra") else {}


def _raised(error: BaseException) -> dict[str, Any]:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return {"error": f"raised {type(error).__name__}: {error} (at {where})"[:500]}


def _numbers(returned: Any, arguments: Mapping[str, Any], extra: Mapping[str, list[str]]) -> dict[str, Any]:
    rows = len(arguments["prompts"])
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
        return {"error": f"returned {shortened(repr(returned), 60)} instead of a list of {rows} numbers"}
    values = list(returned)
    if len(values) != rows:
        return {"error": f"returned {len(values)} rewards for {rows} completions"}
    kept = {column: texts for column, texts in extra.items() if len(texts) == rows}
    return {"scores": [_number(value) for value in values], "extra": kept}


def _number(value: Any) -> tuple[float | None, str]:
    """`value` as a float that is finite in float32, and why it is none; neither where it does not apply."""
    if value is None:
        return None, ""
    with suppress(Exception):  # an array of many elements, an integer beyond the range of floats
        if isinstance(value, SupportsFloat) and abs(number := float(value)) <= LARGEST:
            return number, ""
    return None, f"returned {shortened(repr(value), 60)} instead of a number"
