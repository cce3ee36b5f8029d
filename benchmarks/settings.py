"""What bench_switch.py, probe.py and soak.py can be told; read before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from rlswitch.config.fields import choice, did_you_mean, leaves_of, number
from rlswitch.errors import ConfigError

T = TypeVar("T")

RESTART, SLEEPING = "restart", ("0", "kv", "1", "2")
MODES = (RESTART, *SLEEPING)
TRANSPORTS = ("local", "server")
ABLATIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "fp8": {"vllm": {"quantization": "fp8"}},
    "tp2": {"tensor_parallel_size": 2},
}


@dataclass(kw_only=True, slots=True)
class BenchSettings:
    """Two models take turns, A-B-A-B-A-B, in every mode."""

    model_a: str = "builtin:small"
    """A directory or hub id; builtin:small and builtin:large are made on the spot, with random weights."""
    model_b: str = "builtin:large"
    modes: list[str] = field(default_factory=lambda: [RESTART, "kv", "1", "2"])
    """restart: no sleep, a new engine for each visit; 0, kv, 1, 2: sleep levels."""
    transports: list[str] = field(default_factory=lambda: ["local", "server"])
    """local: vllm.LLM, its core in a process of its own; server: `vllm serve` over HTTP."""
    cycles: int = number(3, at_least=1)
    """Visits to each model in each mode."""
    ablations: list[str] = field(default_factory=lambda: [*ABLATIONS])
    """Levels 1 and 2 again in bfloat16, in fp8, and over two GPUs (tp2)."""
    prompt: str = "Question: what is 12+34? Answer:"
    max_new_tokens: int = number(32, at_least=1)
    max_model_len: int = number(256, at_least=64)
    dtype: str = choice("auto", "float32", "bfloat16", "float16")
    kv_cache_gib: float | None = number(None, above=0)
    gpu_memory_utilization: float = number(0.85, above=0, at_most=1)
    enforce_eager: bool = False
    start_timeout_s: float = number(600.0, above=0)
    output_dir: str = "runs/bench_switch"

    def problems(self) -> Iterator[str]:
        """What the fields' own bounds cannot tell."""
        for key, known in (("modes", MODES), ("transports", TRANSPORTS), ("ablations", ABLATIONS)):
            for value in getattr(self, key):
                if value not in known:
                    yield f"{key} = {value}: not one of {', '.join(known)}{did_you_mean(value, known)}"
        if not self.modes or not self.transports:
            yield "modes, transports: nothing to measure; name at least one of each"
        if self.model_a == self.model_b:
            yield f"model_b = {self.model_b}: the same as model_a; two models are to take turns, name another"


@dataclass(kw_only=True, slots=True)
class ProbeSettings:
    model: str = "builtin:small"
    """A directory or hub id; builtin:small is made on the spot."""
    cycles: int = number(3, at_least=2)
    prompt: str = "Question: what is 12+34? Answer:"
    max_new_tokens: int = number(16, at_least=1)
    max_model_len: int = number(256, at_least=64)
    kv_cache_gib: float | None = number(None, above=0)
    gpu_memory_utilization: float = number(0.85, above=0, at_most=1)
    output: str = "runs/probe.json"


@dataclass(kw_only=True, slots=True)
class SoakSettings:
    model: str = "builtin:addition"
    """As model.path of a run."""
    data: str = "builtin:addition"
    num_steps: int = number(100, at_least=1)
    """Of each of the two runs; two hand-overs a step."""
    rate: float = number(0.02, at_least=0, at_most=1)
    """How likely a fault is at the beginning of each phase of a step."""
    seed: int | None = number(None, at_least=0)
    """Of the faults; null: another one each time, and printed."""
    request_timeout_s: float = number(10.0, above=0)
    """How long an engine that was stopped goes unnoticed."""
    output_dir: str = "runs/soak"


@dataclass(kw_only=True, slots=True)
class GpuCheckSettings:
    stages: list[str] = field(default_factory=list)
    """Which stages to run, in their own order; empty: all. The stage `machine` always runs."""
    limit_s: float = number(540.0, at_least=30)
    """Seconds for everything. A stage gets its own cap or what is left, whichever is less."""
    policy: str = "builtin:addition"
    """Or a copy of its directory in the cache of another machine, where training it takes minutes."""
    cap_scale: float = number(1.0, at_least=1)
    """Factor on the caps, for a slow or busy machine."""
    overrides: list[str] = field(default_factory=list)
    """Further settings for every training run, such as overrides=engine.enforce_eager=true."""
    output_dir: str = "runs/gpu_check"
    """Logs and records of the stages, a folder each. Replaced by the next check."""
    results: str = "benchmarks/results"
    """Where gpu-NAME-DATE.json and gpu-NAME-DATE.md go."""


def words_from_flags(arguments: Iterable[str]) -> Iterator[str]:
    """`--limit-s 540` and `--limit-s=540` as the word `limit_s=540`; other words stay as they are."""
    flag = ""
    for argument in arguments:
        if flag:
            yield f"{flag}={argument}"
            flag = ""
        elif argument.startswith("--") and argument != "--help":
            key, sign, value = argument[2:].partition("=")
            flag = key.replace("-", "_")
            if sign:
                yield f"{flag}={value}"
                flag = ""
        else:
            yield argument
    if flag:
        yield flag


def settings_from_words(owner: type[T], words: Iterable[str]) -> T:
    """An `owner` with the values of `key=value` words; a list is `a,b`. Raises ConfigError, one line each."""
    known, problems = leaves_of(owner), list[str]()
    values: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        if key not in known or not sign:
            what = f"{word}: unknown setting" if sign else f"{word}: expected key=value"
            problems.append(f"{what}{did_you_mean(key, known)} (available: {', '.join(known)})")
            continue
        leaf = known[key]
        if leaf.annotation == list[str]:
            values[key] = [item for item in text.strip("[]").split(",") if item]
        else:
            values[key] = text if leaf.annotation is str else yaml.safe_load(text)
        if problem := leaf.problem(values[key]):
            problems.append(f"{key} = {text}: {problem}")
    if problems:
        raise ConfigError(*problems)
    return owner(**values)
