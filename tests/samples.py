"""Test data shared by several tests: groups of rollouts without an engine, a tiny model's shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlswitch.types import Group, Prompt, Rollout


def eventually(condition: Callable[[], object], seconds: float = 120.0) -> bool:
    """Waits until the condition is true: for what another process or thread does eventually."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def group_of(*texts: str, index: int = 0, messages: Any = "", version: int = 0, **columns: Any) -> Group:
    """A prompt and a rollout for each text; `columns` are the dataset's."""
    prompt = Prompt(index=index, messages=messages, token_ids=[1], columns=columns)
    rollouts = [
        Rollout(
            prompt=prompt,
            sample=sample,
            token_ids=[5],
            logprobs=[0.0],
            text=text,
            finish_reason="stop",
            policy_version=version,
        )
        for sample, text in enumerate(texts)
    ]
    return Group(prompt=prompt, rollouts=rollouts)


def greedy(tiny: Any, prompt: str, max_new_tokens: int) -> str:
    """The greedy reply of transformers with a tiny model of conftest.py."""
    tokens = tiny.tokenizer(prompt, return_tensors="pt")
    out = tiny.model.generate(
        **tokens, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tiny.tokenizer.pad_token_id
    )
    return tiny.tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def save_classifier(path: Path, *, template: str | None = None, **changes: Any) -> Any:
    """A reward model with random weights, saved with the tokenizer of the built-in task."""
    import torch
    from rlswitch.recipes.addition.task import build_tokenizer
    from transformers import Qwen3ForSequenceClassification

    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForSequenceClassification(tiny_config(**{"num_labels": 1} | changes)).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def tiny_config(**changes: Any) -> Any:
    """A Qwen3 for the tokenizer of the built-in task; far from uniform, so that wrong weights show."""
    from transformers import Qwen3Config

    return Qwen3Config(
        **{
            "vocab_size": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 64,
            "pad_token_id": 12,
            "bos_token_id": 13,
            "eos_token_id": 14,
            "initializer_range": 0.2,
        }
        | changes
    )


def make_spec(**changes: Any) -> Any:
    """The spec of an engine on a fake backend, which starts nothing."""
    from rlswitch.config.sections import EngineConfig
    from rlswitch.engines.spec import EngineSpec

    settings = {
        "name": "rollout engine",
        "model_path": "/nowhere",
        "dtype": "float32",
        "max_model_len": 64,
        "seed": 0,
        "trust_remote_code": False,
        "settings": EngineConfig(),
        "level": "2",
        "verify": "every",
        "tolerance": 1e-4,
    }
    return EngineSpec(**settings | changes)
