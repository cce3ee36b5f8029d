"""A vLLM server for one run: launched for it, or attached to by URL."""

from __future__ import annotations

import hashlib
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from rlswitch.config.sections import ServerEngineConfig
from rlswitch.engines.serve import serve
from rlswitch.engines.spec import EngineSpec, Launch
from rlswitch.engines.vllm.address import MAX_SOCKET_PATH, Address, free_port, parse_listen, parse_url
from rlswitch.engines.vllm.arguments import environment, server_flags, starts_warm
from rlswitch.engines.vllm.client import Client
from rlswitch.engines.vllm.watch import at_start, at_work
from rlswitch.errors import ConfigError, EngineError, EngineLost
from rlswitch.processes.fork_server import start_process
from rlswitch.processes.group import SHUTDOWN_SECONDS, ProcessGroup, kin_of
from rlswitch.processes.output import last_error, tail
from rlswitch.switch.device import Device


def server_settings(spec: EngineSpec) -> ServerEngineConfig:
    assert isinstance(spec.settings, ServerEngineConfig)
    return spec.settings


@contextmanager
def launched(launch: Launch) -> Iterator[tuple[Client, ProcessGroup]]:
    """A new server and its processes, which end with the context or with this process."""
    settings, device, log_path = server_settings(launch.spec), launch.device, launch.log_path
    # mkdtemp makes the directory 0700: nobody else reaches a socket in it.
    with tempfile.TemporaryDirectory(prefix="rlswitch-socket-", ignore_cleanup_errors=True) as directory:
        address = choose_address(settings, directory)
        variables = environment(settings, device, launch.scratch, directory)
        flags = [*server_flags(launch.spec, device), *address_flags(address)]
        with open(log_path, "ab") as log:
            process = start_process(
                serve,
                [flags],
                environment=variables | {"VLLM_SERVER_DEV_MODE": "1"},
                outputs=(log.fileno(), log.fileno()),
                warm=starts_warm(settings, device),
            )
        assert process.pid is not None, "it has been started"
        client = Client(address, at_start(settings), log_path)
        family = ProcessGroup([process.pid])
        try:
            wait_until_ready(process, client, settings.start_timeout_s, log_path)
            pids, files = kin_of(client.post("/collective_rpc", {"method": "memory"})["results"])
            family = ProcessGroup([process.pid, *pids], files)
            yield client, family
        finally:
            client.close()
            family.end(ask=lambda: end_politely(process))


@contextmanager
def attached(settings: ServerEngineConfig, model_path: str) -> Iterator[Client]:
    """A running server, claimed for this process; closing the context leaves it asleep or awake as it is."""
    assert settings.url is not None
    address = parse_url(settings.url)
    with claimed(address), closing(Client(address, at_work(settings))) as client:
        deadline = time.monotonic() + settings.start_timeout_s
        while client.status("/health") != 200 and time.monotonic() < deadline:
            time.sleep(0.2)  # it was there when the run began: somebody may be restarting it
        # The previous run may have left it asleep, half awake, without weights or with its own.
        wake_all(client)
        reload = {"method": "reload_weights", "kwargs": {"weights_path": model_path}}
        client.post("/collective_rpc", reload)
        client.post("/reset_prefix_cache")
        yield client


def wake_all(client: Client) -> None:
    """Wakes one tag per call: without a tag older vLLM maps memory twice that is already awake."""
    for tags in ("weights", "kv_cache", ""):  # the last for an engine that only pauses
        if client.get("/is_sleeping")["is_sleeping"]:
            client.post("/wake_up", **({"tags": tags} if tags else {}))
    if client.get("/is_sleeping")["is_sleeping"]:
        raise EngineError(f"vLLM's server at {client.address} does not wake up: restart it")


@contextmanager
def claimed(address: Address) -> Iterator[None]:
    """Holds a socket name that only one process can bind, and that the kernel frees when it ends."""
    name = hashlib.sha256(address.identity.encode()).hexdigest()
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            claim.bind(f"\0rlswitch-{name}")
        except OSError:
            raise ConfigError(
                f"engine.url = {address}: another run is attached to this server; each would generate from"
                " the other's weights; start one server per run"
            ) from None
        yield


