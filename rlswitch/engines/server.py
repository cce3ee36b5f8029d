"""vLLM's HTTP server: launched on a private Unix socket or on loopback, or attached to by URL."""

from __future__ import annotations

import hashlib
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from transformers import PreTrainedTokenizerBase

from rlswitch.config import Run, ServerEngineConfig
from rlswitch.device import Device
from rlswitch.engines.address import Address, parse_listen, parse_url
from rlswitch.engines.base import Completion, Request
from rlswitch.engines.client import Client
from rlswitch.engines.driver import VLLMBackend
from rlswitch.engines.launch import engine_dtype, environment, server_flags
from rlswitch.engines.logs import last_error, tail
from rlswitch.engines.processes import SHUTDOWN_SECONDS, SOCKET_DIRECTORY, end_all, family_of
from rlswitch.types import ConfigError, EngineError

COMPLETIONS = "/v1/completions"
PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Said in every request: a server would fill in what the model's generation_config.json prefers."""

MAX_SOCKET_PATH = 107  # bytes, of the kernel's sockaddr_un


class ServerBackend(VLLMBackend):
    """Drives a vLLM server through its development and completions endpoints."""

    def __init__(
        self,
        run: Run,
        model_path: str,
        tokenizer: PreTrainedTokenizerBase,
        device: Device,
        log_path: Path,
        publish_root: Path,
        warm: bool = True,
    ):
        config = server_config(run)
        self.processes: list[psutil.Process] = []
        """Of a launched server; an attached one's are not ours to end."""
        with ExitStack() as stack:
            if config.url:
                self.client = stack.enter_context(attached(config))
            else:
                server = launched(run, model_path, device, log_path, publish_root)
                self.client, self.processes = stack.enter_context(server)
            elsewhere = not self.client.address.is_local
            super().__init__(model_path, tokenizer, device, elsewhere=elsewhere, warm=warm)
            self._check_that_cached_tokens_are_told()
            self.stack = stack.pop_all()

    def collective_rpc(self, method: str, **kwargs: Any) -> list[Any]:
        return self.client.post("/collective_rpc", {"method": method, "kwargs": kwargs})["results"]

    def reset_prefix_cache(self) -> bool:
        return bool(self.client.post("/reset_prefix_cache").get("success"))

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        bodies = [
            {
                "prompt": request.token_ids,
                "temperature": request.temperature,
                "seed": request.seed,
                "max_tokens": request.max_new_tokens,
                "logprobs": 0,
                "stop_token_ids": self.stop_token_ids,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            }
            for request in requests
        ]
        return [
            Completion(
                token_ids=choice["token_ids"],
                logprobs=choice["logprobs"]["token_logprobs"],
                finish_reason=choice["finish_reason"] or "unfinished",
            )
            for choice in (reply["choices"][0] for reply in self._complete(bodies))
        ]

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        replies = self._complete(
            [
                {"prompt": tokens, "temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
                for tokens in sequences
            ]
        )
        positions = [reply["choices"][0]["prompt_logprobs"][1:] for reply in replies]
        return [
            [position[str(token)]["logprob"] for position, token in zip(row, sequence[1:], strict=True)]
            for row, sequence in zip(positions, sequences, strict=True)
        ]

    def count_cached_tokens(self, sequences: Sequence[list[int]]) -> int:
        replies = self._complete(
            [{"prompt": tokens, "temperature": 0.0, "max_tokens": 1} for tokens in sequences]
        )
        details = [reply["usage"].get("prompt_tokens_details") or {} for reply in replies]
        return sum(item.get("cached_tokens") or 0 for item in details)

    def close(self) -> None:
        self.stack.close()

    def _sleep(self, level: int) -> None:
        self.client.post("/sleep", level=level)

    def _release_kv_cache(self) -> None:
        self.client.post("/release_kv_cache_memory")

    def _wake_up(self, tag: str) -> None:
        self.client.post("/wake_up", tags=tag)

    def _is_sleeping(self) -> bool:
        return self.client.get("/is_sleeping")["is_sleeping"]

    def _complete(self, bodies: Sequence[dict[str, Any]]) -> list[Any]:
        return self.client.post_all(COMPLETIONS, [body | PLAIN for body in bodies])

    def _check_that_cached_tokens_are_told(self) -> None:
        """A server that says nothing of them looks like one that has none: a proof would mean nothing."""
        length = min(2 * self.block_size + 1, self.facts["max_model_len"] - 1)
        if length <= self.block_size:
            return  # no prompt is long enough to be cached
        prompt = [self.stop_token_ids[0]] * length
        if not self.count_cached_tokens([prompt]) and not self.count_cached_tokens([prompt]):
            raise EngineError(
                "vLLM's server does not tell how many tokens its prefix cache answered, so no push could be"
                " proven; start it with --enable-prompt-tokens-details and --enable-prefix-caching"
            )


def server_config(run: Run) -> ServerEngineConfig:
    assert isinstance(run.engine, ServerEngineConfig)
    return run.engine


@contextmanager
def launched(
    run: Run, model_path: str, device: Device, log_path: Path, publish_root: Path
) -> Iterator[tuple[Client, list[psutil.Process]]]:
    """A server of our own and its processes; they end with the context, or with this process."""
    config = server_config(run)
    # mkdtemp makes the directory 0700: nobody else reaches a socket in it.
    with tempfile.TemporaryDirectory(prefix="rlswitch-", ignore_cleanup_errors=True) as directory:
        address = choose_address(config, directory)
        with open(log_path, "ab") as log:
            process = subprocess.Popen(
                [*server_command(run, model_path, device), *address_flags(address)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(run, device, publish_root)
                | {"VLLM_SERVER_DEV_MODE": "1", SOCKET_DIRECTORY: directory},
                start_new_session=True,  # Ctrl-C is for us, who then end it in order
            )
        client = Client(address, config.request_timeout_s, log_path)
        processes: list[psutil.Process] = []
        try:
            wait_until_ready(process, client, config.start_timeout_s, log_path)
            processes += family_of(process.pid)
            yield client, processes
        finally:
            client.close()
            end_all(processes or family_of(process.pid), ask=lambda: end_politely(process))


@contextmanager
def attached(config: ServerEngineConfig) -> Iterator[Client]:
    """A running server, for us alone; it is left as it is, asleep or awake, when the context closes."""
    assert config.url is not None
    address = parse_url(config.url)
    with claimed(address), closing(Client(address, config.request_timeout_s)) as client:
        if client.get("/is_sleeping")["is_sleeping"]:  # the run before has left it so
            client.post("/wake_up")
        yield client


@contextmanager
def claimed(address: Address) -> Iterator[None]:
    """Holds a name that the kernel gives to one process at a time, and frees when that process ends."""
    name = hashlib.sha256(str(address).encode()).hexdigest()
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
    listen = parse_listen(config.listen)
    if listen is None:
        path = str(Path(directory) / "vllm.sock")
        if len(path.encode()) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"engine.listen = socket: {path} is too long for a Unix socket; set the environment"
                " variable TMPDIR to a shorter directory, or engine.listen=127.0.0.1:0"
            )
        return Address(socket=path)
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((listen.host, listen.port))
        except OSError as error:
            raise ConfigError(
                f"engine.listen = {config.listen}: cannot listen there: {error.strerror}; set another port,"
                " or 0 for any free one"
            ) from error
        return replace(listen, port=probe.getsockname()[1])


def wait_until_ready(
    process: subprocess.Popen[bytes], client: Client, timeout_s: float, log_path: Path
) -> None:
    deadline = time.monotonic() + timeout_s
    while client.status("/health") != 200:
        if process.poll() is not None:
            cause = last_error(log_path) or f"exit code {process.returncode}"
        elif time.monotonic() > deadline:
            cause = f"not ready after engine.start_timeout_s = {timeout_s:g}"
        else:
            time.sleep(0.2)
            continue
        raise EngineError(f"vLLM's server did not start: {cause}; its log: {log_path}\n{tail(log_path)}")


def end_politely(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(SHUTDOWN_SECONDS)


def refuse_unfit_server(run: Run, model_path: str) -> None:
    """Asks the server at engine.url, before anything is made, for all that a run needs of it."""
    config, device = server_config(run), Device.detect()
    assert config.url is not None
    address = parse_url(config.url)
    with closing(Client(address, config.request_timeout_s)) as client:
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
