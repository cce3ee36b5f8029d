"""The stages of gpu_check.py in order: what each shows, runs and allows, and the remedy if it fails."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rlswitch.config.fields import did_you_mean

from . import gpu_judges as judges
from .gpu_findings import Limits
from .gpu_judges import GIB, Judge
from .gpu_programs import DATA, MODEL, REWARD, ROOT, SHAPES, SMALL, Shape
from .settings import GpuCheckSettings

PPO_STEPS = {"cuda": 8, "cpu": 4}
SHM_STEPS, DISK_STEPS, SERVER_STEPS = 4, 3, 2
PARKED, EAGER = "trainer.park=everything", "engine.enforce_eager=true"
KV_GIB = {"cuda": 1.0, "cpu": 0.125}
"""For the built-in model, whose KV cache is tiny."""


@dataclass(kw_only=True, slots=True)
class Context:
    """Inputs of the stages' commands."""

    directory: Path
    """Contains a folder for each stage."""
    policy: str = "builtin:addition"
    """The trained model: a built-in name or a directory."""
    overrides: list[str] = field(default_factory=list)
    cap_scale: float = 1.0
    machine: Mapping[str, Any] = field(default_factory=dict)
    fork_server: bool = True
    """False once the stage `fork` has failed."""

    @property
    def kind(self) -> str:
        return self.machine["kind"]

    @property
    def shape(self) -> Shape:
        return SHAPES[self.kind]

    @property
    def models(self) -> Path:
        return self.directory / "models"

    def program(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "rlswitch.benchmarks.gpu_programs", *map(str, words)]

    def train(self, stage: str, *words: str) -> list[str]:
        """A train.py command that writes to the folder of `stage`; no trackers, evaluation or checkpoints."""
        common = ("logger=[]", "evaluation.every=0", "checkpoint.every=0", "resume=never")
        warm = f"engine.fork_server={str(self.fork_server).lower()}"
        where = f"output_dir={self.directory / stage}"
        return [sys.executable, str(ROOT / "train.py"), *common, warm, *words, *self.overrides, where]


