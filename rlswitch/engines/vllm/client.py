"""A synchronous client of one vLLM server: JSON over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from rlswitch.engines.vllm.address import Address
from rlswitch.engines.vllm.watch import Deadline
from rlswitch.errors import EngineError, EngineLost
from rlswitch.processes.output import tail

MAX_IN_FLIGHT = 256
"""Requests in flight: about as many as vLLM runs at once, without too many connections."""

CONNECT_SECONDS = 10.0
PROBE_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 2.0  # vLLM closes a connection after 5 idle seconds; a request must not hit that


class Client:
    """Every call ends: with a reply, EngineError for an error status, or EngineLost if no reply comes."""

    def __init__(self, address: Address, deadline: Deadline, log_path: Path | None = None):
        self.address = address
        self.deadline = deadline
        self.log_path = log_path
        self.runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.session = self.runner.run(self._open())

    def close(self) -> None:
        self.runner.run(self.session.close())
        self.runner.close()

    def status(self, path: str) -> int | None:
        """The HTTP status of a GET; None if there is no reply within PROBE_SECONDS."""
        try:
            return self.runner.run(asyncio.wait_for(self._send("GET", path), PROBE_SECONDS))[0]
        except (EngineError, TimeoutError):
            return None

    def get(self, path: str) -> Any:
        return self.runner.run(self._ask("GET", path))

    def post(self, path: str, body: Any = None, **query: str | int) -> Any:
        return self.runner.run(self._ask("POST", path, body, query))

    def post_all(self, path: str, bodies: Sequence[Any], take: Callable[[int, Any], None]) -> list[Any]:
        """The replies in the order of `bodies`, at most MAX_IN_FLIGHT at a time.

        `take` gets each one with its index when it arrives, even if others fail.
        """

        async def ask(index: int, body: Any) -> Any:
            answer = await self._ask("POST", path, body)
            take(index, answer)
            return answer

        async def gather() -> list[Any]:
            tasks = [asyncio.create_task(ask(index, body)) for index, body in enumerate(bodies)]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # the rest, if one has failed
                    task.cancel()

        return self.runner.run(gather())

    async def _open(self) -> aiohttp.ClientSession:
        limits: dict[str, Any] = {"limit": MAX_IN_FLIGHT, "keepalive_timeout": KEEP_ALIVE_SECONDS}
        path = self.address.socket
        connector = aiohttp.UnixConnector(path, **limits) if path else aiohttp.TCPConnector(**limits)
        return aiohttp.ClientSession(self.address.base_url, connector=connector)

    async def _ask(self, method: str, path: str, body: Any = None, query: Any = None) -> Any:
        status, text = await self._send(method, path, body, query)
        if status != 200:
            raise EngineError(self._failure(path, f"answered {status}: {_message(text)}"))
        return json.loads(text) if text else {}

    async def _send(self, method: str, path: str, body: Any = None, query: Any = None) -> tuple[int, str]:
        # Limits silence, not the total: a request may wait in vLLM's queue while others are served.
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=self.deadline.seconds
        )
        try:
            async with self.session.request(
                method, path, json=body, params=query, allow_redirects=False, timeout=timeout
            ) as reply:
                return reply.status, await reply.text()
        except aiohttp.SocketTimeoutError as error:
            raise EngineLost(self._failure(path, f"was silent for {self.deadline}")) from error
        except (aiohttp.ClientError, OSError) as error:  # includes a connection that timed out
            what = f"cannot be reached: {error or type(error).__name__}"
            raise EngineLost(self._failure(path, what)) from error

    def _failure(self, path: str, what: str) -> str:
        log = f"; its log: {self.log_path}\n{tail(self.log_path)}" if self.log_path else ""
        return f"vLLM's server at {self.address} {what} ({path}){log}"


def _message(text: str) -> str:
    """The first line of the message in vLLM's error object, or of the whole text."""
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return (text.strip().splitlines() or ["no reason given"])[0][:500]
