"""The residency plan: what each phase holds on the device, what is parked, what a switch will cost.

No weights are loaded and nothing is written. Every number is a prediction: memory in bytes, shown
as GiB; seconds from rates that are measured on the spot or named with their source (sizes.py).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from rlswitch.config.sections import TENANTS
from rlswitch.engines.vllm.arguments import CPU_KV_CACHE_GIB, llm_arguments
from rlswitch.engines.vllm.local import NO_KV_LEVEL, can_release_kv_cache
from rlswitch.errors import ConfigError
from rlswitch.planning import footprint as sizes
from rlswitch.planning.footprint import DeviceFacts, ModelShape, Scoring, gib
from rlswitch.planning.policy import policy_spec
from rlswitch.planning.verdicts import refuted_levels
from rlswitch.run import Run
from rlswitch.switch.device import Device
from rlswitch.training.parking import SLACK, parked_by_auto
from rlswitch.training.publish import SHM, choose_directory

ROLLOUT, UPDATE = "rollout", "update"
"""The phases of every step; a tenant that scores has one of its own, of its name, in between."""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing in memory: the bytes of the device that it takes in its owner's phase, and in the others."""

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
class Shortfall:
    what: str
    needs: int
    has: int

    def __str__(self) -> str:
        return f"{self.what} needs {gib(self.needs)} GiB and has {gib(self.has)} GiB"


@dataclass(kw_only=True, slots=True)
class Plan:
    """Predicted memory and switch costs of a run on a device."""

    parameters: int
    device: DeviceFacts
    phases: list[str]
    rows: list[Row]
    limit_bytes: int
    """What the rows may sum up to in each phase."""
    level: str
    """What switch.level comes to here."""
    park: str
    """What trainer.park comes to here: nothing, optimizer or everything."""
    directory: str
    """Where versions of the weights are published."""
    published_bytes: int
    freed_bytes: int
    """What the engine gives back when it sleeps."""
    kv_bytes_per_token: int
    kv_tokens: int
    seconds: dict[str, float]
    """By phase of a switch there and back (sizes.switch_seconds)."""
    shortfalls: list[Shortfall] = field(default_factory=list)
    advice: dict[str, Any] = field(default_factory=dict)
    """The fewest settings that would make it fit."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Sleep levels that were out of the question, and why."""

    def total(self, phase: str) -> int:
        """Bytes on the device in a phase; in `parked`, those in host memory."""
        return sum(row.parked if phase == "parked" else row.at(phase) for row in self.rows)

    @property
    def parked_by_trainer(self) -> int:
        return sum(row.parked for row in self.rows if row.phase == UPDATE)


def show(run: Run) -> None:
    """Prints the plan of `run` on this machine; raises ConfigError when nothing can make it fit."""
    facts = DeviceFacts.measure()
    plan = make_plan(run, facts, unusable_levels(run, facts) if run.switch.level == "auto" else {})
    console = Console(highlight=False, markup=False)
    for part in render(plan, run):
        console.print(part, soft_wrap=isinstance(part, str))
    if plan.shortfalls and not plan.advice:
        raise ConfigError(
            f"model.path = {run.model.path}: cannot fit on {plan.device.name}: {plan.shortfalls[0]}, and no"
            " combination of memory settings helps; set a smaller model.path or use a larger device"
        )


def level_of(run: Run) -> str:
    """What switch.level comes to on this machine."""
    if run.switch.level != "auto":
        return run.switch.level
    facts = DeviceFacts.measure()
    shape, others = ModelShape.read(run.model), Scoring.read(run)
    return choose_level(run, shape, facts, unusable_levels(run, facts), others)


def unusable_levels(run: Run, facts: DeviceFacts) -> dict[str, str]:
    """Sleep levels that this vLLM lacks, or that scripts/probe.py has seen fail here, and why."""
    lacking = {} if can_release_kv_cache() else {"kv": NO_KV_LEVEL}
    return refuted_levels(run.model.path, facts.name) | lacking


