"""What vLLM is started with, in this process or as a server: arguments, flags, environment."""

from __future__ import annotations

import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

from rlswitch.engines.vllm.address import MAX_SOCKET_PATH
from rlswitch.processes.group import Owner
from rlswitch.run import Run
from rlswitch.switch.device import Device

CPU_KV_CACHE_GIB = 0.25
RPC_PATH = "VLLM_RPC_BASE_PATH"
THREADS_BIND, UNBOUND = "VLLM_CPU_OMP_THREADS_BIND", "nobind"


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
            # With a fixed KV cache it only says how much has to be free for vLLM to start at all.
            "gpu_memory_utilization": 0.01 if kv_cache_gib else config.gpu_memory_utilization,
            "enforce_eager": config.enforce_eager,
            "worker_cls": "rlswitch.engines.vllm.worker.ProvenWorker",
        }
    else:
        kv_cache_gib = kv_cache_gib or CPU_KV_CACHE_GIB
        arguments |= {
            "enforce_eager": True,
            # A prompt in two parts would make vLLM set back its seed, which torch cannot on a CPU: it dies.
            "enable_chunked_prefill": False,
            "worker_cls": "rlswitch.engines.vllm.cpu_worker.SleepingCPUWorker",
        }
    if kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    return arguments | dict(config.vllm)


def engine_dtype(dtype: str, device: Device) -> str:
    """What `model.dtype=auto` means on this device."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.kind == "cuda" else "float32"


def starts_warm(run: Run, device: Device) -> bool:
    """Whether vLLM's processes are forked from the fork server.

    On a CPU that binds threads to cores vLLM preloads a library into its workers: they need an exec.
    """
    bound = device.kind == "cpu" and os.environ.get(THREADS_BIND, UNBOUND) != UNBOUND
    return run.engine.fork_server and not bound


def environment(run: Run, device: Device, publish_root: Path, sockets: str) -> dict[str, str]:
    """The environment of vLLM's processes; a user's own setting wins, the proof's needs do not.

    `publish_root` and `sockets`, two directories, are removed should the run be killed.
    """
    usual = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # its control sockets never leave the machine
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device.kind == "cpu":
        usual[THREADS_BIND] = UNBOUND
        # Every batch has another shape, and by default oneDNN keeps what it made for 1,024 of them: a worker
        # with a small model grew by 130 MiB in 180 steps, and was no faster for it.
        usual["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "64"
    if len(f"{sockets}/{uuid.UUID(int=0)}".encode()) <= MAX_SOCKET_PATH:
        usual[RPC_PATH] = sockets  # where its processes meet; by default, and for ever, in /tmp
    root = str(Path(__file__).resolve().parents[3])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    needed = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # which forkserver.py makes a warm start of
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",  # pickle from whoever reaches a socket
        "VLLM_ENGINE_READY_TIMEOUT_S": str(math.ceil(run.engine.start_timeout_s)),
        **Owner(os.getpid(), directories=[str(publish_root), sockets]).variable(),
        # The engine's processes import the worker from here.
        "PYTHONPATH": os.pathsep.join([root, *(path for path in paths if path not in ("", root))]),
    }
    return usual | dict(os.environ) | needed


def server_flags(run: Run, model_path: str, device: Device) -> list[str]:
    """`llm_arguments` and what the control of a server needs, as flags of `vllm serve`."""
    flags = []
    for key, value in llm_arguments(run, model_path, device).items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            flags.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")
    # Cached tokens are what proves the prefix cache; a line for each request would bury vLLM's own log.
    return [*flags, "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
