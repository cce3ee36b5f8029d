"""Bytes by owner and phase: the model, what training it takes, the engine, judge and reward model.

Of a model only the configuration is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from rlswitch.config.sections import ModelConfig
from rlswitch.data.hub import builtin_model
from rlswitch.engines.vllm.arguments import llm_arguments
from rlswitch.planning.machine import GIB, DeviceFacts, gib, switch_seconds
from rlswitch.planning.policy import policy_spec
from rlswitch.run import Run
from rlswitch.switch.device import Device
from rlswitch.training.logprobs import LOGITS_AT_ONCE
from rlswitch.training.lora import add_adapters
from rlswitch.training.models import outline
from rlswitch.training.parking import SLACK, parked_by_auto
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
    def read(cls, config: ModelConfig, key: str = "model.path", kind: Any = AutoModelForCausalLM) -> Self:
        """Builds the model that `key` names on the meta device: names and shapes, no weights."""
        if module := builtin_model(config.path, key):
            with torch.device("meta"):
                model = module.build_model()
        else:
            model = outline(config, config.path, key, kind)
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

        Per token and layer 26 hidden + itemsize (6 heads head_dim + 3 kv_heads head_dim + 4 mlp), fitted to
        what autograd saves in Qwen3; with checkpointing 4 hidden; one layer more is at work in the backward
        pass. Logits of every token, in float32, twice; the statistics of one chunk of them, four times.
        `itemsize` below 4 is autocast: its casts of the parameters are kept too.
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
    """Its name in switch.jsonl, and of its phase."""
    shape: ModelShape
    level: str

    has_engine: bool
    """Whether it has a KV cache and workspaces besides its weights."""

    @classmethod
    def read(cls, run: Run) -> list[Self]:
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

    def at(self, phase: str) -> int:
        return self.awake if phase == self.phase else self.asleep


def trainer_rows(
    run: Run, shape: ModelShape, dtype: str, facts: DeviceFacts, awake: int
) -> tuple[str, list[Row]]:
    """The trainer's memory beside an engine of `awake` bytes, after trainer.park with `auto` resolved."""
    itemsize, cuda = getattr(torch, dtype).itemsize, facts.kind == "cuda"
    networks = {"policy": (shape.parameters, 0)}
    if run.algorithm.needs_critic:
        networks["critic"] = shape.backbone, shape.hidden + 1
    learned = {name: (shape.adapters or size) + head for name, (size, head) in networks.items()}
    held = {name: 4 * count for name, count in learned.items()}  # float32
    reference = itemsize * shape.parameters if run.algorithm.needs_reference else 0
    if shape.adapters:  # the frozen weights are the reference too
        held = {name: held[name] + itemsize * size for name, (size, _) in networks.items()}
        reference = 0
    park = run.trainer.park if cuda else "nothing"
    if park == "auto":
        parameters, states = sum(held.values()) + reference, 8 * sum(learned.values())
        park = parked_by_auto(parameters, states, awake, facts.total_bytes)

    def resident(name: str, size: int, parked: bool = False) -> Row:
        return Row(name, UPDATE, size, 0, size) if parked else Row(name, UPDATE, size, size)

    rows = []
    for name, count in learned.items():
        rows.append(resident(f"{name} parameters", held[name], park == "everything"))
        rows.append(Row(f"{name} gradients, float32", UPDATE, 4 * count))
        rows.append(resident(f"{name} Adam states, float32", 8 * count, park != "nothing"))
    mixed = cuda and dtype == "bfloat16"  # as in training/trainer.py
    minibatch = run.rollout.num_prompts * run.rollout.group_size // run.trainer.minibatches
    longest = run.data.max_prompt_tokens + run.rollout.max_new_tokens
    tokens = min(run.trainer.micro_batch_tokens, minibatch * longest)
    size = shape.activation_bytes(tokens, 2 if mixed else 4, run.trainer.gradient_checkpointing)
    rows.append(resident(f"reference, {dtype}", reference, park == "everything"))
    rows.append(Row("activations and logits (estimate)", UPDATE, size))
    return park, [*rows, resident("trainer's own (estimate)", TRAINER_OWN[facts.kind])]


def weights_row(name: str, phase: str, size: int, level: str, facts: DeviceFacts) -> Row:
    """Weights that sleep at `level`: on a CPU level 1 has nowhere to move them to."""
    if level == "1" and facts.kind == "cuda":
        return Row(name, phase, size, 0, size)
    return Row(name, phase, size, 0 if level == "2" else size)


