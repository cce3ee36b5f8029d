"""Bytes by owner and phase: the model, what training it takes, the engine, judge and reward model.

Of a model only the configuration is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from rlswitch.config.sections import ModelConfig
from rlswitch.data.hub import builtin_model
from rlswitch.engines.vllm.arguments import llm_arguments
from rlswitch.planning.machine import GIB, DeviceFacts
from rlswitch.planning.policy import policy_spec
from rlswitch.run import Run
from rlswitch.switch.device import Device
from rlswitch.training.logprobs import LOGITS_AT_ONCE
from rlswitch.training.lora import add_adapters
from rlswitch.training.models import outline
from rlswitch.training.parking import parked_by_auto
from rlswitch.training.publish import SHM, choose_directory

ENGINE_OWN = {"cuda": 3 * GIB, "cpu": int(0.66 * GIB)}
"""Awake, besides weights and KV cache: CUDA graphs and the profiled forward; on a CPU, libraries."""
ENGINE_ASLEEP = {"cuda": GIB, "cpu": int(0.66 * GIB)}
"""CUDA context and graphs that stay, about 0.8 GB (NeMo-RL#223); libraries on a CPU."""
TRAINER_OWN = {"cuda": 0, "cpu": int(0.6 * GIB)}
"""On CUDA it is within parking.SLACK."""
ROLLOUT, UPDATE = "rollout", "update"
"""The phases of every step. Each scoring tenant adds a phase with its own name between them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a causal language model, tied tensors counted once."""

    parameters: int
    backbone: int
    """Parameters without the language-model head, as in a critic."""
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
    """A tenant that only scores."""

    name: str
    """Its name in switch.jsonl, and of its phase."""
    shape: ModelShape
    level: str
    has_engine: bool
    """Whether it has a KV cache and workspaces besides its weights."""

    @classmethod
    def read(cls, run: Run) -> list[Scoring]:
        """Those among the rewards of `run`."""
        return [
            cls(
                name=it.device_name,
                shape=ModelShape.read(
                    ModelConfig(path=it.path), f"{reward}.path", getattr(transformers, it.auto_class)
                ),
                level=it.level,
                has_engine=it.has_engine,
            )
            for reward, it in run.tenants.items()
            if it.path is not None
        ]


def largest_micro_batch(run: Run) -> int:
    """Its tokens: trainer.micro_batch_tokens, or fewer if a whole minibatch at full length is smaller."""
    longest = run.data.max_prompt_tokens + run.rollout.max_new_tokens
    rollouts = run.rollout.num_prompts * run.rollout.group_size // run.trainer.minibatches
    return min(run.trainer.micro_batch_tokens, rollouts * longest)


def _empty_model(config: ModelConfig, key: str, kind: Any) -> Any:
    module = builtin_model(config.path, key)
    if module is None:
        return outline(config, config.path, key, kind)
    with torch.device("meta"):
        return module.build_model()


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True, slots=True)
class Row:
    """One item in device memory: its bytes in its owner's phase (`awake`) and in the others (`asleep`)."""

    name: str
    phase: str
    awake: int
    asleep: int = 0
    parked: int = 0
    """Bytes in pinned host memory outside its owner's phase."""

    @classmethod
    def of_trainer(cls, name: str, size: int, parked: bool) -> Row:
        return cls(name, UPDATE, size, 0, size) if parked else cls.always(name, size)

    @classmethod
    def always(cls, name: str, size: int) -> Row:
        return cls(name, UPDATE, size, size)

    def at(self, phase: str) -> int:
        return self.awake if phase == self.phase else self.asleep


