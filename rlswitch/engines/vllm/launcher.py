"""A vLLM server for one run: launched for it, or running already and attached to by URL."""

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
from rlswitch.engines.vllm.address import MAX_SOCKET_PATH, Address, free_port, parse_listen, parse_url
from rlswitch.engines.vllm.arguments import engine_dtype, environment, server_flags, starts_warm
from rlswitch.engines.vllm.client import Client
from rlswitch.engines.vllm.watch import at_start, at_work
from rlswitch.errors import ConfigError, EngineError, EngineLost
from rlswitch.processes.fork_server import start_process
from rlswitch.processes.group import SHUTDOWN_SECONDS, ProcessGroup, kin_of
from rlswitch.processes.output import last_error, tail
from rlswitch.run import Run
from rlswitch.switch.device import Device


def server_config(run: Run) -> ServerEngineConfig:
    assert isinstance(run.engine, ServerEngineConfig)
    return run.engine


@contextmanager
def launched(
    run: Run, model_path: str, device: Device, log_path: Path, publish_root: Path
) -> Iterator[tuple[Client, ProcessGroup]]:
    """A server of our own and its processes; they end with the context, or with this process."""
    config = server_config(run)
    # mkdtemp makes the directory 0700: nobody else reaches a socket in it.
    with tempfile.TemporaryDirectory(prefix="rlswitch-socket-", ignore_cleanup_errors=True) as directory:
        address = choose_address(config, directory)
        variables = environment(run, device, publish_root, directory)
        flags = [*server_flags(run, model_path, device), *address_flags(address)]
        with open(log_path, "ab") as log:
            process = start_process(
                serve,
                [flags],
                environment=variables | {"VLLM_SERVER_DEV_MODE": "1"},
                outputs=(log.fileno(), log.fileno()),
                warm=starts_warm(run, device),
            )
        assert process.pid is not None, "it has been started"
        client = Client(address, at_start(config), log_path)
        family = ProcessGroup([process.pid])
        try:
            wait_until_ready(process, client, config.start_timeout_s, log_path)
            workers = client.post("/collective_rpc", {"method": "memory"})["results"]
            pids, files = kin_of(workers)
            family = ProcessGroup([process.pid, *pids], files)
            yield client, family
        finally:
            client.close()
            family.end(ask=lambda: end_politely(process))


@contextmanager
def attached(config: ServerEngineConfig, model_path: str) -> Iterator[Client]:
    """A running server, for us alone; it is left as it is, asleep or awake, when the context closes."""
    assert config.url is not None
    address = parse_url(config.url)
    with claimed(address), closing(Client(address, at_work(config))) as client:
        wait_until_back(client, config.start_timeout_s)
        # The run before may have left it asleep, half awake, without weights or with its own.
        wake_all(client)
        reload = {"method": "reload_weights", "kwargs": {"weights_path": model_path}}
        client.post("/collective_rpc", reload)
        client.post("/reset_prefix_cache")
        yield client


def wake_all(client: Client) -> None:
    """Whatever sleeps, one tag a call: without a tag older vLLM maps again what is awake already."""
    for tags in ("weights", "kv_cache", ""):  # the last for an engine that only pauses
        if client.get("/is_sleeping")["is_sleeping"]:
            client.post("/wake_up", **({"tags": tags} if tags else {}))
    if client.get("/is_sleeping")["is_sleeping"]:
        raise EngineError(f"vLLM's server at {client.address} does not wake up any more: start it anew")


@contextmanager
def claimed(address: Address) -> Iterator[None]:
    """Holds a name that the kernel gives to one process at a time, and frees when that process ends."""
    name = hashlib.sha256(address.identity.encode()).hexdigest()
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            claim.bind(f"\0rlswitch-{name}")
        except OSError:
            raise ConfigError(
                f"engine.url = {address}: another run is attached to this server; each would generate from"
                " the other's weights; start a server for each run"
            ) from None
        yield


def server_command(run: Run, model_path: str, device: Device) -> list[str]:
    return [sys.executable, "-m", "rlswitch.engines.serve", *server_flags(run, model_path, device)]


def address_flags(address: Address) -> list[str]:
    if address.socket:
        return [f"--uds={address.socket}"]
    return [f"--host={address.host}", f"--port={address.port}"]


def choose_address(config: ServerEngineConfig, directory: str) -> Address:
    """Where to launch: a socket in `directory`, or engine.listen with a port that is free."""
    listen, port = parse_listen(config.listen), free_port(config.listen)
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


def wait_until_back(client: Client, timeout_s: float) -> None:
    """Of a server that somebody else starts again; it was there when the run began."""
    deadline = time.monotonic() + timeout_s
    while client.status("/health") != 200 and time.monotonic() < deadline:
        time.sleep(0.2)


def end_politely(process: BaseProcess) -> None:
    process.terminate()
    process.join(SHUTDOWN_SECONDS)


def refuse_unfit_server(run: Run, model_path: str) -> None:
    """Asks the server at engine.url, before anything is made, for all that a run needs of it."""
    config, device = server_config(run), Device.detect()
    assert config.url is not None
    address = parse_url(config.url)
    with closing(Client(address, at_work(config))) as client:
        wrong = "; ".join(shortcomings(client, run, model_path, device))
    if wrong:
        command = shlex.join([*server_command(run, model_path, device), *address_flags(address)])
        raise ConfigError(
            f"engine.url = {config.url}: {wrong}; start it with: VLLM_SERVER_DEV_MODE=1 {command}"
        )


def shortcomings(client: Client, run: Run, model_path: str, device: Device) -> Iterator[str]:
    """What an attached server lacks; the first one that hides the others ends the list."""
    if client.status("/health") != 200:
        yield "no vLLM server answers there"
        return
    if client.status("/sleep") != 405:  # a POST endpoint, where it exists
        yield "its control endpoints are off"
        return
    root = client.get("/v1/models")["data"][0]["root"]
    if root not in (run.model.path, model_path):
        yield f"it serves {root}, this run trains {model_path}"
    try:
        facts = client.post("/collective_rpc", {"method": "facts"})["results"][0]
    except EngineError:
        yield "its workers cannot prove a push: --worker-cls is not rlswitch's"
        return
    if "token" not in client.post("/collective_rpc", {"method": "memory"})["results"][0]:
        yield "its workers are of another version of rlswitch"
    needed = {
        "dtype": engine_dtype(run.model.dtype, device),
        "enable_prefix_caching": True,
        "enable_sleep_mode": device.kind == "cuda",
        "logprobs_mode": "processed_logprobs",
    }
    for name, value in needed.items():
        if facts[name] != value:
            yield f"its {name} is {facts[name]}, this run needs {value}"
    if facts["max_model_len"] < run.max_model_len:
        yield f"its max_model_len is {facts['max_model_len']}, this run needs {run.max_model_len}"
    if run.switch.level == "kv" and client.status("/release_kv_cache_memory") != 405:
        yield "it cannot release the KV cache alone (vLLM 0.31 and later can), or set switch.level=2"
