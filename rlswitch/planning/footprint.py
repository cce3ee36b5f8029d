"""What a plan is computed from: the machine, the sizes of the model, and the time a switch takes.

Memory is in bytes, rates in GB/s (1e9 bytes). Of the model only its configuration is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlswitch.config.sections import TENANTS, ModelConfig
from rlswitch.data.hub import builtin_model
from rlswitch.run import Run
from rlswitch.switch.device import Device
from rlswitch.training.logprobs import LOGITS_AT_ONCE
from rlswitch.training.lora import add_adapters
from rlswitch.training.models import outline

GIB = 2**30
ENGINE_OWN = {"cuda": 3 * GIB, "cpu": int(0.66 * GIB)}
"""Awake, beside weights and KV cache: CUDA graphs and the profiled forward; libraries on a CPU."""
ENGINE_ASLEEP = {"cuda": GIB, "cpu": int(0.66 * GIB)}
"""CUDA context and graphs that stay, about 0.8 GB (NeMo-RL#223); libraries on a CPU."""
TRAINER_OWN = {"cuda": 0, "cpu": int(0.6 * GIB)}
"""On CUDA it lies within parking.SLACK."""
PROBE_BYTES = 1 << 26
PER_GB = 1e-9  # seconds for a byte at 1 GB/s
MAP = 2.5e-3 * PER_GB  # CUDA maps or unmaps a GB in 2 to 3 ms: fitted to vLLM's sleep-mode article
CALL_SECONDS = {"cuda": 0.01, "cpu": 0.02}  # a call to the engine: 5 to 20 ms
PAGEABLE = PER_GB / 3  # GPU to unpinned host memory at 2.8 to 4.1 GB/s: sglang#32032
RELOAD, RELOAD_SECONDS = PER_GB / 4, 0.2  # vLLM's loader, from page cache: vllm#48382


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """What a plan needs to know about the machine."""

    kind: str
    """`cuda` or `cpu`, where the device is the host's memory."""
    name: str
    total_bytes: int
    free_bytes: int
    host_free_bytes: int
    h2d_gbps: float
    """Pinned host memory to device; on a CPU a copy within memory."""
    d2h_gbps: float
    copy_gbps: float
    """Within host memory, the target not touched before."""

    @classmethod
    def measure(cls) -> DeviceFacts:
        """This machine's, its copy rates tried out in a fraction of a second."""
        device = Device.detect()
        free, source = device.free_bytes(), torch.ones(PROBE_BYTES, dtype=torch.uint8)
        h2d = d2h = copied = _gbps(lambda: torch.empty_like(source).copy_(source))
        if device.kind == "cuda":
            pinned, there = source.pin_memory(), source.to(device.torch)
            h2d = _gbps(lambda: there.copy_(pinned, non_blocking=True))
            d2h = _gbps(lambda: pinned.copy_(there, non_blocking=True))
        return cls(
            kind=device.kind,
            name=device.name,
            total_bytes=device.total_bytes(),
            free_bytes=free,
            host_free_bytes=psutil.virtual_memory().available,
            h2d_gbps=h2d,
            d2h_gbps=d2h,
            copy_gbps=copied,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a causal language model, tied tensors counted once."""

    parameters: int
    backbone: int
    """Parameters without the language-model head: what a critic is made of."""
    adapters: int
    """Parameters of the LoRA adapters; 0 without any."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int

    @classmethod
    def read(
        cls, config: ModelConfig, key: str = "model.path", kind: Any = AutoModelForCausalLM
    ) -> ModelShape:
        """Builds the model that `key` names on the meta device: names and shapes, no weights."""
        model = _empty_model(config, key, kind)
        text = model.config.get_text_config()
        heads, parameters, backbone = text.num_attention_heads, _count(model), _count(model.base_model)
        if config.lora_rank:
            model = add_adapters(model, config, config.path, causal=True)
        return cls(
            parameters=parameters,
            backbone=backbone,
            adapters=_count(model) - parameters,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            mlp=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            vocabulary=text.vocab_size,
        )

    def kv_bytes_per_token(self, itemsize: int, ranks: int = 1) -> int:
        """Keys and values of a token on one of `ranks` GPUs, with full attention in every layer."""
        return 2 * self.layers * max(self.kv_heads // ranks, 1) * self.head_dim * itemsize

    def activation_bytes(self, tokens: int, itemsize: int, checkpointing: bool) -> int:
        """Estimate of what a forward and backward holds beside parameters and gradients.

        Per token and layer 26 hidden + itemsize (6 heads head_dim + 3 kv_heads head_dim + 4 mlp),
        fitted to what autograd saves in Qwen3; with checkpointing 4 hidden; one layer more is at
        work in the backward pass. Logits of every token, in float32, twice; the statistics of one
        chunk of them (models.token_statistics), four times. `itemsize` below 4 is autocast: its
        casts of the parameters are kept too.
        """
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 26 * self.hidden + itemsize * (6 * width + 3 * kv_width + 4 * self.mlp)
        kept = self.layers * (4 * self.hidden if checkpointing else layer)
        casts = itemsize * self.parameters if itemsize < 4 else 0
        logits = tokens * self.vocabulary
        return tokens * (kept + layer) + casts + 2 * 4 * logits + 4 * 4 * min(logits, LOGITS_AT_ONCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """A tenant that only scores: a judge or a reward model."""

    name: str
    """As in switch.jsonl: the name of its phase."""
    shape: ModelShape
    level: str

    @property
    def has_engine(self) -> bool:
        """With a KV cache and memory of its own beside the weights."""
        return self.name == TENANTS["judge"]

    @classmethod
    def read(cls, run: Run) -> list[Scoring]:
        """Those among the rewards of `run`."""
        judge, model, found = run.judge, run.reward_model, []
        if "judge" in run.reward.functions and judge.path is not None:
            shape = ModelShape.read(ModelConfig(path=judge.path), "judge.path")
            found.append(cls(name=TENANTS["judge"], shape=shape, level=judge.level))
        if "reward_model" in run.reward.functions and model.path is not None:
            kind = AutoModelForSequenceClassification
            shape = ModelShape.read(ModelConfig(path=model.path), "reward_model.path", kind)
            found.append(cls(name=TENANTS["reward_model"], shape=shape, level=model.level))
        return found


def largest_micro_batch(run: Run) -> int:
    """Tokens in it: the budget, or a whole minibatch of rollouts at full length."""
    longest = run.data.max_prompt_tokens + run.rollout.max_new_tokens
    rollouts = run.rollout.num_prompts * run.rollout.group_size // run.trainer.minibatches
    return min(run.trainer.micro_batch_tokens, rollouts * longest)


def switch_seconds(
    facts: DeviceFacts, level: str, weights: int, kv: int, published: int, parked: int
) -> dict[str, float]:
    """Predicted seconds by phase of a switch there and back, from the bytes that each one moves.

    `offload` and `onload` are the trainer's, `sleep` and what wakes the engine's.
    """
    cuda, call, copied = facts.kind == "cuda", CALL_SECONDS[facts.kind], PER_GB / facts.copy_gbps
    backup = weights if cuda and level == "1" else 0
    called = call if level in ("1", "2") else 0
    remapped = weights * MAP if cuda and called else 0
    kv_moved = 0 if level == "0" else kv * (MAP if cuda else copied)
    return {
        "offload": parked * PER_GB / facts.d2h_gbps,
        "publish": published * ((PAGEABLE if cuda else copied) + copied),
        "wake_weights": called + remapped + backup * PER_GB / facts.h2d_gbps,
        "reload": weights * RELOAD + RELOAD_SECONDS if cuda else weights * copied + call,
        "wake_kv_cache": (0 if level == "0" else call) + kv_moved,
        "sleep": call + remapped + (kv_moved if cuda else 0) + backup * PER_GB / facts.d2h_gbps,
        "onload": parked * PER_GB / facts.h2d_gbps,
    }


def _empty_model(config: ModelConfig, key: str, kind: Any) -> Any:
    module = builtin_model(config.path, key)
    if module is None:
        return outline(config, config.path, key, kind)
    with torch.device("meta"):
        return module.build_model()


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _gbps(transfer: Callable[[], object]) -> float:
    """Rate of moving PROBE_BYTES, the better of two tries after a warm-up."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        transfer()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return PROBE_BYTES / min(seconds[1:]) / 1e9


def gib(size: int) -> str:
    """GiB with two decimals; `-` for nothing at all."""
    return f"{size / GIB:.2f}" if size else "-"