def address_flags(address: Address) -> list[str]:
    if address.socket:
        return [f"--uds={address.socket}"]
    return [f"--host={address.host}", f"--port={address.port}"]


def choose_address(settings: ServerEngineConfig, directory: str) -> Address:
    """Where to launch: a socket in `directory`, or engine.listen with a free port. Raises ConfigError."""
    listen, port = parse_listen(settings.listen), free_port(settings.listen)
    if listen is None or port is None:
        path = str(Path(directory) / "vllm.sock")
        if len(path.encode()) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"engine.listen = socket: {path} is too long for a Unix socket; set the environment"
                " variable TMPDIR to a shorter directory, or engine.listen=127.0.0.1:0"
            )
        return Address(socket=path)
    return replace(listen, port=port)


def wait_until_ready(process: BaseProcess, client: Client, timeout_s: float, log_path: Path) -> None:
    """Raises EngineLost if the server ends or the time is up."""
    deadline = time.monotonic() + timeout_s
    while client.status("/health") != 200:
        if process.exitcode is not None:
            cause = last_error(log_path) or f"exit code {process.exitcode}"
        elif time.monotonic() > deadline:
            cause = f"not ready after engine.start_timeout_s = {timeout_s:g}"
        else:
            time.sleep(0.2)
            continue
        raise EngineLost(f"vLLM's server did not start: {cause}; its log: {log_path}\n{tail(log_path)}")


def end_politely(process: BaseProcess) -> None:
    process.terminate()
    process.join(SHUTDOWN_SECONDS)


def check_server(spec: EngineSpec, model: str) -> None:
    """Raises ConfigError, with the right command, if the server at engine.url cannot do what `spec` asks."""
    settings, device = server_settings(spec), Device.detect()
    assert settings.url is not None
    address = parse_url(settings.url)
    with closing(Client(address, at_work(settings))) as client:
        wrong = "; ".join(server_problems(client, spec, model, device))
    if wrong:
        flags = [*server_flags(spec, device), *address_flags(address)]
        command = shlex.join([sys.executable, "-m", "rlswitch.engines.serve", *flags])
        raise ConfigError(
            f"engine.url = {settings.url}: {wrong}; start it with: VLLM_SERVER_DEV_MODE=1 {command}"
        )


def server_problems(client: Client, spec: EngineSpec, model: str, device: Device) -> Iterator[str]:
    """What the server lacks; stops at a problem that hides the others."""
    if client.status("/health") != 200:
        yield "no vLLM server answers there"
        return
    if client.status("/sleep") != 405:  # a POST endpoint, where it exists
        yield "its control endpoints are off"
        return
    root = client.get("/v1/models")["data"][0]["root"]
    if root not in (model, spec.model_path):
        yield f"it serves {root}, this run needs {spec.model_path}"
    try:
        facts = client.post("/collective_rpc", {"method": "facts"})["results"][0]
    except EngineError:
        yield "its workers cannot prove a push: --worker-cls is not rlswitch's"
        return
    if "token" not in client.post("/collective_rpc", {"method": "memory"})["results"][0]:
        yield "its workers are from another version of rlswitch"
    needed = {
        "dtype": spec.dtype,
        "enable_prefix_caching": True,
        "enable_sleep_mode": device.kind == "cuda",
        "logprobs_mode": "processed_logprobs",
    }
    for name, value in needed.items():
        if facts[name] != value:
            yield f"its {name} is {facts[name]}, this run needs {value}"
    if facts["max_model_len"] < spec.max_model_len:
        yield f"its max_model_len is {facts['max_model_len']}, this run needs {spec.max_model_len}"
    if spec.level == "kv" and client.status("/release_kv_cache_memory") != 405:
        yield "it cannot release the KV cache alone (vLLM 0.31 and later can), or set switch.level=2"
