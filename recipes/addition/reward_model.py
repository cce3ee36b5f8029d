"""A reward model for additions: a sequence classifier whose logit is about 2.5 if right, -3 if wrong.

It reads `07+45=042` as the policy wrote it, and is trained on the same answers as the judge.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import Qwen3ForSequenceClassification

from . import judge as addition_judge
from . import task as addition
from .judge import IDS, IGNORED, Case, sample_cases
from .task import BOS, EOS, PAD, build_config, build_tokenizer
from .train_builtin import cached, train

STEPS, BATCH = 950, 32
RIGHT, WRONG = 0.95, 0.05
"""Smoothed labels: finite targets (log-odds of +-3) keep the scores of right answers close together."""


def ensure_model(seed: int, log: Callable[[str], None]) -> Path:
    """The reward model's directory; trains it if it is not cached or its code has changed."""
    sources = [addition.__file__, addition_judge.__file__, __file__]
    return cached(
        "addition-reward-model", sources, seed, lambda: (train_reward_model(seed), build_tokenizer()), log
    )


def build_model() -> Qwen3ForSequenceClassification:
    """An untrained classifier, one layer deeper than the policy: it has to add and then compare."""
    config = build_config(layers=4)
    config.num_labels = 1
    return Qwen3ForSequenceClassification(config)


def train_reward_model(seed: int, show: bool = True) -> Qwen3ForSequenceClassification:
    """A trained reward model. Deterministic given the seed."""
    batches = map(to_tensors, sample_cases(seed, STEPS, BATCH))
    return train(build_model, batches, _loss, steps=STEPS, seed=seed, what="reward model", show=show)


def to_tensors(cases: list[Case]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded tokens [B, L], targets [B, L] for the score, and digits of the sum [B, L] to predict.

    Every digit of the answer has a target (is it right?), which trains faster than the final verdict alone,
    the target at EOS. -1: no target.
    """
    width = max(len(given) for _, given in cases) + 8
    tokens, targets, sums = [], [], []
    for (a, b), given in cases:
        right = f"{a + b:03d}"
        row = [IDS[BOS], *(IDS[char] for char in f"{a:02d}+{b:02d}={given}"), IDS[EOS]]
        correct = [right[place : place + 1] == char for place, char in enumerate(given)]
        row_targets = [RIGHT if it else WRONG for it in (*correct, given == right)]
        # The digits are predicted where the policy writes them; the units, which need no carry, also first.
        digits = [IGNORED] * 5 + [IDS[digit] for digit in right[2] + right]
        tokens.append(row + [IDS[PAD]] * (width - len(row)))
        targets.append([-1.0] * 7 + row_targets + [-1.0] * (width - len(row)))
        sums.append((digits + [IGNORED] * width)[:width])
    return torch.tensor(tokens), torch.tensor(targets), torch.tensor(sums)


def _loss(model: Qwen3ForSequenceClassification, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    tokens, targets, sums = batch
    hidden = model.model(input_ids=tokens).last_hidden_state
    scores, mask = model.score(hidden).squeeze(-1), targets >= 0
    digits = (hidden @ model.model.embed_tokens.weight.T).flatten(0, 1)
    return 2 * binary_cross_entropy_with_logits(scores[mask], targets[mask]) + cross_entropy(
        digits, sums.flatten(), ignore_index=IGNORED
    )