@dataclass(frozen=True, slots=True)
class Trained:
    """Memory of a network in training, whole or by its adapters."""

    held: int
    """Bytes of all its parameters."""
    learned: int
    """Number of parameters with gradients, in float32: all, or those of the adapters and a head."""

    @classmethod
    def policy(cls, shape: ModelShape, itemsize: int) -> Trained:
        return cls._of(shape.parameters, shape.adapters, itemsize, head=0)

    @classmethod
    def critic(cls, shape: ModelShape, itemsize: int, run: Run) -> Trained:
        if not run.algorithm.needs_critic:
            return cls(0, 0)
        return cls._of(shape.backbone, shape.adapters, itemsize, head=shape.hidden + 1)

    @classmethod
    def _of(cls, parameters: int, adapters: int, itemsize: int, head: int) -> Trained:
        learned = (adapters or parameters) + head
        return cls(4 * learned + (itemsize * parameters if adapters else 0), learned)

    def rows(self, name: str, park: str) -> Iterator[Row]:
        yield Row.of_trainer(f"{name} parameters", self.held, park == "everything")
        yield Row(f"{name} gradients, float32", UPDATE, 4 * self.learned)
        yield Row.of_trainer(f"{name} Adam states, float32", 8 * self.learned, park != "nothing")


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes by owner, independent of parking and sleep level."""

    facts: DeviceFacts
    dtype: str
    """What the engine computes in."""
    itemsize: int
    ranks: int
    """GPUs that share the engine's weights."""
    weights: int
    """The engine's, on one GPU."""
    kv: int
    own: int
    """The engine's libraries, CUDA graphs and workspaces."""
    start_bytes: int
    """GPU memory that vLLM requires when it starts."""
    published: int
    """One version of the weights, in the engine's dtype."""
    directory: Path
    policy: Trained
    critic: Trained
    reference: int
    activations: int
    scoring: list[Row]
    """Of the judge and the reward model."""

    @classmethod
    def of(cls, run: Run, shape: ModelShape, facts: DeviceFacts, others: Sequence[Scoring]) -> Footprint:
        device = Device(facts.kind)
        engine = llm_arguments(policy_spec(run, run.model.path, device), device)
        itemsize, ranks = getattr(torch, engine["dtype"]).itemsize, engine["tensor_parallel_size"]
        published = shape.parameters * itemsize
        weights = published // ranks
        mixed = facts.kind == "cuda" and engine["dtype"] == "bfloat16"  # as in training/trainer.py
        return cls(
            facts=facts,
            dtype=engine["dtype"],
            itemsize=itemsize,
            ranks=ranks,
            weights=weights,
            kv=kv_cache_bytes(engine, weights, facts),
            own=ENGINE_OWN[facts.kind],
            start_bytes=share_bytes(engine, facts),
            published=published,
            directory=choose_directory(run.switch.transport, published, Path(run.output_dir or "runs")),
            policy=Trained.policy(shape, itemsize),
            critic=Trained.critic(shape, itemsize, run),
            reference=published if run.algorithm.needs_reference and not shape.adapters else 0,
            activations=shape.activation_bytes(
                largest_micro_batch(run), 2 if mixed else 4, run.trainer.gradient_checkpointing
            ),
            scoring=[row for tenant in others for row in scoring_rows(tenant, engine, itemsize, facts)],
        )

    @property
    def in_memory(self) -> int:
        """Host memory that published versions take: the old one stays until the new one is loaded."""
        return 2 * self.published if self.directory == SHM else 0

    def kept_asleep(self, level: str) -> int:
        """Bytes of the engine that stay on the device at `level`: a CPU has nowhere to move level 1 to."""
        at_level_1 = 0 if self.facts.kind == "cuda" else self.weights
        return {"0": self.weights + self.kv, "kv": self.weights, "1": at_level_1, "2": 0}[level]

    def parking(self, park: str) -> str:
        """trainer.park with `auto` resolved: nothing, optimizer or everything."""
        if self.facts.kind != "cuda":
            return "nothing"
        if park != "auto":
            return park
        held = self.policy.held + self.critic.held + self.reference
        states = 8 * (self.policy.learned + self.critic.learned)
        awake = {ROLLOUT: self.weights + self.kv + self.own}
        for row in self.scoring:
            awake[row.phase] = awake.get(row.phase, 0) + row.awake
        return parked_by_auto(held, states, max(awake.values()), self.facts.total_bytes)

    def rows(self, park: str, level: str) -> Iterator[Row]:
        kept, cuda = self.kept_asleep(level), self.facts.kind == "cuda"
        on_host = self.weights if cuda and level == "1" else 0
        yield from self.policy.rows("policy", park)
        yield from self.critic.rows("critic", park)
        yield Row.of_trainer(f"reference, {self.dtype}", self.reference, park == "everything")
        yield Row("activations and logits (estimate)", UPDATE, self.activations)
        yield Row(f"engine weights, {self.dtype}", ROLLOUT, self.weights, min(kept, self.weights), on_host)
        yield Row("KV cache", ROLLOUT, self.kv, max(kept - self.weights, 0))
        yield Row("engine's own (estimate)", ROLLOUT, self.own, ENGINE_ASLEEP[self.facts.kind])
        yield from self.scoring
        yield Row.always("trainer's own (estimate)", TRAINER_OWN[self.facts.kind])
        yield Row.always(f"two published versions in {SHM}", 0 if cuda else self.in_memory)


def kv_cache_bytes(engine: dict[str, Any], weights: int, facts: DeviceFacts) -> int:
    """Size of the KV cache: as configured, or the rest of the engine's share of the GPU."""
    size = engine.get("kv_cache_memory_bytes")
    if size is not None:
        return size
    return max(share_bytes(engine, facts) - weights - ENGINE_OWN[facts.kind], 0)


def scoring_rows(tenant: Scoring, engine: dict[str, Any], itemsize: int, facts: DeviceFacts) -> Iterator[Row]:
    """Memory of a judge (an engine like the run's own) or a reward model."""
    name, ranks = tenant.name, engine["tensor_parallel_size"] if tenant.has_engine else 1
    weights, cuda = tenant.shape.parameters * itemsize // ranks, facts.kind == "cuda"
    on_host = weights if tenant.level == "1" else 0
    # On a CPU level 1 has nowhere to move the weights to.
    kept, parked = (0, on_host) if cuda else (on_host, 0)
    yield Row(f"{name} weights, {engine['dtype']}", name, weights, kept, parked)
    if tenant.has_engine:
        yield Row(f"{name}'s KV cache", name, kv_cache_bytes(engine, weights, facts))
        own, asleep = ENGINE_OWN[facts.kind], ENGINE_ASLEEP[facts.kind]
        yield Row(f"{name}'s own (estimate)", name, own, asleep)


def share_bytes(engine: dict[str, Any], facts: DeviceFacts) -> int:
    """GPU memory that an engine with these arguments claims; 0 on a CPU."""
    return int(engine.get("gpu_memory_utilization", 0) * facts.total_bytes)
