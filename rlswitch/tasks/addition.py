"""Two-digit addition, one character a token: `07+45=` is to be answered with `052`.

The policy is a Qwen3 of 1.6 million parameters that has learned from a careless pupil, one who tends to
forget the carry. It knows how to add and does so unreliably, as a pretrained model does: greedy, it is
right about four times in ten. Reinforcement learning has to make it reliable.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlswitch.tasks.making import cached, teach

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCABULARY = [*"0123456789+=", PAD, BOS, EOS, "<unused>"]
HELD_OUT = 512
SPLIT_SEED = 1234  # the split never moves: what was held out once stays held out

STEPS, BATCH, FORGETS = 800, 32, 0.62

Problem = tuple[int, int]


def split() -> tuple[list[Problem], list[Problem]]:
    """All 10,000 problems: those to train on (warm start and RL), and the held-out ones."""
    problems = [(a, b) for a in range(100) for b in range(100)]
    random.Random(SPLIT_SEED).shuffle(problems)
    return problems[HELD_OUT:], problems[:HELD_OUT]


def load_datasets() -> DatasetDict:
    """Splits train and test with the columns prompt and answer."""
    parts = dict(zip(("train", "test"), split(), strict=True))
    return DatasetDict(
        {
            name: Dataset.from_list(
                [{"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a + b:03d}"} for a, b in problems]
            )
            for name, problems in parts.items()
        }
    )


def ensure_model(seed: int, say: Callable[[str], None]) -> Path:
    """The warm-started model's directory, made when it is not cached or its recipe has changed."""
    return cached("addition", [__file__], seed, lambda: (warm_start(seed), build_tokenizer()), say)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; a prompt begins with BOS, a completion ends with EOS."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unused>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def build_model() -> Qwen3ForCausalLM:
    """An untrained policy with tied embeddings."""
    return Qwen3ForCausalLM(build_config())


def build_config(layers: int = 3) -> Qwen3Config:
    """Its shape: 1.6 million parameters."""
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


def warm_start(seed: int, show: bool = True) -> Qwen3ForCausalLM:
    """A policy taught by the careless pupil; the same from the same seed."""
    return teach(
        build_model,
        _demonstrations(seed),
        _loss_of_answers,
        steps=STEPS,
        seed=seed,
        what="warm start",
        show=show,
    )


def demonstrate(a: int, b: int, generator: random.Random) -> str:
    """The careless pupil's answer: each carry may be forgotten, unless a nine gives it away."""
    carry = a % 10 + b % 10 >= 10
    if carry and 9 not in (a % 10, b % 10) and generator.random() < FORGETS:
        carry = False
    tens = a // 10 + b // 10 + carry
    hundred = tens >= 10 and generator.random() >= FORGETS
    return f"{int(hundred)}{tens % 10}{(a + b) % 10}"


def _demonstrations(seed: int) -> Iterator[Tensor]:
    """Batches [BATCH, 11] of BOS, problem, the pupil's answer, EOS."""
    generator, (problems, _) = random.Random(seed), split()
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    for _ in range(STEPS):
        chosen = [generator.choice(problems) for _ in range(BATCH)]
        texts = [f"{a:02d}+{b:02d}={demonstrate(a, b, generator)}" for a, b in chosen]
        yield torch.tensor([[ids[BOS], *(ids[c] for c in text), ids[EOS]] for text in texts])


def _loss_of_answers(model: Qwen3ForCausalLM, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1], logits_to_keep=4).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -4:].flatten())
