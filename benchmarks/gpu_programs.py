"""The programs that gpu_check.py runs, each in its own process.

`python -m rlswitch.benchmarks.gpu_programs NAME ...`, where NAME is

    machine FILE                                 a description of this machine, as JSON
    fork DIRECTORY                               the state of a process from the fork server
    models DIRECTORY KIND POLICY                 the models, prompts and rewards of the other stages
    turns DIRECTORY FORK_SERVER LEVELS MODEL...  models take turns at each level
    trl DIRECTORY MODELS KIND                    TRL's GRPO with the model, prompts and batch of a push
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
MODEL, SMALL, DATA, REWARD = "model", "small", "prompts.jsonl", "reward.py"
"""Written by the stage `models`."""

OPTIONAL = ("wandb",)
"""Dependencies that no stage needs."""

REWARD_FUNCTION = '''\
"""An arbitrary reward that varies between the completions of a random model."""


def score(prompts, completions, **columns):
    return [float(sum(map(ord, str(completion))) % 7) for completion in completions]
'''


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Qwen3 with random weights, and its training batch."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    dtype: str
    prompts: int
    group: int
    new_tokens: int
    kv_cache_gib: float


SHAPES = {
    "cuda": Shape(  # Qwen3-0.6B
        vocabulary=151936,
        hidden=1024,
        layers=28,
        heads=16,
        kv_heads=8,
        head_dim=128,
        intermediate=3072,
        dtype="bfloat16",
        prompts=64,
        group=8,
        new_tokens=64,
        kv_cache_gib=8,
    ),
    "cpu": Shape(
        vocabulary=4096,
        hidden=256,
        layers=4,
        heads=8,
        kv_heads=4,
        head_dim=32,
        intermediate=1024,
        dtype="float32",
        prompts=16,
        group=4,
        new_tokens=16,
        kv_cache_gib=0.125,
    ),
}
"""By the kind of device."""


def machine(file: str) -> None:
    from rlswitch.switch.device import Device

    from .tables import hardware

    device, shm = Device.detect(), Path("/dev/shm")
    free = shutil.disk_usage(shm).free if shm.is_dir() else 0
    version, compute_mode = driver()
    facts = hardware(device) | {"kind": device.kind, "driver": version, "compute_mode": compute_mode}
    facts["shm_free_gib"] = round(free / GIB, 2)
    facts["not_installed"] = [name for name in dependencies() if not is_installed(name)]
    Path(file).write_text(json.dumps(facts, indent=1))


def dependencies() -> list[str]:
    """The dependencies in pyproject.toml, and vLLM, which it does not list."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in project["dependencies"]]
    return ["vllm", *(name for name in names if name not in OPTIONAL)]


def is_installed(name: str) -> bool:
    """Whether the package is installed, or its module can be found (packages copied without metadata)."""
    found = next(iter(metadata.distributions(name=name)), None)
    return bool(found or importlib.util.find_spec(name.replace("-", "_")))


def driver() -> tuple[str, ...]:
    """NVIDIA's driver version and the first GPU's compute mode; empty without a GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version,compute_mode", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "", ""
    first = done.stdout.strip().partition("\n")[0]
    return tuple(first.split(", ", 1)) if ", " in first else ("", "")


def fork(directory: str) -> None:
    """Writes fork.json: the child's findings, exit code and run time."""
    from rlswitch.processes.fork_server import start_process

    file, began = Path(directory) / "fork.json", time.monotonic()
    process = start_process(describe_child, [str(file)])
    process.join(60)
    found = json.loads(file.read_text()) if file.exists() else {}
    found |= {"exit_code": process.exitcode, "seconds": round(time.monotonic() - began, 2)}
    file.write_text(json.dumps(found))
    if process.exitcode is None:
        process.kill()


