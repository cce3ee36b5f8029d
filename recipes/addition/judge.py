"""A judge of additions: given `042=07+45=`, it computes the sum itself and replies `052=100`.

Each digit after the `=` says whether the answer is right up to that digit; the last one is the verdict. The
judge sees the answer and the problem, never the reference. It is fine-tuned from the warm-started policy on
right answers, careless ones, and other wrong answers that a policy may try during training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from . import policy as addition_policy
from . import task as addition
from .policy import build_model
from .task import BOS, EOS, PAD, VOCABULARY, Problem, build_tokenizer
from .train_builtin import cached, train

STEPS, BATCH = 600, 32
IDS = {token: i for i, token in enumerate(VOCABULARY)}
IGNORED = -100
"""Label that cross_entropy ignores: its default."""

Case = tuple[Problem, str]
"""A problem and an answer to it."""


def ensure_model(seed: int, log: Callable[[str], None]) -> Path:
    """The judge's directory; trains the judge if it is not cached or its code has changed."""

    def make() -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
        return train_judge(addition_policy.ensure_model(seed, log), seed), build_tokenizer()

    return cached("addition-judge", [addition.__file__, addition_policy.__file__, __file__], seed, make, log)


def train_judge(policy: Path, seed: int, show: bool = True) -> Qwen3ForCausalLM:
    """A judge fine-tuned from the model in `policy`. Deterministic given the seed."""

    def build() -> Qwen3ForCausalLM:
        model = build_model()
        model.load_state_dict(load_file(policy / "model.safetensors"), strict=False)  # the head is tied
        return model

    batches = map(to_tensors, sample_cases(seed, STEPS, BATCH))
    return train(build, batches, _loss, steps=STEPS, seed=seed, what="judge", show=show)


def sample_cases(seed: int, batches: int, size: int) -> Iterator[list[Case]]:
    """Batches of training problems with answers, about half of them wrong."""
    generator, (problems, _) = random.Random(seed), addition.split()
    for _ in range(batches):
        chosen = [generator.choice(problems) for _ in range(size)]
        yield [(problem, sample_answer(*problem, generator)) for problem in chosen]


def sample_answer(a: int, b: int, generator: random.Random) -> str:
    """The right answer, a careless one, one with a digit replaced, several digits replaced, or noise."""
    right, kind = f"{a + b:03d}", generator.random()
    if kind < 0.3:
        return right
    if kind < 0.6:
        return addition.demonstrate(a, b, generator)
    if kind < 0.82:
        place = generator.randrange(3)
        return right[:place] + generator.choice("0123456789") + right[place + 1 :]
    if kind < 0.98:
        return "".join(
            digit if generator.random() < 0.5 else generator.choice("0123456789") for digit in right
        )
    return "".join(generator.choices("0123456789+=", k=generator.randrange(9)))


def question(problem: Problem, given: str) -> str:
    """The judge's prompt: judge.prompt in conf/recipe/judge.yaml, filled in."""
    a, b = problem
    return f"{given}={a:02d}+{b:02d}="


def reply(problem: Problem, given: str) -> str:
    """The target reply."""
    right = f"{sum(problem):03d}"
    so_far = [given[:end] == right[:end] and len(given) <= 3 for end in (1, 2, 3)]
    return f"{right}={''.join(str(int(it)) for it in so_far)}"


def to_tensors(cases: list[Case]) -> tuple[Tensor, Tensor]:
    """Right-padded tokens [B, L], and the token that each position should predict [B, L]: replies only."""
    texts = [(question(*case), reply(*case)) for case in cases]
    width = max(len(prompt) + len(target) for prompt, target in texts) + 2
    tokens, labels = [], []
    for prompt, target in texts:
        row = [IDS[BOS], *(IDS[char] for char in prompt + target), IDS[EOS]]
        label = [IGNORED] * len(prompt) + row[1 + len(prompt) :]
        tokens.append(row + [IDS[PAD]] * (width - len(row)))
        labels.append(label + [IGNORED] * (width - len(label)))
    return torch.tensor(tokens), torch.tensor(labels)


def _loss(model: Qwen3ForCausalLM, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, labels = batch
    return cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
