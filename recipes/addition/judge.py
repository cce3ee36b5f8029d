"""A judge of additions: asked `042=07+45=` it adds by itself and replies `052=100`.

After the `=` it says of each digit whether the answer is right so far: the last 1 or 0 is the verdict. It
sees the answer and the problem, never the right answer. It starts as the policy does, and has learned from
right answers, from the careless pupil's, and from wrong ones of other kinds, which a policy in training
tries too.
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
from .task import BOS, EOS, PAD, VOCABULARY, Problem, build_tokenizer
from .train_builtin import cached, teach

STEPS, BATCH = 600, 32
IDS = {token: i for i, token in enumerate(VOCABULARY)}
IGNORED = -100
"""Label of a position that has nothing to predict: cross_entropy's own."""

Case = tuple[Problem, str]
"""A problem and an answer to it."""


def ensure_model(seed: int, say: Callable[[str], None]) -> Path:
    """The judge's directory, made when it is not cached or its recipe has changed."""

    def make() -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
        return learn(addition_policy.ensure_model(seed, say), seed), build_tokenizer()

    return cached("addition-judge", [addition.__file__, addition_policy.__file__, __file__], seed, make, say)


def build_model() -> Qwen3ForCausalLM:
    """Untrained, of the policy's shape."""
    return addition_policy.build_model()


def learn(policy: Path, seed: int, show: bool = True) -> Qwen3ForCausalLM:
    """A judge that the `policy` becomes by examples; the same from the same seed."""

    def build() -> Qwen3ForCausalLM:
        model = build_model()
        model.load_state_dict(load_file(policy / "model.safetensors"), strict=False)  # its head is tied
        return model

    batches = map(to_tensors, answered(seed, STEPS, BATCH))
    return teach(build, batches, _loss, steps=STEPS, seed=seed, what="judge", show=show)


def answered(seed: int, batches: int, size: int) -> Iterator[list[Case]]:
    """Batches of problems that are not held out, with answers of which more than half are wrong."""
    generator, (problems, _) = random.Random(seed), addition.split()
    for _ in range(batches):
        chosen = [generator.choice(problems) for _ in range(size)]
        yield [(problem, answer(*problem, generator)) for problem in chosen]


def answer(a: int, b: int, generator: random.Random) -> str:
    """The right answer, the pupil's, one that is a digit off, one of mixed digits, or anything."""
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
    """What the judge is asked: judge.prompt of conf/recipe/judge.yaml, filled in."""
    a, b = problem
    return f"{given}={a:02d}+{b:02d}="


def reply(problem: Problem, given: str) -> str:
    """What it should say."""
    right = f"{sum(problem):03d}"
    so_far = [given[:end] == right[:end] and len(given) <= 3 for end in (1, 2, 3)]
    return f"{right}={''.join(str(int(it)) for it in so_far)}"


def to_tensors(cases: list[Case]) -> tuple[Tensor, Tensor]:
    """Tokens [B, L], padded on the right, and what each position is to predict [B, L]: the replies only."""
    texts = [(question(*case), reply(*case)) for case in cases]
    width = max(len(asked) + len(said) for asked, said in texts) + 2
    tokens, labels = [], []
    for asked, said in texts:
        row = [IDS[BOS], *(IDS[char] for char in asked + said), IDS[EOS]]
        due = [IGNORED] * len(asked) + row[1 + len(asked) :]
        tokens.append(row + [IDS[PAD]] * (width - len(row)))
        labels.append(due + [IGNORED] * (width - len(due)))
    return torch.tensor(tokens), torch.tensor(labels)


def _loss(model: Qwen3ForCausalLM, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, labels = batch
    return cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
