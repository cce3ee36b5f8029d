"""Models with random weights, and the ablations to skip on this machine."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlswitch.switch.device import Device

BUILTIN = {"builtin:small": (256, 4), "builtin:large": (384, 8)}
"""Hidden size and number of layers."""


def limits(device: Device) -> dict[str, str]:
    """The ablations to skip on this machine, and why."""
    found: dict[str, str] = {}
    if device.kind == "cpu":
        found["fp8"] = "vLLM has no fp8 kernels for CPUs; needs a GPU"
        found["tp2"] = "a CPU counts as one device; needs two GPUs"
        if not {"avx512_bf16", "amx_bf16"} & {*cpu_info("flags").split()}:
            found["bf16"] = "this CPU has no bfloat16 instructions; would measure their emulation"
    elif torch.cuda.device_count() < 2:
        found["tp2"] = "only one GPU is visible; needs two"
    return found


def cpu_info(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo; empty if there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def model_path(name: str, directory: Path) -> str:
    """Creates a built-in model in `directory` and returns its path; returns any other name unchanged."""
    if name not in BUILTIN:
        return name
    from rlswitch.recipes.addition.task import build_tokenizer

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
