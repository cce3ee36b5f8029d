"""A reward model of additions: a sequence classifier whose one logit is about 2.5 for a right answer, -3
for a wrong one. It reads `07+45=042` as the policy wrote it, and learns from the same answers as the judge.
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
from .judge import IDS, IGNORED, Case, answered
from .task import BOS, EOS, PAD, build_config, build_tokenizer
from .train_builtin import cached, teach

STEPS, BATCH = 950, 32
RIGHT, WRONG = 0.95, 0.05
"""What is aimed at: log-odds of 3, not of infinity, so that right answers do not differ among each other."""


def ensure_model(seed: int, say: Callable[[str], None]) -> Path:
    """The reward model's directory, made when it is not cached or its recipe has changed."""
    sources = [addition.__file__, addition_judge.__file__, __file__]
    return cached("addition-reward-model", sources, seed, lambda: (learn(seed), build_tokenizer()), say)


def build_model() -> Qwen3ForSequenceClassification:
    """Untrained, a layer deeper than the policy: to check an answer comes on top of finding it."""
    config = build_config(layers=4)
    config.num_labels = 1
    return Qwen3ForSequenceClassification(config)


def learn(seed: int, show: bool = True) -> Qwen3ForSequenceClassification:
    """A reward model taught by examples; the same from the same seed."""
    batches = map(to_tensors, answered(seed, STEPS, BATCH))
    return teach(build_model, batches, _loss, steps=STEPS, seed=seed, what="reward model", show=show)


def to_tensors(cases: list[Case]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, L], padded on the right; marks [B, L]; and digits of the sum [B, L] to find on the way.

    To be told which digits are right teaches more than to be told that not all are: each has a mark, and
    the end of the sequence has the one that counts. -1 is none.
    """
    width = max(len(given) for _, given in cases) + 8
    tokens, marks, sums = [], [], []
    for (a, b), given in cases:
        right = f"{a + b:03d}"
        row = [IDS[BOS], *(IDS[char] for char in f"{a:02d}+{b:02d}={given}"), IDS[EOS]]
        each = [right[place : place + 1] == char for place, char in enumerate(given)]
        aims = [RIGHT if it else WRONG for it in (*each, given == right)]
        # Hundreds, tens and units are due where the policy says them; units need no carry: already there.
        due = [IGNORED] * 5 + [IDS[digit] for digit in right[2] + right]
        tokens.append(row + [IDS[PAD]] * (width - len(row)))
        marks.append([-1.0] * 7 + aims + [-1.0] * (width - len(row)))
        sums.append((due + [IGNORED] * width)[:width])
    return torch.tensor(tokens), torch.tensor(marks), torch.tensor(sums)


def _loss(model: Qwen3ForSequenceClassification, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    tokens, marks, sums = batch
    hidden = model.model(input_ids=tokens).last_hidden_state
    scores, marked = model.score(hidden).squeeze(-1), marks >= 0
    digits = (hidden @ model.model.embed_tokens.weight.T).flatten(0, 1)
    return 2 * binary_cross_entropy_with_logits(scores[marked], marks[marked]) + cross_entropy(
        digits, sums.flatten(), ignore_index=IGNORED
    )
