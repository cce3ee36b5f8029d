"""vLLM's HTTP server: launched for one run or attached to by URL, then driven over HTTP."""

import hashlib
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rlswitch.config.sections import ServerEngineConfig
from rlswitch.engines.backend import Completion
from rlswitch.engines.serve import serve
from rlswitch.engines.spec import EngineSpec, Launch
from rlswitch.engines.vllm.address import Address, choose_address, parse_url
from rlswitch.engines.vllm.arguments import environment, server_flags, starts_warm
from rlswitch.engines.vllm.backend import VLLMBackend
from rlswitch.engines.vllm.client import Client
from rlswitch.engines.vllm.watch import at_start, at_work, has_ended
from rlswitch.errors import ConfigError, EngineError, EngineLost
from rlswitch.processes.fork_server import start_process
from rlswitch.processes.group import SHUTDOWN_SECONDS, ProcessGroup, kin_of
from rlswitch.processes.output import last_error, tail
from rlswitch.switch.device import Device

USUAL = {
    # A server takes its defaults from the model's generation_config.json.
    **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    **{"logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True},
}
"""Sent with every request."""


class ServerBackend(VLLMBackend):
    """The verbs over HTTP, token ids in and out."""

    def __init__(self, launch: Launch):
        settings = server_settings(launch.spec)
        self.family = ProcessGroup()  # a server that was already running is not ours to end
        with ExitStack() as stack:
            if settings.url:
                self.client = stack.enter_context(attached(settings, launch.spec.model_path))
            else:
                self.client, self.family = stack.enter_context(launched(launch))
            super().__init__(launch, elsewhere=not self.client.address.is_local)
            self._check_reports_cached_tokens()
            self.client.deadline = at_work(settings)
            self.stack = stack.pop_all()

    def collective_rpc(self, method: str, **kwargs: Any) -> list[Any]:
        try:
            return self.client.rpc(method, **kwargs)
        except EngineError as error:  # a server whose worker has died may still answer, with an error
            raise (EngineLost(str(error)) if has_ended(self.family.vital) else error) from error

    def call(self, verb: str, **arguments: Any) -> Any:
        return self.client.post(f"/{verb}", **arguments).get("success")

    def close(self) -> None:
        self.stack.close()

    def _is_sleeping(self) -> bool:
        return self.client.is_sleeping()

    def _run(
        self, prompts: Sequence[list[int]], parameters: Sequence[dict[str, Any]], into: dict[int, Completion]
    ) -> None:
        def take(index: int, reply: Any) -> None:
            into[index] = _completion(prompts[index], reply)

        bodies = [
            USUAL | {"prompt": tokens} | given for tokens, given in zip(prompts, parameters, strict=True)
        ]
        self.client.post_all("/v1/completions", bodies, take)
        if not self.family.vital and self.collective_rpc("memory")[0]["token"] != self.workers[0]["token"]:
            into.clear()
            raise EngineLost(f"{self.client.address} answers, but is not the server that was pushed to")

    def _check_reports_cached_tokens(self) -> None:
        """Raises EngineError if it does not: its prefix cache would look empty to every proof."""
        length = min(2 * self.block_size + 1, self.facts["max_model_len"] - 1)
        if length <= self.block_size:
            return  # no prompt is long enough to be cached
        prompt = [self.stop_token_ids[0]] * length
        if not self.count_cached_tokens([prompt]) and not self.count_cached_tokens([prompt]):
            raise EngineError(
                "vLLM's server does not report how many tokens its prefix cache served, so no push could be"
                " proven; start it with --enable-prompt-tokens-details and --enable-prefix-caching"
            )


def _completion(prompt: list[int], reply: Any) -> Completion:
    (choice,) = reply["choices"]
    positions = (choice.get("prompt_logprobs") or [])[1:]
    details = reply["usage"].get("prompt_tokens_details") or {}
    return Completion(
        token_ids=choice["token_ids"],
        logprobs=choice["logprobs"]["token_logprobs"],
        finish_reason=choice["finish_reason"] or "unfinished",
        prompt_logprobs=[it[str(token)]["logprob"] for it, token in zip(positions, prompt[1:], strict=False)],
        cached_tokens=details.get("cached_tokens") or 0,
    )


def server_settings(spec: EngineSpec) -> ServerEngineConfig:
    assert isinstance(spec.settings, ServerEngineConfig)
    return spec.settings


@contextmanager
def launched(launch: Launch) -> Iterator[tuple[Client, ProcessGroup]]:
    """A new server and its processes, which end with the context or with this process."""
    settings, device, log_path = server_settings(launch.spec), launch.device, launch.log_path
    # mkdtemp makes the directory 0700: nobody else reaches a socket in it.
    with tempfile.TemporaryDirectory(prefix="rlswitch-socket-", ignore_cleanup_errors=True) as directory:
        address = choose_address(settings.listen, directory)
        variables = environment(settings, device, launch.scratch, directory)
        flags = [*server_flags(launch.spec, device), *address.flags]
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
            pids, files = kin_of(client.rpc("memory"))
            family = ProcessGroup([process.pid, *pids], files)
            yield client, family
        finally:
            client.close()
            family.end(ask=lambda: end_politely(process))


def connected(settings: ServerEngineConfig) -> closing[Client]:
    """A client of the server at engine.url."""
    assert settings.url is not None
    return closing(Client(parse_url(settings.url), at_work(settings)))


@contextmanager
def attached(settings: ServerEngineConfig, model_path: str) -> Iterator[Client]:
    """A running server, claimed for this process; closing the context leaves it asleep or awake as it is."""
    with connected(settings) as client, claimed(client.address):
        deadline = time.monotonic() + settings.start_timeout_s
        while client.status("/health") != 200 and time.monotonic() < deadline:
            time.sleep(0.2)  # it was there when the run began: somebody may be restarting it
        # The previous run may have left it asleep, half awake, without weights or with its own.
        wake_all(client)
        client.rpc("reload_weights", weights_path=model_path)
        client.post("/reset_prefix_cache")
        yield client


def wake_all(client: Client) -> None:
    """Wakes one tag per call: without a tag older vLLM maps memory twice that is already awake."""
    for tags in ("weights", "kv_cache", ""):  # the last for an engine that only pauses
        if client.is_sleeping():
            client.post("/wake_up", **({"tags": tags} if tags else {}))
    if client.is_sleeping():
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
    with connected(settings) as client:
        wrong = "; ".join(server_problems(client, spec, model, device))
    if wrong:
        flags = [*server_flags(spec, device), *client.address.flags]
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
    root = client.model()
    if root not in (model, spec.model_path):
        yield f"it serves {root}, this run needs {spec.model_path}"
    try:
        facts = client.rpc("facts")[0]
    except EngineError:
        yield "its workers cannot prove a push: --worker-cls is not rlswitch's"
        return
    if "token" not in client.rpc("memory")[0]:
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
