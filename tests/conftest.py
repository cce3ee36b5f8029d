"""What several test files share: a tiny model, runs built directly, no network."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlswitch.config import OPTIONS, DataConfig, EngineConfig, ModelConfig, RolloutConfig, Run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TinyModel(NamedTuple):
    path: Path
    model: Any
    tokenizer: Any


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in one order, and no fight over the cores; torch only where some test has imported it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """tiny_model(tie=True): a Qwen3 with random weights that also runs in vLLM. Not to be changed."""
    made: dict[bool, TinyModel] = {}

    def make(tie: bool = True) -> TinyModel:
        if tie not in made:
            made[tie] = _make_tiny_model(tmp_path_factory.mktemp("tiny-model"), tie)
        return made[tie]

    return make


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Callable[..., TinyModel]) -> Callable[..., Run]:
    """make_run("ppo", seed=3, trainer={"lr": 0.1}): sections as dictionaries, the rest as it is."""

    def make(algorithm: str = "grpo", *, tie: bool = True, **settings: Any) -> Run:
        path = str(tiny_model(tie).path)
        sections = {
            "model": ModelConfig(path=path, dtype="float32"),
            "data": DataConfig(path="builtin:addition", max_prompt_tokens=8),
            "rollout": RolloutConfig(num_prompts=2, group_size=3, max_new_tokens=6),
        }
        run = Run(
            output_dir=str(tmp_path / "run"),
            logger=[],
            algorithm=OPTIONS["algorithm"][algorithm](**settings.pop("options", {})),
            engine=EngineConfig(),
            **sections,
        )
        for name, value in settings.items():
            section = getattr(run, name)
            setattr(run, name, replace(section, **value) if isinstance(value, dict) else value)
        return run

    return make


def _make_tiny_model(path: Path, tie: bool) -> TinyModel:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlswitch.tasks.addition import build_tokenizer

    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # far from uniform, so that a wrong weight shows
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return TinyModel(path, model, tokenizer)
