"""What scripts/bench_switch.py can be told, and what this machine cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlswitch.device import Device
from rlswitch.options import choice, did_you_mean, number

RESTART, SLEEPING = "restart", ("0", "kv", "1", "2")
MODES = (RESTART, *SLEEPING)
TRANSPORTS = ("local", "server")
ABLATIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "fp8": {"vllm": {"quantization": "fp8"}},
    "tp2": {"tensor_parallel_size": 2},
}
BUILTIN = {"builtin:small": (256, 4), "builtin:large": (384, 8)}
"""Width and layers of the models that are made on the spot."""


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


def limits(device: Device) -> dict[str, str]:
    """What this machine cannot do or need not, by ablation, and why."""
    found: dict[str, str] = {}
    if device.kind == "cpu":
        found["fp8"] = "a CPU has no fp8 kernels in vLLM; it takes a GPU"
        found["tp2"] = "a CPU is one device here; it takes two GPUs"
        if not {"avx512_bf16", "amx_bf16"} & cpu_flags():
            found["bf16"] = "this CPU has no bfloat16 instructions; emulation would be measured"
    elif torch.cuda.device_count() < 2:
        found["tp2"] = "one GPU is visible; it takes two"
    return found


def cpu_flags() -> set[str]:
    """Instruction sets of this CPU as the kernel names them; empty where there is no /proc."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def made_on_the_spot(name: str, directory: Path) -> str:
    """The directory of a builtin model, made there; any other name as it is."""
    if name not in BUILTIN:
        return name
    from rlswitch.tasks.addition import build_tokenizer

    path, (hidden, layers), tokenizer = directory / name.split(":")[1], BUILTIN[name], build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(layers)
        Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
