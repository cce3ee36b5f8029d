"""What all ways of driving vLLM share: which of its calls make up each verb."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlswitch.engines.backend import Backend, warm_up
from rlswitch.engines.spec import Launch
from rlswitch.errors import EngineError
from rlswitch.proof.fingerprint import checkpoint_elements


class VLLMBackend(Backend):
    """Turns the verbs into vLLM's calls; a subclass transports a call."""

    def __init__(self, launch: Launch, *, elsewhere: bool = False):
        """Called once vLLM answers. `elsewhere`: on another machine, whose memory is invisible here."""
        self.device = launch.device
        self.elsewhere = elsewhere
        self.stop_token_ids = stop_tokens(launch.spec.model_path, launch.tokenizer)
        self.workers = self.collective_rpc("memory")
        self.facts = self.collective_rpc("facts")[0]
        itemsize = getattr(torch, self.facts["dtype"]).itemsize
        elements = 0 if elsewhere else checkpoint_elements(Path(launch.spec.model_path))
        self.weight_bytes = itemsize * elements
        self.asleep: set[str] = set()
        self.paused = False
        if launch.warm_up:
            warm_up(self, self.stop_token_ids)

    @abstractmethod
    def collective_rpc(self, method: str, **kwargs: Any) -> list[Any]:
        """Calls a method of every worker by name; one result per worker."""

    @abstractmethod
    def _sleep(self, level: int) -> None:
        """vLLM's level 0 (pause), 1 or 2."""

    @abstractmethod
    def _release_kv_cache(self) -> None:
        """Frees the KV cache of a paused engine."""

    @abstractmethod
    def _wake_up(self, tag: str) -> None:
        """One of vLLM's tags: weights, kv_cache or scheduling."""

    @abstractmethod
    def _is_sleeping(self) -> bool:
        """Whether anything is asleep, or the scheduler is paused."""

    @property
    def pids(self) -> list[int]:
        return [] if self.elsewhere else [worker["pid"] for worker in self.workers]

    @property
    def block_size(self) -> int:
        return self.facts["block_size"]

    def sleeping_bytes(self, level: str) -> int:
        if self.elsewhere:
            return 0
        if self.device.kind == "cuda":  # device memory is that of the first GPU
            worker = self.workers[0]
            freed = {"0": 0, "kv": worker["kv_bytes"]}
            return freed.get(level, worker["kv_bytes"] + worker["weight_bytes"])
        kv = sum(worker["kv_bytes"] for worker in self.workers)
        # On a CPU level 1 frees no weights: they are in host memory already.
        return {"0": 0}.get(level, kv) + (self.weight_bytes if level == "2" else 0)

    def sleep(self, level: str) -> None:
        if level in ("0", "kv"):
            self._sleep(0)
            self.paused = True
            if level == "kv":
                self._release_kv_cache()
                self.asleep = {"kv_cache"}
            return
        self._sleep(int(level))
        self.asleep = {"weights", "kv_cache"}

    def wake(self, tag: str) -> None:
        if tag in self.asleep:
            # One tag per call, and only one that sleeps: vLLM 0.20-0.27 would map it twice.
            if self.device.kind == "cuda":
                self.device.reclaim()  # mapping cannot use memory that torch's allocator caches
            self._wake_up(tag)
            self.asleep.discard(tag)
        if tag == "kv_cache" and self.paused:
            self._wake_up("scheduling")
            self.paused = False
        if tag == "kv_cache" and self._is_sleeping():
            raise EngineError("vLLM reports that it is asleep after every tag was woken: generate would hang")

    def reload(self, path: Path) -> None:
        self.collective_rpc("reload_weights", weights_path=str(path))

    def fingerprint(self) -> list[dict[str, Any]]:
        return self.collective_rpc("fingerprint")


def stop_tokens(model_path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sequence tokens of the tokenizer and of the model's generation_config.json."""
    stops = {tokenizer.eos_token_id}
    if (Path(model_path) / "generation_config.json").exists():
        eos = GenerationConfig.from_pretrained(model_path).eos_token_id
        stops |= set(eos if isinstance(eos, list) else [eos])
    return sorted(stop for stop in stops if stop is not None)
