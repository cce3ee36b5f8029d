"""Addresses of servers: on this machine only, unless the user allows others."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from rlswitch.errors import ConfigError

MAX_SOCKET_PATH = 107  # bytes, of the kernel's sockaddr_un
UNPROTECTED = (
    "vLLM's control endpoints have no authentication (--api-key does not cover them): whoever reaches"
    " them can replace the weights, read the prompts and run methods of the workers"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A Unix socket, or a host and a port."""

    socket: str = ""
    host: str = ""
    port: int = 0
    scheme: str = "http"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it. Of host names only localhost counts."""
        if self.socket or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def identity(self) -> str:
        """Equal for every spelling of the same place."""
        if self.socket:
            return f"unix:{os.path.realpath(self.socket)}"
        return f"{'loopback' if self.is_local else self.host.lower()}:{self.port}"

    @property
    def base_url(self) -> str:
        if self.socket:
            return "http://localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    def __str__(self) -> str:
        return f"unix:{self.socket}" if self.socket else self.base_url


def parse_url(text: str) -> Address:
    """`http://HOST:PORT`, `https://HOST:PORT` or `unix:/path`. Raises ValueError."""
    parts = urlsplit(text)
    if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
        return Address(socket=parts.path)
    extra = parts.path.strip("/") or parts.query or parts.fragment or parts.username
    if parts.scheme not in ("http", "https") or not parts.hostname or not parts.port or extra:
        raise ValueError("must be http://HOST:PORT, https://HOST:PORT or unix:/path/of/the/socket")
    return Address(host=parts.hostname, port=parts.port, scheme=parts.scheme)


def parse_listen(text: str) -> Address | None:
    """`HOST:PORT`; None for `socket`. Raises ValueError."""
    if text == "socket":
        return None
    parts = urlsplit(f"//{text}")
    if parts.netloc != text or not parts.hostname or parts.port is None or parts.username:
        raise ValueError("must be socket or HOST:PORT, such as 127.0.0.1:0 (any free port)")
    return Address(host=parts.hostname, port=parts.port)


def free_port(listen: str) -> int | None:
    """The port to listen on, any free one for port 0; None for `socket`. Raises ConfigError."""
    if (address := parse_listen(listen)) is None:
        return None
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise ConfigError(
                f"engine.listen = {listen}: cannot listen there: {error.strerror}; set another port, or 0 for"
                " any free one"
            ) from error
        return int(probe.getsockname()[1])
