"""Settings of the programs in scripts/, validated before torch or vLLM is imported."""

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
    """A directory or hub id; builtin:small and builtin:large have random weights and need no download."""
    model_b: str = "builtin:large"
    modes: list[str] = field(default_factory=lambda: [RESTART, "kv", "1", "2"])
    """restart: a new engine for each visit; 0, kv, 1, 2: sleep levels."""
    transports: list[str] = field(default_factory=lambda: ["local", "server"])
    """local: vllm.LLM, with its core in a separate process; server: `vllm serve` over HTTP."""
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
        """Mistakes that the bounds of single fields cannot catch, a line each."""
        for key, known in (("modes", MODES), ("transports", TRANSPORTS), ("ablations", ABLATIONS)):
            for value in getattr(self, key):
                if value not in known:
                    yield f"{key} = {value}: not one of {', '.join(known)}{did_you_mean(value, known)}"
        if not self.modes or not self.transports:
            yield "modes, transports: nothing to measure; name at least one of each"
        if self.model_a == self.model_b:
            yield f"model_b = {self.model_b}: the same as model_a; two models take turns, set another one"


@dataclass(kw_only=True, slots=True)
class ProbeSettings:
    model: str = "builtin:small"
    """A directory or hub id; builtin:small has random weights and needs no download."""
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
    """As model.path in a training run."""
    data: str = "builtin:addition"
    num_steps: int = number(100, at_least=1)
    """Steps of each of the two runs; a step has two hand-overs."""
    rate: float = number(0.02, at_least=0, at_most=1)
    """Probability of a fault in each phase of a step."""
    seed: int | None = number(None, at_least=0)
    """Seed of the faults; null: a random one, which is printed."""
    request_timeout_s: float = number(10.0, above=0)
    """A stopped engine counts as hung after so many seconds."""
    output_dir: str = "runs/soak"


@dataclass(kw_only=True, slots=True)
class GpuCheckSettings:
    stages: list[str] = field(default_factory=list)
    """Stages to run, always in the order of gpu_stages.py; empty: all. `machine` always runs."""
    limit_s: float = number(540.0, at_least=30)
    """Time limit for the whole check. A stage gets its own cap or the time left, whichever is less."""
    policy: str = "builtin:addition"
    """Or the directory of a copy from another machine's cache, where training it takes too long."""
    cap_scale: float = number(1.0, at_least=1)
    """Multiplies the stages' caps, for a slow or busy machine."""
    overrides: list[str] = field(default_factory=list)
    """Extra settings for every training run, such as overrides=engine.enforce_eager=true."""
    output_dir: str = "runs/gpu_check"
    """A folder with logs and records for each stage. Overwritten by the next check."""
    results: str = "benchmarks/results"
    """Directory of gpu-NAME-DATE.json and gpu-NAME-DATE.md."""


def words_from_flags(arguments: Iterable[str]) -> Iterator[str]:
    """Converts `--limit-s 540` and `--limit-s=540` to `limit_s=540`; leaves other words unchanged."""
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