def choose_level(
    run: Run,
    shape: ModelShape,
    facts: DeviceFacts,
    unusable: Mapping[str, str],
    others: Sequence[Scoring] = (),
) -> str:
    """The least that leaves room for the others: what stays on the device need not come back.

    Level 1 only where level 2 does not work: its copy of weights that the next push replaces is made for
    nothing.
    """
    for level in ("0", "kv"):
        fits = not predict(_changed(run, {"switch.level": level}), shape, facts, others).shortfalls
        if fits and level not in unusable:
            return level
    return "1" if "2" in unusable and "1" not in unusable else "2"


def make_plan(run: Run, facts: DeviceFacts, unusable: Mapping[str, str] = MappingProxyType({})) -> Plan:
    """The plan of `run`; where it does not fit, with the fewest settings that would make it.

    `unusable`: levels that switch.level=auto must not choose, and why.
    """
    shape, others = ModelShape.read(run.model), Scoring.read(run)
    if run.switch.level == "auto":
        run = _changed(run, {"switch.level": choose_level(run, shape, facts, unusable, others)})
    plan = predict(run, shape, facts, others)
    plan.unusable = dict(unusable)
    if plan.shortfalls:
        for settings in remedies(run, facts):
            if not predict(_changed(run, settings), shape, facts, others).shortfalls:
                plan.advice = settings
                break
    return plan


def predict(run: Run, shape: ModelShape, facts: DeviceFacts, others: Sequence[Scoring] = ()) -> Plan:
    """The arithmetic, for steps after the first: with Adam's states; gradients come and go."""
    cuda, level = facts.kind == "cuda", run.switch.level
    gpu_or_cpu = Device(facts.kind)
    engine = llm_arguments(policy_spec(run, run.model.path, gpu_or_cpu), gpu_or_cpu)
    itemsize, ranks = getattr(torch, engine["dtype"]).itemsize, engine["tensor_parallel_size"]
    published = shape.parameters * itemsize
    weights, own = published // ranks, sizes.ENGINE_OWN[facts.kind]
    kv = kv_cache_bytes(engine, weights, facts)
    scoring = [row for tenant in others for row in scoring_rows(tenant, engine, itemsize, facts)]
    policy, critic = Trained.policy(shape, itemsize), Trained.critic(shape, itemsize, run)
    reference = published if run.algorithm.needs_reference and not shape.adapters else 0
    park = run.trainer.park if cuda else "nothing"
    if park == "auto":
        held, states = policy.held + critic.held + reference, 8 * (policy.learned + critic.learned)
        needs = [sum(row.awake for row in scoring if row.phase == tenant.name) for tenant in others]
        park = parked_by_auto(held, states, max(weights + kv + own, *needs, 0), facts.total_bytes)
    mixed = cuda and engine["dtype"] == "bfloat16"  # as in trainer.py
    activations = shape.activation_bytes(
        sizes.largest_micro_batch(run), 2 if mixed else 4, run.trainer.gradient_checkpointing
    )
    keeps = {"0": weights + kv, "kv": weights, "1": 0 if cuda else weights, "2": 0}[level]
    on_host = weights if cuda and level == "1" else 0
    directory = choose_directory(run.switch.transport, published, Path(run.output_dir or "runs"))
    in_memory = 2 * published if directory == SHM else 0
    rows = [
        *policy.rows("policy", park),
        *critic.rows("critic", park),
        Row.of_trainer(f"reference, {engine['dtype']}", reference, park == "everything"),
        Row("activations and logits (estimate)", UPDATE, activations),
        Row(f"engine weights, {engine['dtype']}", ROLLOUT, weights, min(keeps, weights), on_host),
        Row("KV cache", ROLLOUT, kv, max(keeps - weights, 0)),
        Row("engine's own (estimate)", ROLLOUT, own, sizes.ENGINE_ASLEEP[facts.kind]),
        *scoring,
        Row.always("trainer's own (estimate)", sizes.TRAINER_OWN[facts.kind]),
        Row.always(f"two published versions in {SHM}", 0 if cuda else in_memory),
    ]
    per_token = shape.kv_bytes_per_token(itemsize, ranks)
    plan = Plan(
        parameters=shape.parameters,
        device=facts,
        phases=[ROLLOUT, *(tenant.name for tenant in others), UPDATE],
        rows=[row for row in rows if row.awake or row.asleep],
        limit_bytes=min(int((1 - SLACK) * facts.total_bytes), facts.free_bytes),
        level=level,
        park=park,
        directory=str(directory),
        published_bytes=published,
        freed_bytes=weights + kv - keeps,
        kv_bytes_per_token=per_token,
        kv_tokens=kv // per_token,
        seconds={},
    )
    plan.seconds = sizes.switch_seconds(facts, level, weights, kv, published, plan.parked_by_trainer)
    checks = [Shortfall(f"the {phase}", plan.total(phase), plan.limit_bytes) for phase in plan.phases]
    checks.append(Shortfall("one rollout's KV cache", run.max_model_len * per_token, kv))
    if cuda:
        checks += gpu_checks(plan, int(engine["gpu_memory_utilization"] * facts.total_bytes), in_memory)
    plan.shortfalls = [check for check in checks if check.needs > check.has]
    return plan


