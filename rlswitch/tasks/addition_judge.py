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
from rlswitch.tasks.addition import BOS, EOS, PAD, VOCABULARY, Problem, build_config, build_tokenizer
from rlswitch.tasks.making import cached, teach

STEPS, BATCH = 800, 64
IGNORED = -100
"""Label of a token that is not to be predicted: cross_entropy's own."""
IDS = {token: i for i, token in enumerate(VOCABULARY)}


def ensure_model(seed: int, say: Callable[[str], None]) -> Path:
    """The judge's directory, made when it is not cached or its recipe has changed."""
    sources = [addition.__file__, __file__]
    return cached("addition-judge", sources, seed, lambda: (learn(seed), build_tokenizer()), say)


def build_model() -> Qwen3ForCausalLM:
    """Untrained, narrower and deeper than the policy: to check an answer takes more steps than to give it."""
    return Qwen3ForCausalLM(build_config(hidden=128, layers=6))


def learn(seed: int, show: bool = True) -> Qwen3ForCausalLM:
    """A judge taught by examples; the same from the same seed."""
    batches = (to_tensors([verdict(*case) for case in cases]) for cases in answered(seed, STEPS, BATCH))
    return teach(build_model, batches, _loss, steps=STEPS, seed=seed, what="judge", show=show)


def answered(seed: int, batches: int, size: int) -> Iterator[list[tuple[Problem, str]]]:
    """Batches of problems that are not held out, each with an answer that may be wrong."""
    generator, (problems, _) = random.Random(seed), addition.split()
    for _ in range(batches):
        chosen = [generator.choice(problems) for _ in range(size)]
        yield [(problem, answer(*problem, generator)) for problem in chosen]


def answer(a: int, b: int, generator: random.Random) -> str:
    """Right in about half of the cases: right, the pupil's, one digit off, or anything."""
    right, kind = f"{a + b:03d}", generator.random()
    if kind < 0.3:
        return right
    if kind < 0.55:
        return addition.demonstrate(a, b, generator)
    if kind < 0.95:
        place = generator.randrange(3)
        return right[:place] + generator.choice("0123456789") + right[place + 1 :]
    return "".join(generator.choices("0123456789+=", k=generator.randrange(9)))


def verdict(problem: Problem, given: str) -> tuple[str, str]:
    """What the judge is asked, and its reply."""
    a, b = problem
    right = f"{a + b:03d}"
    return f"{a:02d}+{b:02d}={given}=", f"{right}={int(given == right)}"


def to_tensors(rows: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Tokens and labels, both [B, L], padded on the right; only the replies are to be predicted."""
    width = max(len(asked) + len(reply) for asked, reply in rows) + 2
    tokens, labels = [], []
    for asked, reply in rows:
        row = [IDS[BOS], *(IDS[c] for c in asked + reply), IDS[EOS]]
        tokens.append(row + [IDS[PAD]] * (width - len(row)))
        own = row[1 + len(asked) :]
        labels.append([IGNORED] * (1 + len(asked)) + own + [IGNORED] * (width - len(row)))
    return torch.tensor(tokens), torch.tensor(labels)


def _loss(model: Qwen3ForCausalLM, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, labels = batch
    logits = model(input_ids=tokens[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
