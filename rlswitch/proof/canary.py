"""The canary: token sequences that the trainer and the engine both score after a push."""

from __future__ import annotations

import random
from collections.abc import Sequence


def canary_sequences(texts: Sequence[list[int]], vocabulary: int, length: int) -> list[list[int]]:
    """Token sequences that both sides score: two of the data's own text, two of random tokens.

    The text is what the policy is used on; the random ones reach rows of the embedding that no prompt
    does. `length` exceeds a block of the prefix cache, so that a stale prefix would be found.
    """
    stream = [token for text in texts for token in text]
    generator = random.Random(0)
    # A first token of its own each: a prefix they shared would be cached by one for the other.
    firsts = generator.sample(range(vocabulary), 2)
    natural = [
        [first, *stream[begin:], *stream][:length]
        for first, begin in zip(firsts, (0, len(stream) // 2), strict=True)
        if stream
    ]
    return [
        *natural,
        *([generator.randrange(vocabulary) for _ in range(length)] for _ in range(2)),
    ]
