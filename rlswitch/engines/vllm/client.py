"""JSON over HTTP to one vLLM server, from code that is not async."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from rlswitch.engines.vllm.address import Address
from rlswitch.engines.vllm.watch import Patience
from rlswitch.errors import EngineError, EngineLost
from rlswitch.processes.output import tail

MAX_IN_FLIGHT = 256
"""Requests sent at a time: about as many as vLLM runs at once, and few enough connections."""

CONNECT_SECONDS = 10.0
PROBE_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 2.0  # vLLM drops a connection that was idle for 5; a request must not meet that


class Client:
    """Every call ends: with an answer, EngineError for one that is none, EngineLost where none comes."""

    def __init__(self, address: Address, patience: Patience, log_path: Path | None = None):
        self.address = address
        self.patience = patience
        self.log_path = log_path
        self.runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.session = self.runner.run(self._open())

    def close(self) -> None:
        self.runner.run(self.session.close())
        self.runner.close()

    def status(self, path: str) -> int | None:
        """The HTTP status of a GET; None when nothing answers within PROBE_SECONDS."""
        try:
            return self.runner.run(asyncio.wait_for(self._send("GET", path), PROBE_SECONDS))[0]
        except (EngineError, TimeoutError):
            return None

    def get(self, path: str) -> Any:
        return self.runner.run(self._ask("GET", path))

    def post(self, path: str, body: Any = None, **query: str | int) -> Any:
        return self.runner.run(self._ask("POST", path, body, query))

    def post_all(self, path: str, bodies: Sequence[Any], take: Callable[[int, Any], None]) -> list[Any]:
        """The answers in the order of `bodies`, MAX_IN_FLIGHT of them on their way at a time.

        Each is given to `take` with its index as soon as it is there, whatever becomes of the others.
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
                for task in tasks:  # those that are left when one has failed
                    task.cancel()

        return self.runner.run(gather())

    async def _open(self) -> aiohttp.ClientSession:
        limits: dict[str, Any] = {"limit": MAX_IN_FLIGHT, "keepalive_timeout": KEEP_ALIVE_SECONDS}
        connector: aiohttp.BaseConnector
        if self.address.socket:
            connector = aiohttp.UnixConnector(self.address.socket, **limits)
        else:
            connector = aiohttp.TCPConnector(**limits)
        return aiohttp.ClientSession(self.address.base_url, connector=connector)

    async def _ask(self, method: str, path: str, body: Any = None, query: Any = None) -> Any:
        status, text = await self._send(method, path, body, query)
        if status != 200:
            raise EngineError(self._failure(path, f"answered {status}: {_message(text)}"))
        return json.loads(text) if text else {}

    async def _send(self, method: str, path: str, body: Any = None, query: Any = None) -> tuple[int, str]:
        # Silence is measured, not the whole: a request may wait for its turn as long as others are served.
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=self.patience.seconds
        )
        try:
            async with self.session.request(
                method, path, json=body, params=query, allow_redirects=False, timeout=timeout
            ) as reply:
                return reply.status, await reply.text()
        except aiohttp.SocketTimeoutError as error:
            raise EngineLost(self._failure(path, f"was silent for {self.patience}")) from error
        except (aiohttp.ClientError, OSError) as error:  # no connection in time is among them
            what = f"cannot be reached: {error or type(error).__name__}"
            raise EngineLost(self._failure(path, what)) from error

    def _failure(self, path: str, what: str) -> str:
        log = f"; its log: {self.log_path}\n{tail(self.log_path)}" if self.log_path else ""
        return f"vLLM's server at {self.address} {what} ({path}){log}"


def _message(text: str) -> str:
    """The first line of what vLLM says in its error object, or of whatever came."""
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return (text.strip().splitlines() or ["no reason given"])[0][:500]
