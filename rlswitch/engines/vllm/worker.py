"""vLLM's worker process on a GPU, and what it shares with the CPU worker.

vLLM calls the workers' methods by name, through `collective_rpc`.
"""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.worker.gpu_worker import Worker

from rlswitch.engines.vllm.kv_cache import kv_storages
from rlswitch.processes.group import own_family, watch_owner
from rlswitch.proof.fingerprint import named_fingerprints, tensor_fingerprint, total_fingerprint
from rlswitch.switch.device import Device


class ProvenWorker(Worker):
    """vLLM's GPU worker, which also reports the weights that it received and holds."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.identity = identify(self.distributed_init_method)
        self.received: dict[str, int] = {}

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        with recording(self.get_model(), self.model_config.dtype, self.device) as self.received:
            super().reload_weights(*args, **kwargs)

    def wake_up(self, tags: list[str] | None = None) -> None:
        Device("cuda").reclaim()  # vLLM itself does so from 0.27 on (vllm#49857)
        super().wake_up(tags)

    def fingerprint(self) -> dict[str, Any]:
        sharded = self.parallel_config.tensor_parallel_size > 1
        requantised = self.model_config.quantization is not None  # the bytes differ from the published ones
        live = None if sharded or requantised else live_fingerprint(self.get_model(), self.model_config.dtype)
        return {"received": self.received, "live": live}

    def facts(self) -> dict[str, Any]:
        """The settings a run depends on, as vLLM resolved them; plain values that travel as JSON."""
        model, cache = self.vllm_config.model_config, self.vllm_config.cache_config
        return {
            "block_size": cache.block_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "enable_prefix_caching": cache.enable_prefix_caching,
            "enable_sleep_mode": model.enable_sleep_mode,
            "logprobs_mode": model.logprobs_mode,
            "max_model_len": model.max_model_len,
        }

    def memory(self) -> dict[str, Any]:
        return self.identity | {
            "kv_bytes": sum(it.nbytes() for it in kv_storages(self.model_runner.kv_caches)),
            "weight_bytes": sum(p.numel() * p.element_size() for p in self.get_model().parameters()),
        }


def identify(distributed_init_method: str) -> dict[str, Any]:
    """A worker's identity, part of its `memory`; from now on it ends with its run and its engine core.

    `token` differs in every process, even if a pid is reused. `files` holds the file in /tmp through which
    torch's processes meet, which vLLM does not remove.
    """
    path = distributed_init_method.removeprefix("file://")
    files = [path] if os.path.basename(path).startswith("vllm_dist_") else []
    watch_owner(files)
    return {"pid": os.getpid(), "token": secrets.token_hex(8), "family": own_family(), "files": files}


@contextmanager
def recording(model: Any, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, int]]:
    """Yields the fingerprints of all tensors that the loader hands to `model` while the context is open."""
    received: dict[str, int] = {}
    load = model.load_weights

    def recorded(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            received[name] = tensor_fingerprint(tensor.to(device), dtype)
            yield name, tensor

    model.load_weights = lambda weights, **kwargs: load(recorded(weights), **kwargs)
    try:
        yield received
    finally:
        del model.load_weights  # uncovers the class's own method


def live_fingerprint(model: nn.Module, dtype: torch.dtype) -> int:
    """Hash of the parameters that the kernels read, in the engine's dtype; shared storage counts once."""
    return total_fingerprint(named_fingerprints(model.named_parameters(), dtype).values())
