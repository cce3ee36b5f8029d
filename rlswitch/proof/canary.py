"""The canary: token sequences that the trainer and the engine both score after a push."""

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def canary_length(max_model_len: int, block_size: int) -> int:
    """Tokens per sequence: more than a block of the prefix cache, so that a stale prefix is found."""
    return min(max_model_len - 1, max(block_size + 2, 32))


def canary_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token, if the tokenizer starts texts with it: without it such a model is far from its data."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def canary_sequences(
    texts: Sequence[list[int]], vocabulary: int, length: int, start: Sequence[int] = ()
) -> list[list[int]]:
    """Four sequences of `length` tokens, `start` included: two from `texts`, if any, and two random ones.

    The text is what the policy sees in training; random tokens reach rows of the embedding that no prompt
    does.
    """
    stream = [token for text in texts for token in text]
    generator = random.Random(0)
    # Different tokens after `start`: with a common block one sequence would find the other's cached.
    firsts = generator.sample(range(vocabulary), 2)
    natural = [
        [first, *stream[begin:], *stream]
        for first, begin in zip(firsts, (0, len(stream) // 2), strict=True)
        if stream
    ]
    drawn = [[generator.randrange(vocabulary) for _ in range(length)] for _ in range(2)]
    return [[*start, *tokens][:length] for tokens in (*natural, *drawn)]
