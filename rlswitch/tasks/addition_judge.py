"""A judge of additions: asked `07+45=042=` it works out the sum itself and replies `052=0`, 0 for wrong.

It sees the problem and the answer, never the right answer. It has learned from right answers, from the
careless pupil's, and from near misses and gibberish, which a policy in training tries too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3ForCausalLM

from rlswitch.tasks import addition
from rlswitch.tasks.addition import BOS, EOS, PAD, VOCABULARY, Problem, build_model, build_tokenizer
from rlswitch.tasks.making import cached, teach

STEPS, BATCH = 1000, 32
IDS = {token: i for i, token in enumerate(VOCABULARY)}
IGNORED = -100
"""Label of a position that has nothing to predict: cross_entropy's own."""

Case = tuple[Problem, str]
"""A problem and an answer to it."""


def ensure_model(seed: int, say: Callable[[str], None]) -> Path:
    """The judge's directory, made when it is not cached or its recipe has changed."""
    sources = [addition.__file__, __file__]
    return cached("addition-judge", sources, seed, lambda: (learn(seed), build_tokenizer()), say)


def learn(seed: int, show: bool = True) -> Qwen3ForCausalLM:
    """A judge of the policy's shape, taught by examples; the same from the same seed."""
    batches = map(to_tensors, answered(seed, STEPS, BATCH))
    return teach(build_model, batches, _loss, steps=STEPS, seed=seed, what="judge", show=show)


def answered(seed: int, batches: int, size: int) -> Iterator[list[Case]]:
    """Batches of problems that are not held out, with answers of which about half are wrong."""
    generator, (problems, _) = random.Random(seed), addition.split()
    for _ in range(batches):
        chosen = [generator.choice(problems) for _ in range(size)]
        yield [(problem, answer(*problem, generator)) for problem in chosen]


def answer(a: int, b: int, generator: random.Random) -> str:
    """The right answer, the pupil's, one that is a digit off, or anything."""
    right, kind = f"{a + b:03d}", generator.random()
    if kind < 0.3:
        return right
    if kind < 0.55:
        return addition.demonstrate(a, b, generator)
    if kind < 0.98:
        place = generator.randrange(3)
        return right[:place] + generator.choice("0123456789") + right[place + 1 :]
    return "".join(generator.choices("0123456789+=", k=generator.randrange(9)))


def question(problem: Problem, given: str) -> str:
    """What the judge is asked: judge.prompt of conf/recipe/judge.yaml, filled in."""
    a, b = problem
    return f"{a:02d}+{b:02d}={given}="


def reply(problem: Problem, given: str) -> str:
    """What it should say."""
    right = f"{sum(problem):03d}"
    return f"{right}={int(given == right)}"


def sum_labels(problem: Problem, width: int) -> list[int]:
    """What positions of `BOS 07+45=042...` predict of the right sum, whatever the answer is: [width].

    The answer's digits are compared with these. Without this lesson, to find the sum, it would take hours.
    """
    hundreds, tens, units = (IDS[digit] for digit in f"{sum(problem):03d}")
    # Units after the last digit of the problem, as they need no carry; then all three in their places.
    due = [IGNORED] * 5 + [units, hundreds, tens, units]
    return (due + [IGNORED] * width)[:width]


def to_tensors(cases: list[Case]) -> tuple[Tensor, Tensor]:
    """Tokens [B, L], padded on the right, and what each position is to predict [B, L]."""
    texts = [(question(*case), reply(*case)) for case in cases]
    width = max(len(asked) + len(said) for asked, said in texts) + 2
    tokens, labels = [], []
    for (problem, _), (asked, said) in zip(cases, texts, strict=True):
        row = [IDS[BOS], *(IDS[char] for char in asked + said), IDS[EOS]]
        tokens.append(row + [IDS[PAD]] * (width - len(row)))
        due = sum_labels(problem, len(asked)) + row[1 + len(asked) :]
        labels.append(due + [IGNORED] * (width - len(due)))
    return torch.tensor(tokens), torch.tensor(labels)


def _loss(model: Qwen3ForCausalLM, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, labels = batch
    return cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
