"""A reward model of additions: a sequence classifier whose one logit is near 1 for a right answer, near 0
for a wrong one. It learns from the same answers as the judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import Qwen3ForSequenceClassification

from rlswitch.tasks import addition, addition_judge
from rlswitch.tasks.addition import BOS, EOS, PAD, Problem, build_tokenizer
from rlswitch.tasks.addition_judge import IDS, IGNORED, answered
from rlswitch.tasks.making import cached, teach

STEPS, BATCH = 800, 64


def ensure_model(seed: int, say: Callable[[str], None]) -> Path:
    """The reward model's directory, made when it is not cached or its recipe has changed."""
    sources = [addition.__file__, addition_judge.__file__, __file__]
    return cached("addition-reward-model", sources, seed, lambda: (learn(seed), build_tokenizer()), say)


def build_model() -> Qwen3ForSequenceClassification:
    """Untrained, of the judge's shape."""
    config = addition.build_config(hidden=128, layers=6)
    config.num_labels = 1
    return Qwen3ForSequenceClassification(config)


def learn(seed: int, show: bool = True) -> Qwen3ForSequenceClassification:
    """A reward model taught by examples; the same from the same seed."""
    batches = map(to_tensors, answered(seed, STEPS, BATCH))
    return teach(build_model, batches, _loss, steps=STEPS, seed=seed, what="reward model", show=show)


def to_tensors(cases: list[tuple[Problem, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, L], padded on the right; 1 or 0 [B]; and the right digits [B, L] where each is due."""
    width = max(len(given) for _, given in cases) + 8
    tokens, marks, digits = [], [], []
    for (a, b), given in cases:
        right = f"{a + b:03d}"
        row = [IDS[BOS], *(IDS[c] for c in f"{a:02d}+{b:02d}={given}"), IDS[EOS]]
        tokens.append(row + [IDS[PAD]] * (width - len(row)))
        marks.append(float(given == right))
        due = [IGNORED] * 6 + [IDS[c] for c in right]
        digits.append((due + [IGNORED] * width)[:width])
    return torch.tensor(tokens), torch.tensor(marks), torch.tensor(digits)


def _loss(model: Qwen3ForSequenceClassification, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Squared error of the marks; and to find the sum is part of the lesson, or it would take hours.

    The hidden states that the answer's digits are checked against have to predict the right digits.
    """
    tokens, marks, digits = batch
    hidden = model.model(input_ids=tokens).last_hidden_state
    last = (tokens == IDS[EOS]).int().argmax(-1)
    scores = model.score(hidden[torch.arange(len(tokens)), last]).squeeze(-1)
    sums = hidden @ model.model.embed_tokens.weight.T
    return mse_loss(scores, marks) + cross_entropy(sums.flatten(0, 1), digits.flatten(), ignore_index=IGNORED)