def gpu_checks(plan: Plan, asked: int, in_memory: int) -> Iterator[Shortfall]:
    """What else can fall short where the device is not the host: `asked` is what an engine starts with."""
    facts = plan.device
    yield Shortfall("vLLM at its start", asked, facts.free_bytes)
    if TENANTS["judge"] in plan.phases:  # started while the rollout engine sleeps
        beside = sum(row.asleep for row in plan.rows if row.phase == ROLLOUT)
        yield Shortfall("the judge's vLLM at its start", asked, facts.free_bytes - beside)
    yield Shortfall("host memory", plan.total("parked") + in_memory, facts.host_free_bytes)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a network takes that is trained, whole or by adapters."""

    held: int
    """Bytes of all its parameters."""
    learned: int
    """How many parameters have gradients: all, or the adapters' and a head's. They are in float32."""

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


def kv_cache_bytes(engine: dict[str, Any], weights: int, facts: DeviceFacts) -> int:
    """Of an engine with these arguments and weights: as set, or what they leave of its share."""
    size = engine.get("kv_cache_memory_bytes")
    if size is not None:
        return size
    share = int(engine["gpu_memory_utilization"] * facts.total_bytes)
    return max(share - weights - sizes.ENGINE_OWN[facts.kind], 0)


def scoring_rows(tenant: Scoring, engine: dict[str, Any], itemsize: int, facts: DeviceFacts) -> Iterator[Row]:
    """What a judge (an engine like the run's own) or a reward model takes in its turn and outside it."""
    name, ranks = tenant.name, engine["tensor_parallel_size"] if tenant.has_engine else 1
    weights, cuda = tenant.shape.parameters * itemsize // ranks, facts.kind == "cuda"
    on_host = weights if tenant.level == "1" else 0
    # On a CPU level 1 has nowhere to move the weights to.
    kept, parked = (0, on_host) if cuda else (on_host, 0)
    yield Row(f"{name} weights, {engine['dtype']}", name, weights, kept, parked)
    if tenant.has_engine:
        yield Row(f"{name}'s KV cache", name, kv_cache_bytes(engine, weights, facts))
        own, asleep = sizes.ENGINE_OWN[facts.kind], sizes.ENGINE_ASLEEP[facts.kind]
        yield Row(f"{name}'s own (estimate)", name, own, asleep)


def remedies(run: Run, facts: DeviceFacts) -> Iterator[dict[str, Any]]:
    """Settings that change what fits: few before many, mild before drastic."""
    engine, trainer = run.engine, run.trainer
    need = run.data.max_prompt_tokens + run.rollout.max_new_tokens
    budgets = [trainer.micro_batch_tokens >> n for n in range(1, 20)]
    values: dict[str, list[Any]] = {
        "switch.level": ["2"],
        "trainer.park": ["optimizer", "everything"] if facts.kind == "cuda" else [],
        "trainer.micro_batch_tokens": [tokens for tokens in budgets if tokens >= need],
        "trainer.gradient_checkpointing": [True],
    }
    if facts.kind == "cuda" and engine.kv_cache_gib is None:
        shares, now = (n / 20 for n in range(1, 20)), engine.gpu_memory_utilization
        values["engine.gpu_memory_utilization"] = sorted(shares, key=lambda x: abs(x - now))
    else:
        size = engine.kv_cache_gib or CPU_KV_CACHE_GIB
        values["engine.kv_cache_gib"] = [size * 2.0**n for n in (-1, 1, -2, 2, -3, 3, -4, 4, 5, 6)]
    for count in range(1, len(values) + 1):
        for keys in itertools.combinations(values, count):
            for chosen in itertools.product(*(values[key] for key in keys)):
                yield dict(zip(keys, chosen, strict=True))


def render(plan: Plan, run: Run) -> Iterator[RenderableType]:
    """The plan for a console of 80 columns."""
    facts = plan.device
    yield f"{run.model.path}: {plan.parameters / 1e6:,.1f} million parameters, on {facts.name}"
    memory = Table("GiB, predicted", box=box.SIMPLE)
    switch = Table("a switch there and back", box=box.SIMPLE)
    for table, heading in (*((memory, phase) for phase in plan.phases), (switch, "seconds, predicted")):
        table.add_column(heading, justify="right")
    for row in plan.rows:
        cells = ((row.parked and phase != row.phase, row.at(phase)) for phase in plan.phases)
        memory.add_row(row.name, *("parked" if parked else gib(size) for parked, size in cells))
    memory.add_section()
    totals = [plan.total(phase) for phase in plan.phases]
    memory.add_row("total", *map(gib, totals), style="bold")
    share = [f"{total / facts.total_bytes:.0%}" for total in totals]
    memory.add_row(f"share of the device, {gib(facts.total_bytes)} GiB", *share)
    for name, seconds in (*plan.seconds.items(), ("total", sum(plan.seconds.values()))):
        switch.add_row(name, f"{seconds:.3f}", style="bold" if name == "total" else None)
    yield memory
    yield switch
    rollouts, whole = run.rollout.num_prompts * run.rollout.group_size, run.max_model_len
    yield (
        f"trainer.park = {run.trainer.park}: parks {plan.park},"
        f" {plan.parked_by_trainer / sizes.GIB:.2f} GiB\n"
        f"switch.level = {run.switch.level}: level {plan.level}, sleeping frees {gib(plan.freed_bytes)} GiB\n"
        f"switch.transport = {run.switch.transport}: {gib(plan.published_bytes)} GiB a push,"
        f" through {plan.directory}\n"
        f"KV cache: {plan.kv_tokens:,} tokens of {plan.kv_bytes_per_token / 1024:.3g} KiB;"
        f" {min(plan.kv_tokens // whole, rollouts)} of {rollouts} rollouts of {whole} at once\n"
        f"copies: to the device {facts.h2d_gbps:.1f} GB/s, from it {facts.d2h_gbps:.1f}, within"
        f" host memory {facts.copy_gbps:.1f}"
    )
    for level, why in plan.unusable.items():
        yield f"level {level} is no choice: {why}"
    if not plan.shortfalls:
        yield f"fits: {gib(plan.limit_bytes)} GiB can be used"
    for shortfall in plan.shortfalls:
        yield f"does not fit: {shortfall}"
    if plan.advice:
        yield "set " + " ".join(f"{key}={str(value).lower()}" for key, value in plan.advice.items())


def _changed(run: Run, settings: dict[str, Any]) -> Run:
    run = copy.deepcopy(run)
    for key, value in settings.items():
        section, name = key.split(".")
        setattr(getattr(run, section), name, value)
    return run