def describe_child(file: str) -> None:
    """Records whether CUDA was initialised or torch patched before the fork; computes a sum on the device."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        status = library.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    except OSError:
        status = None
    imported = "vllm" in sys.modules
    import torch

    found = {"driver_status": status, "imported": imported, "stream": torch.cuda.Stream.__name__}
    Path(file).write_text(json.dumps(found))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found["sum"] = torch.ones(3, device=device).sum().item()
    Path(file).write_text(json.dumps(found))


def models(directory: str, kind: str, policy: str) -> None:
    """Creates the built-in policy, a second small model, and a model to push with prompts and a reward."""
    from rlswitch.recipes.addition.policy import ensure_model

    from .models import model_path

    root, shape = Path(directory), SHAPES[kind]
    if policy.startswith("builtin:"):
        ensure_model(0, print)
    model_path("builtin:small", root)
    size = make_model(root / MODEL, shape, kind)
    (root / REWARD).write_text(REWARD_FUNCTION)
    generator = random.Random(0)
    with (root / DATA).open("w") as rows:
        for _ in range(4 * shape.prompts):
            words = [f"t{generator.randrange(shape.vocabulary - 2)}" for _ in range(generator.randint(4, 12))]
            rows.write(json.dumps({"prompt": " ".join(words), "answer": ""}) + "\n")
    (root / "models.json").write_text(json.dumps({"parameters": size, "kind": kind}))


def make_model(directory: Path, shape: Shape, kind: str) -> int:
    """Saves a random model and a tokenizer with a word per token; returns the number of parameters."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    eos = shape.vocabulary - 2
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=shape.hidden
        ** -0.5,  # layers outweigh the embedding, otherwise it repeats its prompt
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    torch.manual_seed(0)
    with torch.device(kind):
        model = Qwen3ForCausalLM(config).to(getattr(torch, shape.dtype))
    with torch.no_grad():  # logits with a spread of 2, like a trained model's, so that errors show
        weight = model.model.embed_tokens.weight
        weight.mul_(2 / (shape.hidden**0.5 * weight.float().std()))
    model.save_pretrained(directory)
    words = {f"t{i}": i for i in range(eos)} | {"<eos>": eos, "<unk>": eos + 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def turns(directory: str, fork_server: str, levels: str, *names: str) -> None:
    """Writes turns.jsonl, a row per hand-over. Each model gets three turns at each level."""
    import rlswitch

    settings: dict[str, Any] = {"enforce_eager": True, "fork_server": fork_server == "true"}
    settings |= {"max_model_len": 64, "kv_cache_gib": SHAPES["cpu"].kv_cache_gib}
    with (Path(directory) / "turns.jsonl").open("w") as rows:
        for level in levels.split(","):
            began, where = time.monotonic(), Path(directory) / f"level-{level}"
            with rlswitch.serve(*names, level=level, output_dir=where, **settings) as (switch, *engines):
                start = time.monotonic() - began
                for turn in range(3 * len(engines)):
                    index = turn % len(engines)
                    began = time.monotonic()
                    switch.give_to(engines[index])
                    row = {
                        "level": level,
                        "turn": turn,
                        "engine": index,
                        "seconds": round(time.monotonic() - began, 4),
                        "start_seconds": round(start, 2),
                        "canary_gap": engines[index].canary_gap,
                        "proven": engines[index].proven,
                        "answer": rlswitch.complete(engines[index], ["12+34="], max_new_tokens=8),
                    }
                    print(row, flush=True)
                    rows.write(json.dumps(row) + "\n")
                    rows.flush()


def trl(directory: str, models_directory: str, kind: str) -> None:
    """Writes trl.jsonl: the seconds of each step of TRL's GRPOTrainer, with the model of the stage `models`.

    On a GPU it generates with vLLM in the same process, on a CPU with transformers.
    """
    import runpy

    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    shape, rows = SHAPES[kind], (Path(directory) / "trl.jsonl").open("w")

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            row = {"step": state.global_step, "seconds": round(time.monotonic() - self.began, 4)}
            rows.write(json.dumps(row) + "\n")
            rows.flush()

    at_once = min(shape.prompts * shape.group, 64)
    config = GRPOConfig(
        output_dir=str(Path(directory) / "trl"),
        max_steps=3,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=shape.prompts * shape.group // at_once,
        num_generations=shape.group,
        max_completion_length=shape.new_tokens,
        learning_rate=1e-5,
        bf16=kind == "cuda",
        use_cpu=kind == "cpu",
        use_vllm=kind == "cuda",
        vllm_mode="colocate",
        vllm_enable_sleep_mode=True,
        vllm_gpu_memory_utilization=0.3,
        report_to=[],
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=str(Path(models_directory) / MODEL),
        reward_funcs=runpy.run_path(str(Path(models_directory) / REWARD))["score"],
        args=config,
        train_dataset=load_dataset("json", data_files=str(Path(models_directory) / DATA), split="train"),
        callbacks=[Clock()],
    )
    trainer.train()


PROGRAMS = {it.__name__: it for it in (machine, fork, models, turns, trl)}

if __name__ == "__main__":  # vLLM starts its processes by importing this module again
    from rlswitch.processes.exit import DONE, leave

    PROGRAMS[sys.argv[1]](*sys.argv[2:])
    leave(DONE)
