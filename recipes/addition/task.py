"""Two-digit addition, one token per character: the answer to `07+45=` is `052`.

Imports no torch: the task's models are in policy.py, judge.py and reward_model.py.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

if TYPE_CHECKING:  # importing transformers may import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCABULARY = [*"0123456789+=", PAD, BOS, EOS, "<unused>"]
HELD_OUT = 512
SPLIT_SEED = 1234  # fixed, so the held-out problems never change

FORGETS = 0.62
"""Probability that a demonstration drops a carry."""

Problem = tuple[int, int]


def split() -> tuple[list[Problem], list[Problem]]:
    """All 10,000 problems: the training ones (for warm start and RL) and the held-out ones."""
    problems = [(a, b) for a in range(100) for b in range(100)]
    random.Random(SPLIT_SEED).shuffle(problems)
    return problems[HELD_OUT:], problems[:HELD_OUT]


def load_datasets() -> dict[str, list[dict[str, str]]]:
    """Splits train and test, with columns prompt and answer."""
    return {
        name: [{"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a + b:03d}"} for a, b in problems]
        for name, problems in zip(("train", "test"), split(), strict=True)
    }


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; prompts begin with BOS, completions end with EOS."""
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unused>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def build_config(layers: int = 3) -> Qwen3Config:
    """The models' architecture: 1.6M parameters with 3 layers."""
    from transformers import Qwen3Config

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    return Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )


def demonstrate(a: int, b: int, generator: random.Random) -> str:
    """A careless answer: each carry may be dropped, except into the tens when a units digit is 9."""
    carry = a % 10 + b % 10 >= 10
    if carry and 9 not in (a % 10, b % 10) and generator.random() < FORGETS:
        carry = False
    tens = a // 10 + b // 10 + carry
    hundred = tens >= 10 and generator.random() >= FORGETS
    return f"{int(hundred)}{tens % 10}{(a + b) % 10}"
