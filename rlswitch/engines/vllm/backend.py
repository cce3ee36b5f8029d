"""What both ways of driving vLLM share: the calls behind each verb."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlswitch.engines.backend import Backend, Completion, Request, warm_up
from rlswitch.engines.spec import Launch
from rlswitch.errors import EngineError
from rlswitch.proof.fingerprint import checkpoint_elements


class VLLMBackend(Backend):
    """Turns the verbs into vLLM's calls; a subclass transports a call."""

    def __init__(self, launch: Launch, *, elsewhere: bool = False):
        """Called once vLLM answers; warms it up through `generate`, so a subclass sets its own fields before.

        `elsewhere`: on another machine, whose memory is invisible here.
        """
        self.device = launch.device
        self.elsewhere = elsewhere
        self.stop_token_ids = stop_tokens(launch.spec.model_path, launch.tokenizer)
        self.workers = self.collective_rpc("memory")
        self.pids = [] if elsewhere else [worker["pid"] for worker in self.workers]
        self.facts = self.collective_rpc("facts")[0]
        self.block_size = self.facts["block_size"]
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
    def call(self, verb: str, **arguments: Any) -> Any:
        """Calls the method of vllm.LLM or the endpoint `verb`; returns its success, if it reports that."""

    @abstractmethod
    def _is_sleeping(self) -> bool:
        """Whether anything is asleep, or the scheduler is paused."""

    @abstractmethod
    def _run(
        self, prompts: Sequence[list[int]], parameters: Sequence[dict[str, Any]], into: dict[int, Completion]
    ) -> None:
        """As `generate`, with SamplingParams' arguments for each prompt."""

    def sleeping_bytes(self, level: str) -> int:
        if self.elsewhere or level == "0":
            return 0
        if self.device.kind == "cuda":  # device memory is that of the first GPU
            worker = self.workers[0]
            return worker["kv_bytes"] + (0 if level == "kv" else worker["weight_bytes"])
        # On a CPU level 1 frees no weights: they are in host memory already.
        kv_bytes = sum(worker["kv_bytes"] for worker in self.workers)
        return kv_bytes + (self.weight_bytes if level == "2" else 0)

    def sleep(self, level: str) -> None:
        self.paused = level in ("0", "kv")
        self.call("sleep", level=0 if self.paused else int(level))
        if level == "kv":
            self.call("release_kv_cache_memory")
        self.asleep = {"0": set(), "kv": {"kv_cache"}}.get(level, {"weights", "kv_cache"})

    def wake(self, tag: str) -> None:
        if tag in self.asleep:
            # One tag per call, and only one that sleeps: vLLM 0.20-0.27 would map it twice.
            if self.device.kind == "cuda":
                self.device.reclaim()  # mapping cannot use memory that torch's allocator caches
            self.call("wake_up", tags=[tag])
            self.asleep.discard(tag)
        if tag != "kv_cache":
            return
        if self.paused:
            self.call("wake_up", tags=["scheduling"])
            self.paused = False
        if self._is_sleeping():
            raise EngineError("vLLM reports that it is asleep after every tag was woken: generate would hang")

    def reload(self, path: Path) -> None:
        self.collective_rpc("reload_weights", weights_path=str(path))

    def fingerprint(self) -> list[dict[str, Any]]:
        return self.collective_rpc("fingerprint")

    def reset_prefix_cache(self) -> bool:
        return bool(self.call("reset_prefix_cache"))

    def generate(self, requests: Sequence[Request], into: dict[int, Completion]) -> None:
        parameters = [
            {
                "temperature": request.temperature,
                "seed": request.seed,
                "max_tokens": request.max_new_tokens,
                "stop_token_ids": self.stop_token_ids,
            }
            for request in requests
        ]
        self._run([request.token_ids for request in requests], parameters, into)

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        # One at a time: in bfloat16 a log-probability depends on the shape of its batch.
        return [self._probe([it], prompt_logprobs=0)[0].prompt_logprobs for it in sequences]

    def count_cached_tokens(self, sequences: Sequence[list[int]]) -> int:
        return sum(it.cached_tokens for it in self._probe(sequences))

    def _probe(self, sequences: Sequence[list[int]], **more: int) -> list[Completion]:
        """Runs the sequences as prompts that generate one token each."""
        completions: dict[int, Completion] = {}
        self._run(sequences, [{"temperature": 0.0, "max_tokens": 1, **more}] * len(sequences), completions)
        return [completions[index] for index in range(len(sequences))]


def stop_tokens(model_path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sequence tokens of the tokenizer and of the model's generation_config.json."""
    stops = {tokenizer.eos_token_id}
    if (Path(model_path) / "generation_config.json").exists():
        eos = GenerationConfig.from_pretrained(model_path).eos_token_id
        stops |= set(eos if isinstance(eos, list) else [eos])
    return sorted(stop for stop in stops if stop is not None)
