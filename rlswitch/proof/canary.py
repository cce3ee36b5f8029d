"""The canary: token sequences that the trainer and the engine both score after a push."""

from __future__ import annotations

import random
from collections.abc import Sequence


def canary_length(max_model_len: int, block_size: int) -> int:
    """Tokens per sequence: more than a block of the prefix cache, so that a stale prefix is found."""
    return min(max_model_len - 1, max(block_size + 2, 32))


def canary_sequences(texts: Sequence[list[int]], vocabulary: int, length: int) -> list[list[int]]:
    """Four sequences of `length` tokens: two from `texts`, if there are any, and two random ones.

    The text is what the policy sees in training; random tokens reach rows of the embedding that no prompt
    does.
    """
    stream = [token for text in texts for token in text]
    generator = random.Random(0)
    # Different first tokens: with a common prefix one sequence would find the other's cached.
    firsts = generator.sample(range(vocabulary), 2)
    natural = [
        [first, *stream[begin:], *stream][:length]
        for first, begin in zip(firsts, (0, len(stream) // 2), strict=True)
        if stream
    ]
    return [*natural, *([generator.randrange(vocabulary) for _ in range(length)] for _ in range(2))]
