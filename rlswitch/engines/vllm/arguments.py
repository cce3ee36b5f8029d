"""What vLLM is started with, in process or as a server: arguments, flags, environment."""

import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

from rlswitch.config.sections import EngineConfig
from rlswitch.engines.spec import EngineSpec
from rlswitch.engines.vllm.address import MAX_SOCKET_PATH
from rlswitch.processes.driver import forks_are_usable
from rlswitch.processes.group import Owner
from rlswitch.switch.device import Device

CPU_KV_CACHE_GIB = 0.25
RPC_PATH = "VLLM_RPC_BASE_PATH"
THREADS_BIND, UNBOUND = "VLLM_CPU_OMP_THREADS_BIND", "nobind"


def llm_arguments(spec: EngineSpec, device: Device) -> dict[str, Any]:
    """Arguments of vllm.LLM; those in engine.vllm take precedence."""
    settings = spec.settings
    arguments: dict[str, Any] = {
        "model": spec.model_path,
        "skip_tokenizer_init": True,  # token ids in, token ids out: text is never tokenised again
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "seed": spec.seed,
        "trust_remote_code": spec.trust_remote_code,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    kv_cache_gib = settings.kv_cache_gib
    if device.kind == "cuda":
        arguments |= {
            "enable_sleep_mode": True,
            # With a fixed KV cache this is only the free memory that vLLM demands at its start.
            "gpu_memory_utilization": 0.01 if kv_cache_gib else settings.gpu_memory_utilization,
            "enforce_eager": settings.enforce_eager,
            "worker_cls": "rlswitch.engines.vllm.worker.ProvenWorker",
        }
    else:
        kv_cache_gib = kv_cache_gib or CPU_KV_CACHE_GIB
        arguments |= {
            "enforce_eager": True,
            # For a prompt in two chunks vLLM would reset its seed, which fails on a CPU and kills it.
            "enable_chunked_prefill": False,
            "worker_cls": "rlswitch.engines.vllm.cpu_worker.SleepingCPUWorker",
        }
    if kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    return arguments | dict(settings.vllm)


def starts_warm(settings: EngineConfig, device: Device) -> bool:
    """Whether to fork vLLM's processes from the fork server.

    When vLLM binds threads to CPU cores it preloads a library into its workers, which need an exec.
    """
    bound = device.kind == "cpu" and os.environ.get(THREADS_BIND, UNBOUND) != UNBOUND
    return settings.fork_server and not bound and forks_are_usable()


def environment(settings: EngineConfig, device: Device, scratch: Path, sockets: str) -> dict[str, str]:
    """The environment of vLLM's processes; the user's own wins, except where a proof depends on it.

    `scratch` and `sockets`, two directories, are removed if this process is killed.
    """
    usual = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # its control sockets never leave the machine
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device.kind == "cpu":
        usual[THREADS_BIND] = UNBOUND
        # Every batch has a new shape, and by default oneDNN caches primitives for 1,024 of them: a worker
        # with a small model grew by 130 MiB in 180 steps, and was no faster.
        usual["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "64"
    else:
        # vLLM would import FlashInfer, installed or not, for a sampler that processed_logprobs never uses.
        usual["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if settings.tensor_parallel_size > 1:
        usual["GLOO_SOCKET_IFNAME"] = "lo"  # found by host name otherwise, which fails without a network
    if len(f"{sockets}/{uuid.UUID(int=0)}".encode()) <= MAX_SOCKET_PATH:
        usual[RPC_PATH] = sockets  # by default vLLM leaves its sockets in /tmp
    root = str(Path(__file__).resolve().parents[3])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    needed = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # fork_server.py turns it into a warm start
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",  # no pickle from anyone who reaches a socket
        "VLLM_ENGINE_READY_TIMEOUT_S": str(math.ceil(settings.start_timeout_s)),
        **Owner(os.getpid(), directories=[str(scratch), sockets]).variable(),
        # The engine's processes import the worker from here.
        "PYTHONPATH": os.pathsep.join([root, *(path for path in paths if path not in ("", root))]),
    }
    return usual | dict(os.environ) | needed


def server_flags(spec: EngineSpec, device: Device) -> list[str]:
    """`llm_arguments`, and what the control of a server needs, as flags of `vllm serve`."""
    flags = []
    for key, value in llm_arguments(spec, device).items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            flags.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")
    # Proofs read the number of cached tokens; a log line per request would bury vLLM's own.
    return [*flags, "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