Command = Callable[[Context], list[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    name: str
    cap_s: float
    """Time limit in seconds."""
    shows: str
    remedy: str
    """What to do when it fails."""
    judge: Callable[[Context], Judge]
    command: Command | None = None
    """None: the stage judges the files of other stages."""
    needs: tuple[str, ...] = ()
    """Stages that must pass first; they run even if only this one is requested."""
    unfit: Callable[[Context], str] = lambda context: ""
    """Why the stage cannot run here; empty if it can."""


def turns_command(stage: str, levels: str, context: Context) -> list[str]:
    names = (context.policy, context.models / SMALL)
    warm = str(context.fork_server).lower()
    return context.program("turns", context.directory / stage, warm, levels, *names)


def ppo_command(context: Context) -> list[str]:
    batch = () if context.kind == "cuda" else ("rollout.num_prompts=16", "rollout.group_size=4")
    kv = f"engine.kv_cache_gib={KV_GIB[context.kind]}"
    steps = f"num_steps={PPO_STEPS[context.kind]}"
    return context.train("ppo", "recipe=ppo", f"model.path={context.policy}", steps, kv, *batch, PARKED)


def push_command(transport: str, context: Context) -> list[str]:
    """GRPO on the larger model. The disk variant uses no graphs, so it starts faster."""
    shape, through_disk = context.shape, transport == "disk"
    return context.train(
        f"push_{transport}",
        "recipe=grpo",
        f"model.path={context.models / MODEL}",
        f"data.path={context.models / DATA}",
        "data.eval_rows=8",
        "data.max_prompt_tokens=16",
        f"reward.functions=[{context.models / REWARD}:score]",
        f"num_steps={DISK_STEPS if through_disk else SHM_STEPS}",
        f"rollout.num_prompts={shape.prompts}",
        f"rollout.group_size={shape.group}",
        f"rollout.max_new_tokens={shape.new_tokens}",
        "trainer.lr=1e-5",
        "trainer.warmup_steps=0",
        "trainer.minibatches=1",
        "trainer.micro_batch_tokens=4096",
        PARKED,
        f"engine.kv_cache_gib={shape.kv_cache_gib}",
        f"engine.enforce_eager={str(through_disk).lower()}",
        f"switch.transport={transport}",
    )


def server_command(context: Context) -> list[str]:
    batch = () if context.kind == "cuda" else ("rollout.num_prompts=8", "rollout.group_size=4")
    kv = f"engine.kv_cache_gib={KV_GIB[context.kind]}"
    policy = f"model.path={context.policy}"
    words = ("recipe=grpo", "engine=server", policy, f"num_steps={SERVER_STEPS}", kv, EAGER)
    return context.train("server", *words, *batch)


def bench_command(context: Context) -> list[str]:
    modes = "restart,1,2" if context.kind == "cuda" else "1,2"
    words = (f"modes={modes}", "transports=local", "cycles=1", "ablations=", "enforce_eager=true")
    kv = f"kv_cache_gib={KV_GIB[context.kind]}"
    script = str(ROOT / "scripts" / "bench_switch.py")
    return [sys.executable, script, *words, kv, f"output_dir={context.directory / 'bench'}"]


def judge_push(steps: int, limits: Limits, context: Context) -> Judge:
    """Asleep, the engine frees its KV cache and its weights (the checkpoint's size)."""
    weights = sum(file.stat().st_size for file in (context.models / MODEL).glob("*.safetensors"))
    held = context.shape.kv_cache_gib * GIB + weights
    return partial(judges.judge_training, steps=steps, limits=limits, asleep_bytes=held)


def no_run(pattern: str, context: Context) -> str:
    """A reason to skip a stage that reads other stages' metrics."""
    found = any(context.directory.glob(f"{pattern}/metrics.jsonl"))
    return "" if found else f"no stage {pattern} wrote metrics"


def no_room_in_shm(context: Context) -> str:
    """Needs two checkpoints' size: a push is written before the last one is removed."""
    need, free = 4 if context.kind == "cuda" else 0.2, context.machine["shm_free_gib"]
    return f"/dev/shm has {free:g} GiB free, the stage needs {need:g}" if free < need else ""


def no_kv_level(context: Context) -> str:
    spec = importlib.util.find_spec("vllm")
    file = Path(spec.origin or "").with_name("entrypoints") / "llm.py" if spec else Path()
    there = file.is_file() and "release_kv_cache_memory" in file.read_text()
    return "" if there else "this vLLM cannot release the KV cache alone (0.31 and later can)"


def cold_bench(context: Context) -> str:
    return "" if context.fork_server else "bench_switch.py uses the fork server, which failed its stage"


def no_trl(context: Context) -> str:
    return "" if importlib.util.find_spec("trl") else "trl is not installed"


STAGES = (
    Stage(
        name="machine",
        cap_s=90,
        shows="the device, its driver, the versions",
        remedy="install or carry what is missing (docs/gpu.md); torch finds no GPU: compare the driver with"
        " torch.version.cuda",
        command=lambda context: context.program("machine", context.directory / "machine" / "machine.json"),
        judge=lambda context: judges.judge_machine,
    ),
    Stage(
        name="fork",
        cap_s=70,
        shows="the fork server leaves CUDA uninitialised and torch unpatched",
        remedy="later stages run with engine.fork_server=false; find the import in"
        " rlswitch/processes/preload.py that initialises CUDA or patches torch",
        command=lambda context: context.program("fork", context.directory / "fork"),
        judge=lambda context: judges.judge_fork,
    ),
    Stage(
        name="models",
        cap_s=180,
        shows="creates models with random weights and the built-in policy",
        remedy="too slow: set policy= to a copy of ~/.cache/rlswitch/addition-*-seed0 (docs/gpu.md)",
        command=lambda context: context.program("models", context.models, context.kind, context.policy),
        judge=lambda context: judges.judge_models,
    ),
    Stage(
        name="turns",
        cap_s=130,
        shows="two engines take turns at levels 2 and 1: fast, proven, same answers",
        remedy="not started: level-2/engine-0.log; canary gaps of 0.02 to 0.3: scores depend on the batch;"
        " an illegal access after a wake-up: VLLM_USE_V2_MODEL_RUNNER=0",
        command=partial(turns_command, "turns", "2,1"),
        judge=lambda context: partial(judges.judge_turns, levels=("2", "1")),
        needs=("models",),
    ),
    Stage(
        name="ppo",
        cap_s=110,
        shows="PPO with everything parked: proven, learns, frees memory",
        remedy="device errors: the trainer; out of memory: trainer.park; a mismatch above 0.1 with every push"
        " proven: temperature or rounding of logits",
        command=ppo_command,
        judge=lambda context: partial(
            judges.judge_training, steps=PPO_STEPS[context.kind], limits=judges.PPO
        ),
        needs=("models",),
    ),
    Stage(
        name="push_shm",
        cap_s=150,
        shows="push and proof of a 0.6B model through /dev/shm, with CUDA graphs",
        remedy="not started: overrides=engine.enforce_eager=true; slow reload or parking: pageable memory;"
        " `fingerprint`: docs/proof.md",
        command=partial(push_command, "shm"),
        judge=partial(judge_push, SHM_STEPS, judges.SHM),
        needs=("models",),
        unfit=no_room_in_shm,
    ),
    Stage(
        name="push_disk",
        cap_s=110,
        shows="push and proof of a 0.6B model through the disk, without graphs",
        remedy="slow: put output_dir on a faster disk; otherwise as for push_shm",
        command=partial(push_command, "disk"),
        judge=partial(judge_push, DISK_STEPS, judges.DISK),
        needs=("models",),
    ),
    Stage(
        name="canary",
        cap_s=1,
        shows="the canary gap of each run, as a basis for its tolerance",
        remedy="raise the bound in rlswitch/proof only if every fingerprint matched",
        judge=lambda context: judges.judge_canary,
        unfit=partial(no_run, "*"),
    ),
    Stage(
        name="speed",
        cap_s=1,
        shows="tokens per second of 512 requests, each with its own seed",
        remedy="look for `Using V2 Model Runner` and the attention backend in push_shm/engine.log",
        judge=lambda context: judges.judge_speed,
        unfit=partial(no_run, "push_*"),
    ),
    Stage(
        name="memory",
        cap_s=1,
        shows="device memory after an update",
        remedy="smaller trainer.micro_batch_tokens; trainer.park=everything",
        judge=lambda context: judges.judge_memory,
        unfit=partial(no_run, "push_*"),
    ),
    Stage(
        name="kv",
        cap_s=80,
        shows="sleep level kv: two engines take turns",
        remedy="use switch.level=2; compare with `turns`",
        command=partial(turns_command, "kv", "kv"),
        judge=lambda context: partial(judges.judge_turns, levels=("kv",)),
        needs=("models",),
        unfit=no_kv_level,
    ),
    Stage(
        name="server",
        cap_s=90,
        shows="the server engine: pushes proven over HTTP",
        remedy="read server/engine.log; engine=local is the main path",
        command=server_command,
        judge=lambda context: partial(judges.judge_training, steps=SERVER_STEPS, limits=judges.SERVER),
        needs=("models",),
    ),
    Stage(
        name="bench",
        cap_s=150,
        shows="a short bench_switch.py: wake-ups at levels 1 and 2, a restart",
        remedy="run scripts/bench_switch.py alone; scripts/probe.py names the failing level",
        command=bench_command,
        judge=lambda context: judges.judge_bench,
        unfit=cold_bench,
    ),
    Stage(
        name="trl",
        cap_s=120,
        shows="seconds per step, compared with TRL's GRPO",
        remedy="a comparison only; TRL may not support this vLLM",
        command=lambda context: context.program(
            "trl", context.directory / "trl", context.models, context.kind
        ),
        judge=lambda context: judges.judge_trl,
        needs=("models",),
        unfit=no_trl,
    ),
)
"""Most important first: the last ones may run out of time."""


def chosen(names: list[str]) -> list[Stage]:
    """The stages to run: the named ones and those they need, or all if none is named."""
    wanted = {"machine", *names} | {it for stage in STAGES if stage.name in names for it in stage.needs}
    return [stage for stage in STAGES if not names or stage.name in wanted]


def stage_problems(settings: GpuCheckSettings) -> Iterator[str]:
    """Yields a line for each unknown stage and a missing policy directory."""
    known = [stage.name for stage in STAGES]
    for name in settings.stages:
        if name not in known:
            yield f"stages = {name}: not one of {', '.join(known)}{did_you_mean(name, known)}"
    if not settings.policy.startswith("builtin:") and not Path(settings.policy, "config.json").is_file():
        yield f"policy = {settings.policy}: no model there; set a model's directory, or builtin:addition"