def scoring_rows(tenant: Scoring, engine: dict[str, Any], itemsize: int, facts: DeviceFacts) -> Iterator[Row]:
    """Memory of a judge (an engine like the run's own) or a reward model."""
    name, ranks = tenant.name, engine["tensor_parallel_size"] if tenant.has_engine else 1
    weights = tenant.shape.parameters * itemsize // ranks
    yield weights_row(f"{name} weights, {engine['dtype']}", name, weights, tenant.level, facts)
    if tenant.has_engine:
        yield Row(f"{name}'s KV cache", name, kv_cache_bytes(engine, weights, facts))
        yield Row(f"{name}'s own (estimate)", name, ENGINE_OWN[facts.kind], ENGINE_ASLEEP[facts.kind])


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Predicted memory of a run on a machine after its first step, which allocates Adam's states."""

    run: Run
    shape: ModelShape
    facts: DeviceFacts
    phases: list[str]
    engines: list[str]
    """Further engines by phase, each started while the rollout engine sleeps."""
    rows: list[Row]
    park: str
    """trainer.park with `auto` resolved: nothing, optimizer or everything."""
    directory: Path
    """Where versions of the weights are published."""
    published: int
    """One version of the weights, in the engine's dtype."""
    weights: int
    """The engine's, on one GPU."""
    kv: int
    freed: int
    """Weights and KV cache that leave the device when the engine sleeps."""
    kv_per_token: int
    start: int
    """GPU memory that vLLM requires when it starts."""

    @classmethod
    def of(cls, run: Run, shape: ModelShape, facts: DeviceFacts, others: Sequence[Scoring] = ()) -> Self:
        target = Device(facts.kind)
        engine = llm_arguments(policy_spec(run, run.model.path, target), target)
        dtype, ranks, level = engine["dtype"], engine["tensor_parallel_size"], run.switch.level
        itemsize = getattr(torch, dtype).itemsize
        published = shape.parameters * itemsize
        weights = published // ranks
        kv = kv_cache_bytes(engine, weights, facts)
        sleeping = [
            weights_row(f"engine weights, {dtype}", ROLLOUT, weights, level, facts),
            Row("KV cache", ROLLOUT, kv, kv if level == "0" else 0),
        ]
        rows = [
            *sleeping,
            Row("engine's own (estimate)", ROLLOUT, ENGINE_OWN[facts.kind], ENGINE_ASLEEP[facts.kind]),
            *(row for tenant in others for row in scoring_rows(tenant, engine, itemsize, facts)),
        ]
        phases = [ROLLOUT, *(tenant.name for tenant in others)]
        awake = max(sum(row.awake for row in rows if row.phase == phase) for phase in phases)
        park, trainer = trainer_rows(run, shape, dtype, facts, awake)
        directory = choose_directory(run.switch.transport, published, Path(run.output_dir or "runs"))
        in_memory = 2 * published if directory == SHM else 0  # the old one stays until the new one is loaded
        device, host = (0, in_memory) if facts.kind == "cuda" else (in_memory, 0)
        rows = [*trainer, *rows, Row(f"two published versions in {SHM}", "", 0, device, host)]
        return cls(
            run=run,
            shape=shape,
            facts=facts,
            phases=[*phases, UPDATE],
            engines=[it.name for it in others if it.has_engine],
            rows=[row for row in rows if row.awake or row.asleep or row.parked],
            park=park,
            directory=directory,
            published=published,
            weights=weights,
            kv=kv,
            freed=sum(row.awake - row.asleep for row in sleeping),
            kv_per_token=shape.kv_bytes_per_token(itemsize, ranks),
            start=share_bytes(engine, facts),
        )

    @property
    def parked_by_trainer(self) -> int:
        return sum(row.parked for row in self.rows if row.phase == UPDATE)

    @property
    def limit(self) -> int:
        """Upper bound on the sum of the rows in each phase."""
        return min(int((1 - SLACK) * self.facts.total_bytes), self.facts.free_bytes)

    def total(self, phase: str) -> int:
        """Bytes on the device in a phase; in `parked`, those in host memory."""
        return sum(row.parked if phase == "parked" else row.at(phase) for row in self.rows)

    def seconds(self) -> dict[str, float]:
        """Predicted seconds by phase of a round trip."""
        sizes = self.weights, self.kv, self.published, self.parked_by_trainer
        return switch_seconds(self.facts, self.run.switch.level, *sizes)

    def shortfalls(self) -> list[str]:
        """What needs more memory than there is, one line each."""
        free = self.facts.free_bytes
        checks = [(f"the {phase}", self.total(phase), self.limit) for phase in self.phases]
        checks.append(("one rollout's KV cache", self.run.max_model_len * self.kv_per_token, self.kv))
        if self.facts.kind == "cuda":
            checks.append(("vLLM at its start", self.start, free))
            beside = sum(row.asleep for row in self.rows if row.phase == ROLLOUT)
            for name in self.engines:
                checks.append((f"the {name}'s vLLM at its start", self.start, free - beside))
            checks.append(("host memory", self.total("parked"), self.facts.host_free_bytes))
        line = "{} needs {} GiB and has {} GiB"
        return [line.format(what, gib(needs), gib(has)) for what, needs, has in checks if needs > has]


def kv_cache_bytes(engine: dict[str, Any], weights: int, facts: DeviceFacts) -> int:
    """Size of the KV cache: as configured, or the rest of the engine's share of the GPU."""
    size, rest = engine.get("kv_cache_memory_bytes"), share_bytes(engine, facts) - weights
    return max(rest - ENGINE_OWN[facts.kind], 0) if size is None else size


def share_bytes(engine: dict[str, Any], facts: DeviceFacts) -> int:
    """GPU memory that an engine with these arguments claims; 0 on a CPU."""
    return int(engine.get("gpu_memory_utilization", 0) * facts.total_bytes)
