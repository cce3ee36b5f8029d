"""The canary's sequences: what they start with, and that no two share a block of the prefix cache."""

from __future__ import annotations

import pytest
from rlswitch.recipes.addition.task import build_tokenizer

from rlswitch.proof.canary import canary_length, canary_sequences, canary_start

TEXTS = [[13, a, 10, b, 11] for a in range(3) for b in range(3)]
BLOCK, LENGTH = 32, canary_length(max_model_len=128, block_size=32)


def blocks(sequences: list[list[int]]) -> list[tuple[int, ...]]:
    """What the prefix cache keeps of each: its first full block."""
    return [tuple(tokens[:BLOCK]) for tokens in sequences]


@pytest.mark.parametrize("texts", [TEXTS, []])
@pytest.mark.parametrize("start", [[], [13]])
def test_every_sequence_fills_a_block_that_no_other_has(texts: list[list[int]], start: list[int]):
    sequences = canary_sequences(texts, 16, LENGTH, start)
    assert [len(tokens) for tokens in sequences] == [LENGTH] * len(sequences)
    assert LENGTH > BLOCK and len(sequences) == (4 if texts else 2)
    assert len(set(blocks(sequences))) == len(sequences)


def test_the_start_comes_first_and_moves_the_rest_by_one():
    plain, started = (canary_sequences(TEXTS, 16, LENGTH, start) for start in ([], [13]))
    assert started == [[13, *tokens[:-1]] for tokens in plain]


def test_only_a_bos_that_the_tokenizer_adds_itself_starts_a_sequence():
    tokenizer = build_tokenizer()
    assert canary_start(tokenizer) == tokenizer("").input_ids == [tokenizer.bos_token_id]
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer.bos_token_id is not None and canary_start(tokenizer) == []
    tokenizer.bos_token = None
    assert canary_start(tokenizer) == []
